"""Triton kernels around the products of a mixture of experts: who meets whom, and what a token's experts make together.

One launch each, and one pass over wide tensors. Needs Triton: import it only where a CUDA device computes.

Shapes: T tokens, D model, C experts that a token chooses, S = T * C choices, X experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexeval.engine.codecs.coded import Route

_AT_ONCE, _COMPARED = 32, 256
"""Choices, and experts, that a program places; and those that it compares them with at a time."""
_WIDTH = 1024
"""Numbers of a token that a program adds up."""


def find_route(expert_S: Tensor, num_experts: int) -> Route:
    """The stable order of choices by expert, and where each expert's end: S * S comparisons, for small S."""
    order_S = torch.empty_like(expert_S)
    end_X = torch.empty(num_experts, dtype=torch.int32, device=expert_S.device)
    num_programs = triton.cdiv(max(len(expert_S), num_experts), _AT_ONCE)
    _route_kernel[(num_programs,)](
        expert_S, order_S, end_X, len(expert_S), num_experts, AT_ONCE=_AT_ONCE, COMPARED=_COMPARED
    )
    return Route(order_S, end_X)


def sum_choices(y_SD: Tensor, place_S: Tensor | None, weights_TC: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of each token's choices by their weights, `[T, D]`; products are rounded as torch rounds them.

    Args:
        y_SD: What each choice made.
        place_S: Where it lies in `y_SD`; None where that is in order.
        weights_TC: Their weights.
        dtype: Of the result.
    """
    num_tokens, num_choices = weights_TC.shape
    width = y_SD.shape[1]
    out_TD = torch.empty(num_tokens, width, dtype=dtype, device=y_SD.device)
    product_type = torch.promote_types(y_SD.dtype, weights_TC.dtype)
    _sum_kernel[(num_tokens, triton.cdiv(width, _WIDTH))](
        y_SD.contiguous(),
        place_S,
        weights_TC.contiguous(),
        out_TD,
        width,
        CHOICES=num_choices,
        IS_PLACED=place_S is not None,
        PRODUCT=getattr(tl, str(product_type).removeprefix("torch.")),
        BLOCK=_WIDTH,
    )
    return out_TD


@triton.jit
def _route_kernel(experts, order, ends, num_choices, num_experts, AT_ONCE: tl.constexpr, COMPARED: tl.constexpr):
    """Place some choices behind all of lower experts and earlier ones of their own; count some experts' and lower."""
    own = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    is_choice = own < num_choices
    expert = tl.load(experts + own, mask=is_choice, other=0)
    place = tl.zeros((AT_ONCE,), tl.int32)
    end = tl.zeros((AT_ONCE,), tl.int32)
    for first in range(0, num_choices, COMPARED):
        other = first + tl.arange(0, COMPARED)
        is_other = other < num_choices
        others = tl.load(experts + other, mask=is_other, other=0)
        is_before = (others[None, :] < expert[:, None]) | (
            (others[None, :] == expert[:, None]) & (other[None, :] < own[:, None])
        )
        place += tl.sum((is_before & is_other[None, :]).to(tl.int32), 1)
        end += tl.sum(((others[None, :] <= own[:, None]) & is_other[None, :]).to(tl.int32), 1)
    tl.store(order + place, own, mask=is_choice)
    tl.store(ends + own, end, mask=own < num_experts)


@triton.jit
def _sum_kernel(
    y,
    places,
    weights,
    out,
    width,
    CHOICES: tl.constexpr,
    IS_PLACED: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some numbers of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(CHOICES):
        row = token * CHOICES + choice
        weight = tl.load(weights + row).to(tl.float32)
        if IS_PLACED:
            row = tl.load(places + row)
        values = tl.load(y + row * width + column, mask=is_column, other=0.0).to(tl.float32)
        total += (values * weight).to(PRODUCT).to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=is_column)
