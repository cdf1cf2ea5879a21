"""Gated feed-forward blocks that activate and multiply in one pass instead of two.

Knows modules by what they compute; no family.

Shapes: S scales of random numbers, T tokens, D model, I inside the block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from flexeval.engine.compute import host_passes
from flexeval.engine.compute.fusion import Fusion
from flexeval.engine.compute.trying import ACTIVATIONS, is_same, numbers, try_out

_WIDTH, _INNER = 6, 10
"""D and I of a trial: unlike, so that a matrix in another's place does not fit."""
_APPLY_GATE = "_apply_gate"
"""What transformers calls it, where experts' matrices are stacked."""


class _Gate(NamedTuple):
    """How two halves become one."""

    activation: str
    """Of the gate, before `up` is multiplied by it."""
    is_up_first: bool
    """Whether `up` comes before the gate."""

    def plainly(self, halves: Sequence[Tensor]) -> Tensor:
        """As torch does it."""
        gate_TI, up_TI = halves[:: -1 if self.is_up_first else 1]
        return ACTIVATIONS[self.activation](gate_TI) * up_TI

    def in_one(self, halves: Sequence[Tensor]) -> Tensor:
        """As our kernel does it."""
        gate_TI, up_TI = halves[:: -1 if self.is_up_first else 1]
        if gate_TI.is_meta:
            return gate_TI * up_TI  # writes as many numbers
        multiply_activated = host_passes.multiply_activated
        if gate_TI.device.type != "cpu":
            from flexeval.engine.compute.gate_kernel import multiply_activated

        return multiply_activated(gate_TI, up_TI, self.activation)


class _Block(NamedTuple):
    """A block `down(activation(gate(x)) * up(x))`, by the names of its linear layers."""

    inner: Sequence[str]
    """Two that make a half each, or one that makes both."""
    down: str
    gate: _Gate


_GATES = [_Gate(activation, is_up_first) for activation in ACTIVATIONS for is_up_first in (False, True)]


def fuse_gates(model: nn.Module, fusion: Fusion) -> None:
    """Let the gated blocks of a model (Shazeer 2020), and its experts', run our kernel where they compute the same.

    It rounds where transformers does: after the activation, and after the product.
    """
    for module in model.modules():
        if hasattr(module, _APPLY_GATE):
            _fuse_experts(module, fusion)
        elif (block := _find_block(module)) is not None:
            _fuse_block(module, block, fusion)


def _fuse_block(module: nn.Module, block: _Block, fusion: Fusion) -> None:
    plain = module.forward
    gate, down = block.gate, module.get_submodule(block.down)
    inner = [module.get_submodule(name) for name in block.inner]

    def forward(*args: Tensor, **options: Tensor) -> Tensor:
        (x_TD,) = (*args, *options.values())
        if not fusion.applies(x_TD):
            return cast(Tensor, plain(x_TD))
        # halves have no names: they go before room is made for what the last matrix makes
        return cast(Tensor, down(gate.in_one(_halves([layer(x_TD) for layer in inner]))))

    module.forward = forward


def _fuse_experts(module: nn.Module, fusion: Fusion) -> None:
    plain: Callable[[Tensor], Tensor] = getattr(module, _APPLY_GATE)
    both_STI = numbers(2 * _INNER, Generator().manual_seed(0))
    theirs_STI = try_out(lambda: plain(both_STI))
    gate = next((gate for gate in _GATES if is_same(theirs_STI, gate.plainly(_halves([both_STI])))), None)
    if gate is None:
        return

    def apply_gate(both_TI: Tensor) -> Tensor:
        return gate.in_one(_halves([both_TI])) if fusion.applies(both_TI) else plain(both_TI)

    setattr(module, _APPLY_GATE, apply_gate)


def _find_block(module: nn.Module) -> _Block | None:
    """The gated block that a module is; None for one that is anything else."""
    linears = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
    weights = [f"{name}.{leaf}" for name, child in linears.items() for leaf, _ in child.named_parameters()]
    takes_one = len(inspect.signature(module.forward).parameters) == 1
    if len(linears) not in (2, 3) or weights != [name for name, _ in module.named_parameters()] or not takes_one:
        return None
    return next((block for down in linears for block in _blocks(module, weights, list(linears), down)), None)


def _blocks(module: nn.Module, names: Sequence[str], linears: Sequence[str], down: str) -> Iterator[_Block]:
    """The blocks that a module with weights of these names computes, if `down` is its last matrix."""
    inner, generator = [name for name in linears if name != down], Generator().manual_seed(0)
    shapes = dict.fromkeys(inner, (2 * _INNER // len(inner), _WIDTH)) | {down: (_WIDTH, _INNER)}
    x_STD = numbers(_WIDTH, generator)
    weights = {}
    for name in names:
        layer, _, leaf = name.rpartition(".")
        weights[name] = torch.randn(shapes[layer][: 2 if leaf == "weight" else 1], generator=generator)

    def project(name: str, x: Tensor) -> Tensor:
        return linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    theirs_STD = try_out(lambda: functional_call(module, weights, (x_STD,)))
    halves = _halves([project(name, x_STD) for name in inner])
    for gate in _GATES:
        if is_same(theirs_STD, project(down, gate.plainly(halves))):
            yield _Block(inner, down, gate)


def _halves(made: Sequence[Tensor]) -> Sequence[Tensor]:
    return made[0].chunk(2, dim=-1) if len(made) == 1 else made
