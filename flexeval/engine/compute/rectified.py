"""Biased products that rectify what they make in the same launch, on a GPU. Knows modules by what they compute.

A product's own launch does it for nothing (an epilogue of cuBLASLt); a ReLU's reads and writes the widest tensor of a
layer again. Which products these are is seen by calling the layers without memory, so no family is named.

Shapes: T tokens, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.fusion import Fusion
from flexeval.engine.compute.linear import CodedLinear
from flexeval.engine.compute.port import AttentionOptions

_TYPES = (torch.float16, torch.bfloat16)
"""Of these, results are those of a product and a ReLU after it, to the last bit."""
_MARK = "_flexeval_is_rectified"
"""On a tensor that is rectified already. Whatever is made of it is another tensor, without the mark."""


def fuse_relus(anatomy: Anatomy) -> None:
    """Let products of a model rectify what they make, where one ReLU takes it and nothing else does."""
    relus = {
        layer: [module for module in anatomy.layers[layer].modules() if _is_relu(module)]
        for layer, experts in enumerate(anatomy.experts)
        if experts is None
    }
    if not any(relus.values()):
        return
    ids_1T = torch.zeros(1, 2, dtype=torch.long, device="meta")
    embedded = anatomy.embed(ids_1T, torch.arange(2, device="meta")[None])
    for layer, rectifiers in relus.items():
        linears = [module for module in anatomy.layers[layer].modules() if isinstance(module, CodedLinear)]

        def run(layer: int = layer) -> object:
            return anatomy.run_layer(layer, embedded.hidden_1TD, embedded.calls[layer], _attend)

        with torch.inference_mode():
            pairs = _find_pairs(linears, rectifiers, run)
        for linear, rectifier in pairs:
            _fuse(linear, rectifier, anatomy.fusion)


def _attend(q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions) -> Tensor:
    return v_TKW.new_empty(q_TNH.shape[0], q_TNH.shape[1], v_TKW.shape[-1])


def _is_relu(module: nn.Module) -> bool:
    """Whether a module is a ReLU and nothing else, by numbers of all sizes."""
    if module.state_dict(keep_vars=True) or any(module.children()):
        return False
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 64)
    try:
        return torch.equal(module(x.clone()), relu(x))
    except Exception:  # a module of another kind wants other arguments
        return False


def _find_pairs(
    linears: Iterable[CodedLinear], rectifiers: Iterable[nn.Module], run: Callable[[], object]
) -> list[tuple[CodedLinear, nn.Module]]:
    """Biased linear layers that `run` calls once, each with the rectifier that alone takes its result."""
    watch = _Watch()
    hooks = [linear.register_forward_hook(watch.note_made) for linear in linears if linear.bias is not None]
    for rectifier in rectifiers:
        hooks.append(rectifier.register_forward_pre_hook(watch.note_begun))
        hooks.append(rectifier.register_forward_hook(watch.note_ended))
    try:
        with watch:
            returned = tree_leaves(run())
    except Exception:  # a layer that cannot be called without memory stays as it is
        return []
    finally:
        for hook in hooks:
            hook.remove()
    called = [linear for linear, _ in watch.made]
    return [
        (linear, taker)
        for (linear, made), takers in zip(watch.made, watch.takers, strict=True)
        if called.count(linear) == len(takers) == 1
        and (taker := takers[0]) is not None
        and not any(tensor is made for tensor in returned)
    ]


class _Watch(TorchDispatchMode):
    """Sees what takes the results of linear layers, as long as it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[tuple[CodedLinear, Tensor]] = []
        """Calls and their results."""
        self.takers: list[list[nn.Module | None]] = []
        """For each call, of each operation that took its result the rectifier it is in."""
        self._begun: nn.Module | None = None

    def note_made(self, linear: CodedLinear, args: Any, out: Tensor) -> None:
        """A linear layer was called."""
        self.made.append((linear, out))
        self.takers.append([])

    def note_begun(self, rectifier: nn.Module, args: Any) -> None:
        """What follows is in a rectifier."""
        self._begun = rectifier

    def note_ended(self, rectifier: nn.Module, args: Any, out: Any) -> None:
        """What follows is not."""
        self._begun = None

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        taken = tree_leaves((args, kwargs))
        for (_, made), takers in zip(self.made, self.takers, strict=True):
            takers += [self._begun for tensor in taken if tensor is made]
        return operation(*args, **(kwargs or {}))


def _fuse(linear: CodedLinear, rectifier: nn.Module, fusion: Fusion) -> None:
    plain = rectifier.forward

    def multiply(x: Tensor) -> Tensor:
        if not fusion.applies(x) or linear.coded is not None or x.dtype not in _TYPES:
            return CodedLinear.forward(linear, x)
        if x.is_meta:
            out = CodedLinear.forward(linear, x)
        else:
            out_TO = torch._addmm_activation(linear.bias, x.reshape(-1, x.shape[-1]), linear.weight.T)
            out = out_TO.view(*x.shape[:-1], linear.out_features)
        setattr(out, _MARK, True)
        return out

    def rectify(x: Tensor) -> Tensor:
        return x if getattr(x, _MARK, False) else plain(x)

    linear.forward, rectifier.forward = multiply, rectify  # type: ignore[method-assign]
