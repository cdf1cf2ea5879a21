"""A Triton kernel that merges attention over two parts of the keys: one launch, where torch takes five.

A step of few tokens is bound by launches. Needs Triton: import it only where a CUDA device computes.

Shapes: T tokens, N query heads, W size of a value.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def merge_into(out_TNW: Tensor, lse_TN: Tensor, other_out_TNW: Tensor, other_lse_TN: Tensor) -> None:
    """Merge attention over further keys into `out` (contiguous) and `lse`, in place."""
    num_tokens, num_heads, value_size = out_TNW.shape
    assert out_TNW.is_contiguous() and other_out_TNW.stride(2) == 1
    _merge_into_kernel[(num_tokens, num_heads)](
        out_TNW,
        lse_TN,
        other_out_TNW,
        other_lse_TN,
        value_size,
        *lse_TN.stride(),
        *other_out_TNW.stride()[:2],
        *other_lse_TN.stride(),
        VALUE_SIZE=triton.next_power_of_2(value_size),
    )


@triton.jit
def _merge_into_kernel(
    out,
    lse,
    other,
    other_lse,
    value_size,
    lse_token_stride,
    lse_head_stride,
    other_token_stride,
    other_head_stride,
    other_lse_token_stride,
    other_lse_head_stride,
    VALUE_SIZE: tl.constexpr,
):
    """One head of one token: out += (other - out) * sigmoid(other_lse - lse); lse = log(exp(lse) + exp(other_lse))."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own_lse = lse + token * lse_token_stride + head * lse_head_stride
    place = tl.arange(0, VALUE_SIZE)
    is_place = place < value_size
    old = tl.load(own_lse)
    new = tl.load(other_lse + token * other_lse_token_stride + head * other_lse_head_stride)
    highest = tl.maximum(old, new)
    is_seen = highest > -float("inf")
    old_weight = tl.where(is_seen, tl.exp(old - highest), 1.0)
    new_weight = tl.where(is_seen, tl.exp(new - highest), 0.0)
    total = old_weight + new_weight
    target = out + (token * tl.num_programs(1) + head) * value_size + place
    source = other + token * other_token_stride + head * other_head_stride + place
    old_values = tl.load(target, mask=is_place, other=0.0).to(tl.float32)
    new_values = tl.load(source, mask=is_place, other=0.0).to(tl.float32)
    merged = (old_values * old_weight + new_values * new_weight) / total
    tl.store(target, merged.to(out.dtype.element_ty), mask=is_place)
    tl.store(own_lse, tl.where(is_seen, highest + tl.log(total), -float("inf")))
