"""Triton kernels for decode attention: one query a sequence over its tokens, read where and as they lie in a log.

Gathers nothing, masks nothing and repeats no KV head: every key and value is read once, coded where they are coded. The
context is split among programs where there are few sequences; the splits are merged by log-sum-exp (Flash-Decoding, Dao
et al. 2023). Needs Triton: import it only where a CUDA device computes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flexeval.engine.codecs.codes_kernel import codes_of, nibbles_of, numbers_of, part_of


@triton.jit
def decode_kernel(
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
    GROUP: tl.constexpr,
    ROOM: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """The query heads of one KV head of one sequence over one split of its context.

    Bytes that hold several codes are several parts of a key: its product with the query is the sum of theirs. Heads are
    the last dimension of all products: there are few of them, and a tensor core takes 8 there where it takes 16 before.
    """
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_kv_heads, num_splits = tl.num_programs(1), tl.num_programs(2)
    head = tl.arange(0, HEADS)
    is_head = head < HEADS_PER_KV
    query_head = kv_head * HEADS_PER_KV + head
    q += sequence * query_sequence_stride + query_head[None, :] * query_head_stride
    queries = _query_part(q, is_head, key_size, 0, KEY_SIZE, BITS, GROUP, ROOM)
    if BITS < 8:
        queries_1 = _query_part(q, is_head, key_size, 1, KEY_SIZE, BITS, GROUP, ROOM)
    if BITS < 4:
        queries_2 = _query_part(q, is_head, key_size, 2, KEY_SIZE, BITS, GROUP, ROOM)
        queries_3 = _query_part(q, is_head, key_size, 3, KEY_SIZE, BITS, GROUP, ROOM)
    length = tl.load(lengths + sequence)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0)
    per_split = tl.cdiv(length - first, num_splits)
    start = first + split * per_split
    stop = tl.minimum(start + per_split, length)
    key_place, value_place = tl.arange(0, KEY_SIZE), tl.arange(0, VALUE_SIZE)
    highest = tl.full((HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((VALUE_SIZE, HEADS), tl.float32)
    if BITS < 8:
        sums_1 = tl.zeros((VALUE_SIZE, HEADS), tl.float32)
    if BITS < 4:
        sums_2 = tl.zeros((VALUE_SIZE, HEADS), tl.float32)
        sums_3 = tl.zeros((VALUE_SIZE, HEADS), tl.float32)
    index += sequence.to(tl.int64) * index_stride
    ahead = start + tl.arange(0, TOKENS)
    place_ahead = tl.load(index + ahead, mask=ahead < stop, other=0)
    for block in range(start, stop, TOKENS):
        token = block + tl.arange(0, TOKENS)
        is_token = token < stop
        if GROUP == 1:
            place = tl.load(index + token, mask=is_token, other=0).to(tl.int64)
        else:  # nothing is loaded ahead by itself: what waits for memory goes first
            place = place_ahead.to(tl.int64)
            affine_base = place * affine_token_stride + kv_head * affine_head_stride
        base = place * token_stride + kv_head * head_stride
        if GROUP == 1:
            is_number = is_token[:, None] & (key_place < key_size)[None, :]
            block_keys = tl.load(keys + base[:, None] + key_place[None, :], mask=is_number, other=0.0)
            scores = tl.dot(block_keys, queries, input_precision="ieee")
        else:
            packed, steps, lows = codes_of(
                keys + base, key_affine + affine_base, is_token, key_size, KEY_SIZE, BITS, GROUP, ROOM
            )
            value_packed, value_steps, value_lows = codes_of(
                values + base, value_affine + affine_base, is_token, value_size, VALUE_SIZE, BITS, GROUP, ROOM
            )
            place_ahead = tl.load(index + token + TOKENS, mask=token + TOKENS < stop, other=0)
            if BITS == 4:
                low, high = nibbles_of(packed, steps, lows, queries.dtype)
                scores = _scores(queries, low, KEY_SIZE) + _scores(queries_1, high, KEY_SIZE)
            else:
                scores = _scores(queries, part_of(packed, steps, lows, 0, BITS, queries.dtype), KEY_SIZE)
            if BITS == 2:
                scores += _scores(queries_1, part_of(packed, steps, lows, 1, BITS, queries.dtype), KEY_SIZE)
                scores += _scores(queries_2, part_of(packed, steps, lows, 2, BITS, queries.dtype), KEY_SIZE)
                scores += _scores(queries_3, part_of(packed, steps, lows, 3, BITS, queries.dtype), KEY_SIZE)
        scores *= scale
        if HAS_SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(is_token[:, None], scores, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 0))
        shrink = tl.exp(highest - new_highest)
        weights = tl.exp(scores - new_highest[None, :])
        total = total * shrink + tl.sum(weights, 0)
        highest = new_highest
        weights = weights.to(queries.dtype)
        sums *= shrink[None, :]
        if BITS < 8:
            sums_1 *= shrink[None, :]
        if BITS < 4:
            sums_2 *= shrink[None, :]
            sums_3 *= shrink[None, :]
        if GROUP == 1:
            is_number = is_token[None, :] & (value_place < value_size)[:, None]
            block_values = tl.load(values + base[None, :] + value_place[:, None], mask=is_number, other=0.0)
            sums = tl.dot(block_values, weights, sums, input_precision="ieee")
        elif BITS == 4:
            low, high = nibbles_of(value_packed, value_steps, value_lows, queries.dtype)
            sums = _sums(weights, low, sums, VALUE_SIZE)
            sums_1 = _sums(weights, high, sums_1, VALUE_SIZE)
        else:
            part = part_of(value_packed, value_steps, value_lows, 0, BITS, queries.dtype)
            sums = _sums(weights, part, sums, VALUE_SIZE)
        if BITS == 2:
            part = part_of(value_packed, value_steps, value_lows, 1, BITS, queries.dtype)
            sums_1 = _sums(weights, part, sums_1, VALUE_SIZE)
            part = part_of(value_packed, value_steps, value_lows, 2, BITS, queries.dtype)
            sums_2 = _sums(weights, part, sums_2, VALUE_SIZE)
            part = part_of(value_packed, value_steps, value_lows, 3, BITS, queries.dtype)
            sums_3 = _sums(weights, part, sums_3, VALUE_SIZE)
    is_seen = total > 0.0
    divisor = tl.where(is_seen, total, 1.0)
    target = (sequence * num_kv_heads * HEADS_PER_KV + query_head) * num_splits + split
    tl.store(lse + target, tl.where(is_seen, highest + tl.log(divisor), -float("inf")), mask=is_head)
    out += target[None, :].to(tl.int64) * value_size
    _store_part(out, sums / divisor[None, :], is_head, value_size, 0, VALUE_SIZE, BITS, GROUP, ROOM)
    if BITS < 8:
        _store_part(out, sums_1 / divisor[None, :], is_head, value_size, 1, VALUE_SIZE, BITS, GROUP, ROOM)
    if BITS < 4:
        _store_part(out, sums_2 / divisor[None, :], is_head, value_size, 2, VALUE_SIZE, BITS, GROUP, ROOM)
        _store_part(out, sums_3 / divisor[None, :], is_head, value_size, 3, VALUE_SIZE, BITS, GROUP, ROOM)


@triton.jit
def _query_part(
    q,
    is_head,
    size,
    part: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROOM: tl.constexpr,
):
    """The numbers of queries that meet one part of the keys."""
    number, is_number = numbers_of(size, part, SIZE, BITS, GROUP, ROOM)
    return tl.load(q + number[:, None], mask=is_head[None, :] & is_number[:, None], other=0.0)


@triton.jit
def _scores(queries, part, SIZE: tl.constexpr):
    """A part of the keys, `[tokens, groups, ROOM]`, times queries."""
    return tl.dot(tl.reshape(part, (part.shape[0], SIZE)), queries, input_precision="ieee")


@triton.jit
def _sums(weights, part, sums, SIZE: tl.constexpr):
    """A part of the values, `[tokens, groups, ROOM]`, times weights."""
    return tl.dot(tl.trans(tl.reshape(part, (part.shape[0], SIZE))), weights, sums, input_precision="ieee")


@triton.jit
def _store_part(
    out,
    numbers,
    is_head,
    size,
    part: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROOM: tl.constexpr,
):
    number, is_number = numbers_of(size, part, SIZE, BITS, GROUP, ROOM)
    tl.store(out + number[:, None], numbers.to(out.dtype.element_ty), mask=is_head[None, :] & is_number[:, None])


@triton.jit
def merge_splits_kernel(
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
