"""Triton kernels for decode attention: one query a sequence over its tokens, read where and as they lie in a log.

Gathers nothing, masks nothing and repeats no KV head: every key and value is read once, coded where they are coded. The
context is split among programs where there are few sequences; the splits are merged by log-sum-exp (Flash-Decoding, Dao
et al. 2023). Needs Triton: import it only where a CUDA device computes.

Shapes: B sequences, N query heads, K KV heads, M = N / K of them to a KV head, S context, Z splits, H size of a key,
W size of a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexeval.engine.codecs.kv_format import CodedFormat, KVLog, PlainFormat
from flexeval.engine.codecs.pack_kernel import places_of, unpacked
from flexeval.engine.kernels import num_processors

_BLOCK_TOKENS = 64
"""Context tokens of one step of a program."""
_PROGRAMS_PER_PROCESSOR = 4
"""The context is split until about so many programs run on each multiprocessor."""


def decode_attention(
    q_BNH: Tensor,
    log: KVLog,
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
        log: Keys and values.
        index_BS: int32, place in the log of each context token.
        lengths_B: int32, how many of them are each sequence's.
        out_BNW: Contiguous; filled with the output.
        lse_BN: Contiguous float32; filled with the log-sum-exp of the scores.
        max_length: The largest of `lengths_B`, or more.
        scale: Factor on the scores.
        window: A query sees the last `window` tokens only.
        softcap: Scores become softcap * tanh(score / softcap).
    """
    num_sequences, num_heads, _ = q_BNH.shape
    num_kv_heads, key_size, value_size = log.format.shape
    assert q_BNH.stride(2) == index_BS.stride(1) == 1
    heads_per_kv = num_heads // num_kv_heads
    wanted = _PROGRAMS_PER_PROCESSOR * num_processors(q_BNH.device) // (num_sequences * num_kv_heads)
    num_splits = max(1, min(wanted, triton.cdiv(max_length, 4 * _BLOCK_TOKENS)))
    assert out_BNW.is_contiguous() and lse_BN.is_contiguous()
    out_BNZW, lse_BNZ = out_BNW, lse_BN
    if num_splits > 1:
        out_BNZW = q_BNH.new_empty(num_sequences, num_heads, num_splits, value_size, dtype=torch.float32)
        lse_BNZ = q_BNH.new_empty(num_sequences, num_heads, num_splits, dtype=torch.float32)
    source = _source(log)
    _decode_kernel[(num_sequences, num_kv_heads, num_splits)](
        q_BNH,
        *source.tensors,
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
        *source.strides,
        index_BS.stride(0),
        HEADS_PER_KV=heads_per_kv,
        HEADS=max(16, triton.next_power_of_2(heads_per_kv)),
        KEY_SIZE=_padded(key_size, source.group_size),
        VALUE_SIZE=_padded(value_size, source.group_size),
        BITS=source.bits,
        GROUP_SIZE=source.group_size,
        GROUP_ROOM=triton.next_power_of_2(source.group_size),
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


class _Source(NamedTuple):
    """What the kernel reads keys and values from."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    """Keys and values, or their codes; scales and minima of each."""
    strides: tuple[int, int, int, int]
    """From token to token and from head to head: of the first two tensors, and of the last two."""
    bits: int
    """Of a code; 0 where there are none."""
    group_size: int
    """Numbers that share a scale; 1 where there are none."""


def _source(log: KVLog) -> _Source:
    num_heads, key_size, value_size = log.format.shape
    if isinstance(log.format, PlainFormat):
        keys, values = log.format.views(log.data_CB)
        token_stride, head_stride, _ = keys.stride()
        return _Source((keys, values, keys, values), (token_stride, head_stride, 0, 0), 0, 1)
    assert isinstance(log.format, CodedFormat)
    codec, data_CB = log.format.codec, log.data_CB
    codes = codec.num_code_bytes(log.format.shape.num_values)
    affine = data_CB[:, codes:].view(torch.float16)
    head_bytes, head_groups = codes // num_heads, (key_size + value_size) // codec.group_size
    return _Source(
        (
            data_CB,
            data_CB[:, codec.num_code_bytes(key_size) :],
            affine,
            affine[:, 2 * key_size // codec.group_size :],
        ),
        (data_CB.stride(0), head_bytes, affine.stride(0), 2 * head_groups),
        codec.bits,
        codec.group_size,
    )


def _padded(size: int, group_size: int) -> int:
    """Numbers of a key or value in a program: where there are groups, a power of two of them and of numbers in each."""
    least = 16  # of a product on tensor cores
    num_groups, in_group = triton.next_power_of_2(size // group_size), triton.next_power_of_2(group_size)
    return int(max(num_groups, triton.cdiv(least, in_group)) * in_group)


@triton.jit
def _decode_kernel(
    q,
    keys,
    values,
    key_affine,
    value_affine,
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
    token_stride,
    head_stride,
    affine_token_stride,
    affine_head_stride,
    index_stride,
    HEADS_PER_KV: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_ROOM: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """The query heads of one KV head of one sequence over one split of its context."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_kv_heads, num_splits = tl.num_programs(1), tl.num_programs(2)
    head = tl.arange(0, HEADS)
    key_place, is_key = places_of(key_size, KEY_SIZE, BITS, GROUP_SIZE, GROUP_ROOM)
    value_place, is_value = places_of(value_size, VALUE_SIZE, BITS, GROUP_SIZE, GROUP_ROOM)
    is_head = head < HEADS_PER_KV
    query_head = kv_head * HEADS_PER_KV + head
    queries = tl.load(
        q + sequence * query_sequence_stride + query_head[:, None] * query_head_stride + key_place[None, :],
        mask=is_head[:, None] & is_key[None, :],
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
        base = place * token_stride + kv_head * head_stride
        affine_base = place * affine_token_stride + kv_head * affine_head_stride
        if BITS == 0:
            block_keys = tl.load(
                keys + base[None, :] + key_place[:, None], mask=is_token[None, :] & is_key[:, None], other=0.0
            )
        else:
            block_keys = tl.trans(
                unpacked(
                    keys + base,
                    key_affine + affine_base,
                    is_token,
                    key_size,
                    KEY_SIZE,
                    BITS,
                    GROUP_SIZE,
                    GROUP_ROOM,
                    TOKENS,
                ).to(queries.dtype)
            )
        scores = tl.dot(queries, block_keys, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(is_token[None, :], scores, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp(highest - new_highest)
        weights = tl.exp(scores - new_highest[:, None])
        if BITS == 0:
            block_values = tl.load(
                values + base[:, None] + value_place[None, :], mask=is_token[:, None] & is_value[None, :], other=0.0
            )
        else:
            block_values = unpacked(
                values + base,
                value_affine + affine_base,
                is_token,
                value_size,
                VALUE_SIZE,
                BITS,
                GROUP_SIZE,
                GROUP_ROOM,
                TOKENS,
            ).to(queries.dtype)
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
        mask=is_head[:, None] & is_value[None, :],
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
