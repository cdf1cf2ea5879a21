"""A Triton kernel that rotates queries or keys by their positions: one launch, where torch takes five and a copy each.

Needs Triton: import it only where a CUDA device computes.

Shapes: N heads, T tokens, H size of a head.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def rotate(x_1NTH: Tensor, cos_1TH: Tensor, sin_1TH: Tensor) -> Tensor:
    """`x * cos + rotate_half(x) * sin`, computed in float32 and rounded once; as tokens lie in a row."""
    _, num_heads, num_tokens, size = x_1NTH.shape
    out_1TNH = x_1NTH.new_empty(1, num_tokens, num_heads, size)
    _rotate_kernel[(num_tokens,)](
        x_1NTH,
        cos_1TH,
        sin_1TH,
        out_1TNH,
        num_heads,
        size // 2,
        x_1NTH.stride(2),
        x_1NTH.stride(1),
        cos_1TH.stride(1),
        sin_1TH.stride(1),
        HEADS=triton.next_power_of_2(num_heads),
        HALF=triton.next_power_of_2(size // 2),
    )
    return out_1TNH.transpose(1, 2)


@triton.jit
def _rotate_kernel(
    x,
    cos,
    sin,
    out,
    num_heads,
    half,
    token_stride,
    head_stride,
    cos_stride,
    sin_stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """All heads of one token: each pair of numbers, half a head apart, turns by its angle."""
    token = tl.program_id(0).to(tl.int64)
    head, place = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    is_half = place < half
    is_place = (head < num_heads) & is_half
    source = x + token * token_stride + head * head_stride + place
    first = tl.load(source, mask=is_place, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=is_place, other=0.0).to(tl.float32)
    cosines, sines = cos + token * cos_stride + place, sin + token * sin_stride + place
    first_cos = tl.load(cosines, mask=is_half, other=0.0).to(tl.float32)
    second_cos = tl.load(cosines + half, mask=is_half, other=0.0).to(tl.float32)
    first_sin = tl.load(sines, mask=is_half, other=0.0).to(tl.float32)
    second_sin = tl.load(sines + half, mask=is_half, other=0.0).to(tl.float32)
    target = out + (token * num_heads + head) * (2 * half) + place
    tl.store(target, (first * first_cos - second * first_sin).to(out.dtype.element_ty), mask=is_place)
    tl.store(target + half, (second * second_cos + first * second_sin).to(out.dtype.element_ty), mask=is_place)
