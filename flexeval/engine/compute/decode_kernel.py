"""Triton kernels for decode attention: one query a sequence over its tokens, read where they lie in a log.

Gathers nothing, masks nothing and repeats no KV head: every key and value is read once. The context is split among
programs where there are few sequences; the splits are merged by log-sum-exp (Flash-Decoding, Dao et al. 2023).
Needs Triton: import it only where a CUDA device computes.

Shapes: B sequences, N query heads, K KV heads, M = N / K of them to a KV head, C tokens of the log, S context,
Z splits, H size of a key, W size of a value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexeval.engine.compute.kernels import num_processors

_BLOCK_TOKENS = 64
"""Context tokens of one step of a program."""
_PROGRAMS_PER_PROCESSOR = 4
"""The context is split until about so many programs run on each multiprocessor."""


def decode_attention(
    q_BNH: Tensor,
    keys_CKH: Tensor,
    values_CKW: Tensor,
    index_BS: Tensor,
    lengths_B: Tensor,
    out_BNW: Tensor,
    lse_BN: Tensor,
    *,
    max_length: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Attention of one query per sequence over its own context.

    Args:
        q_BNH: Queries.
        keys_CKH: Keys of the log.
        values_CKW: Values of the log.
        index_BS: int32, place in the log of each context token.
        lengths_B: int32, how many of them are each sequence's.
        out_BNW: Contiguous; filled with the output.
        lse_BN: Contiguous float32; filled with the log-sum-exp of the scores.
        max_length: The largest of `lengths_B`, or more.
        scale: Factor on the scores.
        window: A query sees the last `window` tokens only.
        softcap: Scores become softcap * tanh(score / softcap).
    """
    num_sequences, num_heads, key_size = q_BNH.shape
    num_kv_heads, value_size = values_CKW.shape[1:]
    assert q_BNH.stride(2) == keys_CKH.stride(2) == values_CKW.stride(2) == index_BS.stride(1) == 1
    heads_per_kv = num_heads // num_kv_heads
    wanted = _PROGRAMS_PER_PROCESSOR * num_processors(q_BNH.device) // (num_sequences * num_kv_heads)
    num_splits = max(1, min(wanted, triton.cdiv(max_length, 4 * _BLOCK_TOKENS)))
    assert out_BNW.is_contiguous() and lse_BN.is_contiguous()
    out_BNZW, lse_BNZ = out_BNW, lse_BN
    if num_splits > 1:
        out_BNZW = q_BNH.new_empty(num_sequences, num_heads, num_splits, value_size, dtype=torch.float32)
        lse_BNZ = q_BNH.new_empty(num_sequences, num_heads, num_splits, dtype=torch.float32)
    _decode_kernel[(num_sequences, num_kv_heads, num_splits)](
        q_BNH,
        keys_CKH,
        values_CKW,
        index_BS,
        lengths_B,
        out_BNZW,
        lse_BNZ,
        scale,
        window or 0,
        softcap or 0.0,
        key_size,
        value_size,
        *q_BNH.stride()[:2],
        *keys_CKH.stride()[:2],
        *values_CKW.stride()[:2],
        index_BS.stride(0),
        HEADS_PER_KV=heads_per_kv,
        HEADS=max(16, triton.next_power_of_2(heads_per_kv)),
        KEY_SIZE=triton.next_power_of_2(max(16, key_size)),
        VALUE_SIZE=triton.next_power_of_2(max(16, value_size)),
        TOKENS=_BLOCK_TOKENS if q_BNH.element_size() == 2 else _BLOCK_TOKENS // 2,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        num_warps=4,
        num_stages=2,
    )
    if num_splits > 1:
        _merge_splits_kernel[(num_sequences * num_heads,)](
            out_BNZW,
            lse_BNZ,
            out_BNW,
            lse_BN,
            num_splits,
            value_size,
            SPLITS=triton.next_power_of_2(num_splits),
            VALUE_SIZE=triton.next_power_of_2(value_size),
        )


@triton.jit
def _decode_kernel(
    q,
    keys,
    values,
    index,
    lengths,
    out,
    lse,
    scale,
    window,
    softcap,
    key_size,
    value_size,
    query_sequence_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    index_stride,
    HEADS_PER_KV: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """The query heads of one KV head of one sequence over one split of its context."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_kv_heads, num_splits = tl.num_programs(1), tl.num_programs(2)
    head = tl.arange(0, HEADS)
    key_place = tl.arange(0, KEY_SIZE)
    value_place = tl.arange(0, VALUE_SIZE)
    is_head = head < HEADS_PER_KV
    query_head = kv_head * HEADS_PER_KV + head
    queries = tl.load(
        q + sequence * query_sequence_stride + query_head[:, None] * query_head_stride + key_place[None, :],
        mask=is_head[:, None] & (key_place < key_size)[None, :],
        other=0.0,
    )
    length = tl.load(lengths + sequence)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0)
    per_split = tl.cdiv(length - first, num_splits)
    start = first + split * per_split
    stop = tl.minimum(start + per_split, length)
    highest = tl.full((HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((HEADS, VALUE_SIZE), tl.float32)
    for block in range(start, stop, TOKENS):
        token = block + tl.arange(0, TOKENS)
        is_token = token < stop
        place = tl.load(index + sequence.to(tl.int64) * index_stride + token, mask=is_token, other=0).to(tl.int64)
        key_base = place * key_token_stride + kv_head * key_head_stride
        value_base = place * value_token_stride + kv_head * value_head_stride
        block_keys = tl.load(
            keys + key_base[None, :] + key_place[:, None],
            mask=is_token[None, :] & (key_place < key_size)[:, None],
            other=0.0,
        )
        scores = tl.dot(queries, block_keys, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(is_token[None, :], scores, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp(highest - new_highest)
        weights = tl.exp(scores - new_highest[:, None])
        block_values = tl.load(
            values + value_base[:, None] + value_place[None, :],
            mask=is_token[:, None] & (value_place < value_size)[None, :],
            other=0.0,
        )
        sums = sums * shrink[:, None]
        sums = tl.dot(weights.to(block_values.dtype), block_values, sums, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        highest = new_highest
    is_seen = total > 0.0
    divisor = tl.where(is_seen, total, 1.0)
    target = (sequence * num_kv_heads * HEADS_PER_KV + query_head) * num_splits + split
    tl.store(lse + target, tl.where(is_seen, highest + tl.log(divisor), -float("inf")), mask=is_head)
    tl.store(
        out + target[:, None].to(tl.int64) * value_size + value_place[None, :],
        (sums / divisor[:, None]).to(out.dtype.element_ty),
        mask=is_head[:, None] & (value_place < value_size)[None, :],
    )


@triton.jit
def _merge_splits_kernel(
    parts, part_lse, out, lse, num_splits, value_size, SPLITS: tl.constexpr, VALUE_SIZE: tl.constexpr
):
    """The splits of one query head of one sequence: their outputs averaged with weights exp(lse)."""
    head = tl.program_id(0)
    split, place = tl.arange(0, SPLITS), tl.arange(0, VALUE_SIZE)
    is_split, is_place = split < num_splits, place < value_size
    scores = tl.load(part_lse + head * num_splits + split, mask=is_split, other=-float("inf"))
    highest = tl.max(scores, 0)
    weights = tl.where(scores > -float("inf"), tl.exp(scores - highest), 0.0)
    total = tl.sum(weights, 0)
    divisor = tl.where(total > 0.0, total, 1.0)
    source = parts + (head * num_splits + split)[:, None].to(tl.int64) * value_size + place[None, :]
    values = tl.load(source, mask=is_split[:, None] & is_place[None, :], other=0.0)
    merged = tl.sum(values * weights[:, None], 0) / divisor
    tl.store(out + head.to(tl.int64) * value_size + place, merged.to(out.dtype.element_ty), mask=is_place)
    tl.store(lse + head, tl.where(total > 0.0, highest + tl.log(divisor), -float("inf")))
