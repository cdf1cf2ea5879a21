"""A Triton kernel that reads logits once, where torch writes a log-probability of every word.

Needs Triton: import it only where a CUDA device computes.

Shapes: R rows of logits, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 4096, 8
"""Logits that a row's program takes at a time."""


def log_sums(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp `[R]`, float32, and the first of the largest `[R]`, int64, of rows that may lie apart.

    Where a logit is no finite number, the sum is none; the largest is one of the row's all the same.
    """
    num_rows, vocab_size = logits_RV.shape
    assert logits_RV.stride(1) == 1, logits_RV.stride()
    lse_R = torch.empty(num_rows, dtype=torch.float32, device=logits_RV.device)
    best_R = torch.empty(num_rows, dtype=torch.int64, device=logits_RV.device)
    if num_rows:
        _log_sums_kernel[(num_rows,)](
            logits_RV, lse_R, best_R, vocab_size, logits_RV.stride(0), BLOCK=_BLOCK, num_warps=_WARPS
        )
    return lse_R, best_R


@triton.jit
def _log_sums_kernel(logits, lse, best, size, stride, BLOCK: tl.constexpr):
    """One row: every lane adds up for itself what it comes by (Milakov and Gimelshein 2018)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), -float("inf"), tl.float32)
    place = lane
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        word = first + lane
        x = tl.load(logits + row * stride + word, mask=word < size, other=-float("inf")).to(tl.float32)
        place = tl.where(x > highest, word, place)
        new_highest = tl.maximum(highest, x)
        base = tl.where(new_highest == -float("inf"), 0.0, new_highest)
        total = total * tl.exp(highest - base) + tl.exp(x - base)
        highest = new_highest
    top = tl.max(highest, 0)
    total = tl.sum(total * tl.exp(highest - top), 0)
    tl.store(lse + row, top + tl.log(total))
    # lanes past the vocabulary have seen nothing, and none is above all where none is a number
    first_best = tl.min(tl.where((highest == top) & (lane < size), place, size - 1), 0)
    tl.store(best + row, first_best.to(tl.int64))
