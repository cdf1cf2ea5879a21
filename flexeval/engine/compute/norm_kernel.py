"""A Triton kernel for norms: numbers are read once and rounded once.

Needs Triton: import it only where a CUDA device computes.

Shapes: T tokens, or heads of tokens, D numbers that are normalized together.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_PROGRAM_NUMBERS = 2048
"""A program takes so many rows that it has about as many numbers."""
_WARP_NUMBERS = 1024
"""Of a long row, for each warp of its program."""


def normalize(
    x: Tensor, weight_D: Tensor, bias_D: Tensor | None, epsilon: float, *, is_centered: bool, offset: float = 0.0
) -> Tensor:
    """`x / rms(x) * (offset + weight) + bias`, of `x - mean(x)` where it is centered, `[..., D]`, in float32.

    An RMS norm (Zhang and Sennrich 2019) or, centered, a layer norm (Ba et al. 2016).
    """
    size = x.shape[-1]
    x_TD, out_TD = x.reshape(-1, size), x.new_empty(x.shape).view(-1, size)
    assert x_TD.stride(1) == weight_D.stride(0) == 1, (x_TD.stride(), weight_D.stride())
    room = triton.next_power_of_2(size)
    num_rows = max(1, _PROGRAM_NUMBERS // room)
    if out_TD.numel():
        _normalize_kernel[(triton.cdiv(len(x_TD), num_rows),)](
            x_TD,
            weight_D,
            bias_D,
            out_TD,
            len(x_TD),
            size,
            x_TD.stride(0),
            epsilon,
            offset,
            ROWS=num_rows,
            ROOM=room,
            IS_CENTERED=is_centered,
            HAS_BIAS=bias_D is not None,
            num_warps=min(16, max(4, room // _WARP_NUMBERS)),
        )
    return out_TD.view(x.shape)


@triton.jit(do_not_specialize=["num_rows"])
def _normalize_kernel(
    x,
    weight,
    bias,
    out,
    num_rows,
    size,
    stride,
    epsilon,
    offset,
    ROWS: tl.constexpr,
    ROOM: tl.constexpr,
    IS_CENTERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """A few rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, ROOM)
    is_place = place < size
    is_number = (row < num_rows)[:, None] & is_place[None, :]
    first = row.to(tl.int64)[:, None]
    numbers = tl.load(x + first * stride + place[None, :], mask=is_number, other=0.0).to(tl.float32)
    factor = tl.load(weight + place, mask=is_place, other=0.0).to(tl.float32) + offset
    if IS_CENTERED:
        numbers = tl.where(is_number, numbers - (tl.sum(numbers, 1) / size)[:, None], 0.0)
    made = numbers * tl.rsqrt(tl.sum(numbers * numbers, 1) / size + epsilon)[:, None] * factor[None, :]
    if HAS_BIAS:
        made += tl.load(bias + place, mask=is_place, other=0.0).to(tl.float32)[None, :]
    tl.store(out + first * size + place[None, :], made.to(out.dtype.element_ty), mask=is_number)
