"""Activations in the pass of the product before them, instead of one to eight of their own.

Knows modules by what they compute; no family.

Shapes: S scales of random numbers, T tokens, D numbers of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Generator, Tensor, nn

from flexeval.engine.compute.fusion import Fusion
from flexeval.engine.compute.linear import Activation, CodedLinear
from flexeval.engine.compute.trying import ACTIVATIONS, is_same, numbers, try_out, watch

_WIDTH = 8


class Activated(NamedTuple):
    """A linear layer whose results go nowhere but into an activation, by the names of both."""

    linear: str
    function: str
    """The activation's name in the layer."""
    activation: str
    """What it computes."""


def find_activated(layer: nn.Module, without_memory: Callable[[], Callable[[], object]]) -> Sequence[Activated]:
    """Which activations of a decoder layer come right after a linear layer, and neither is called a second time.

    `without_memory` gives a call of the layer. A gated block has a kernel of its own.
    """
    activations = {
        f"{parent}.{name}".lstrip("."): kind
        for parent, module in layer.named_modules()
        if "forward" not in vars(module)
        for name, child in module.named_children()
        if (kind := _activation_of(child)) is not None
    }
    if not activations:
        return []
    calls = watch(layer, lambda: without_memory()())
    names = {module: name for name, module in layer.named_modules()}
    num_calls = Counter(names[call.module] for call in calls)
    made = [call for call in calls if isinstance(call.module, CodedLinear)]
    taken = [call for call in calls if names[call.module] in activations and len(call.args) == 1]
    pairs = [(names[one.module], names[other.module]) for one in made for other in taken if other.args[0] is one.out]
    return [
        Activated(linear, function, activations[function])
        for linear, function in pairs
        if num_calls[linear] == num_calls[function] == 1
    ]


def fuse_activated(layer: nn.Module, activated: Sequence[Activated], fusion: Fusion) -> None:
    """Let these linear layers activate what they make, and the activations hand on what they are given.

    A product of a GPU applies ReLU to what it is about to write; elsewhere numbers are overwritten in place.
    """
    for linear, function, activation in activated:
        module = layer.get_submodule(linear)
        assert isinstance(module, CodedLinear)
        module.activation = Activation(activation, fusion)
        layer.get_submodule(function).forward = _hand_on


def _hand_on(x: Tensor) -> Tensor:
    return x


def _activation_of(module: nn.Module) -> str | None:
    """What a module without anything of its own computes of one tensor, by the name of `ACTIVATIONS`."""
    if next(module.children(), None) is not None or module.state_dict(keep_vars=True):
        return None
    x_STD = numbers(_WIDTH, Generator().manual_seed(0))
    theirs_STD = try_out(lambda: module(x_STD))
    return next((name for name, ours in ACTIVATIONS.items() if is_same(theirs_STD, ours(x_STD))), None)
