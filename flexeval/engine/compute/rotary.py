"""Rotary positions in one pass instead of a dozen. Knows a function by what it computes; no family.

Shapes: N query heads, K KV heads, T tokens, H size of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from flexeval.engine.compute import host_passes
from flexeval.engine.compute.fusion import Fusion

_NAME = "apply_rotary_pos_emb"
"""What transformers calls it, in the file of each family."""
_TOLERANCE = 1e-6
Rotate = Callable[..., tuple[Tensor, Tensor]]


def fuse_rotary(root: nn.Module, fusion: Fusion) -> None:
    """Let the attention modules under `root` rotate by our kernel where theirs does the same (Su et al. 2021).

    Only these modules call it: transformers stays as it is. The kernel rounds once, transformers three times: in 16
    bits results differ by a rounding.
    """
    fused: dict[FunctionType, FunctionType] = {}
    for module in root.modules():
        forward = inspect.unwrap(type(module).forward)
        if isinstance(forward, FunctionType) and _NAME in forward.__code__.co_names:
            theirs = forward.__globals__.get(_NAME)
            if theirs is not None and _rotates_halves(theirs):
                if forward not in fused:
                    fused[forward] = _calling_ours(forward, theirs, fusion)
                module.forward = MethodType(fused[forward], module)


@cache
def _rotates_halves(theirs: Rotate) -> bool:
    """Whether a function turns the halves of a head, and takes what transformers' usual one takes."""
    generator = torch.Generator().manual_seed(0)
    q_1NTH, k_1KTH = (torch.randn(1, heads, 5, 8, generator=generator) for heads in (4, 2))
    cos_1TH, sin_1TH = torch.randn(2, 1, 5, 8, generator=generator)
    try:
        rotated = theirs(q_1NTH, k_1KTH, cos_1TH, sin_1TH)
    except (RuntimeError, TypeError):  # it wants other shapes
        return False
    return all(
        torch.allclose(their, _rotate(x, cos_1TH, sin_1TH), rtol=_TOLERANCE, atol=_TOLERANCE)
        for their, x in zip(rotated, (q_1NTH, k_1KTH), strict=True)
    )


def _rotate(x_1NTH: Tensor, cos_1TH: Tensor, sin_1TH: Tensor) -> Tensor:
    first, second = x_1NTH.chunk(2, dim=-1)
    return x_1NTH * cos_1TH[:, None] + torch.cat([-second, first], dim=-1) * sin_1TH[:, None]


def _calling_ours(forward: FunctionType, theirs: Rotate, fusion: Fusion) -> FunctionType:
    """The same function, for which the name stands for ours."""

    def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if args or options or not (fusion.applies(q) and _fits(q, cos, sin) and _fits(k, cos, sin)):
            return theirs(q, k, cos, sin, *args, **options)
        if q.is_meta:
            return q.clone(), k.clone()  # writes as many numbers
        rotate = host_passes.rotate
        if q.device.type != "cpu":
            from flexeval.engine.compute.rotary_kernel import rotate

        return rotate(q, cos, sin), rotate(k, cos, sin)

    copy = FunctionType(
        forward.__code__,
        forward.__globals__ | {_NAME: ours},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _fits(x_1NTH: Tensor, cos_1TH: Tensor, sin_1TH: Tensor) -> bool:
    """Whether the kernel can do it: a packed row, all of a head rotated."""
    shape = (1, x_1NTH.shape[2], x_1NTH.shape[3])
    return (
        x_1NTH.shape[0] == 1
        and cos_1TH.shape == sin_1TH.shape == shape
        and x_1NTH.shape[-1] % 2 == 0
        and x_1NTH.dtype == cos_1TH.dtype == sin_1TH.dtype
        and all(tensor.stride(-1) == 1 for tensor in (x_1NTH, cos_1TH, sin_1TH))
    )
