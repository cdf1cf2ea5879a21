"""What a piece of a model computes, found by trying it on random numbers, and what it calls. Knows no family.

Shapes: S scales of random numbers, T tokens, D numbers of each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import gelu, relu, silu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "gelu": gelu,
    "relu": relu,
}
"""Those that we know, by the names that kernels have for them."""
_SCALES = (1.0, 1e2, 1e6)
"""Of random numbers: large ones find what is clamped."""
_TOLERANCE = 1e-5
"""Of a token's largest number, in float32: what computes anything else is farther away."""


class Call(NamedTuple):
    """A module that was called."""

    module: nn.Module
    args: tuple[Any, ...]
    """Without those that were named."""
    out: Any


def watch(root: nn.Module, run: Callable[[], object]) -> list[Call]:
    """The calls of modules under `root` while `run` runs, in the order in which they end; none where that fails.

    A family that cannot run here fails: whoever runs it says so.
    """
    calls: list[Call] = []
    hooks = [
        module.register_forward_hook(lambda module, args, out: calls.append(Call(module, args, out)))
        for module in root.modules()
        if module is not root
    ]
    try:
        run()
    except Exception:
        return []
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def numbers(size: int, generator: Generator) -> Tensor:
    """`[S, T, size]`."""
    return torch.randn(len(_SCALES), 4, size, generator=generator) * torch.tensor(_SCALES)[:, None, None]


def try_out(compute: Callable[[], Any]) -> Tensor | None:
    """What a module makes of random numbers; None where it is no tensor with numbers."""
    try:
        out = compute()
    except Exception:  # a module that is something else wants other shapes, or arguments, or its own numbers
        return None
    return out if isinstance(out, Tensor) and not out.is_meta else None


def is_same(theirs_STD: Tensor | None, ours_STD: Tensor) -> bool:
    """Whether both are the same function's, as far as float32 can tell."""
    if theirs_STD is None or theirs_STD.shape != ours_STD.shape:
        return False
    return bool(((theirs_STD - ours_STD).abs().amax(-1) <= _TOLERANCE * theirs_STD.abs().amax(-1)).all())
