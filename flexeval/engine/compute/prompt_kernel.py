"""A Triton kernel for many queries over the same keys: prompts, and what their tokens see before them.

Online softmax over blocks of keys (FlashAttention-2, Dao 2023). It has what torch's lacks: soft caps, windows, and keys
and values of unlike sizes; and a program for every block of queries there is, in whichever run, the longest first.
Needs Triton: import it only where a CUDA device computes.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_position"])
def prompt_kernel(
    q,
    keys,
    values,
    blocks,
    positions,
    out,
    lse,
    num_queries,
    num_keys,
    first_position,
    scale,
    softcap,
    window,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    HEADS_PER_KV: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    KEY_MAIN: tl.constexpr,
    KEY_REST: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_ROOM: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """A block of queries, one head: of a run, causally over the run's own keys (`blocks`), or of all over all keys.

    The numbers of a key are two powers of two, of which the second is filled up with zeros.
    """
    block, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if IS_CAUSAL:
        start, stop = tl.load(blocks + 3 * block), tl.load(blocks + 3 * block + 1)
        first = tl.load(blocks + 3 * block + 2) - start
        num_queries, num_keys = stop - start, stop - start
    else:
        start, first = 0, block * QUERIES
    step = first + tl.arange(0, QUERIES)
    is_query = step < num_queries
    token = (start + step).to(tl.int64)
    q += token[:, None] * query_token_stride + head * query_head_stride
    queries = _load(q, is_query, 0, KEY_SIZE, KEY_MAIN)
    rest = queries
    if KEY_REST > 0:
        rest = _load(q, is_query, KEY_MAIN, KEY_SIZE, KEY_REST)
    if IS_CAUSAL:
        keys += start.to(tl.int64) * key_token_stride
        values += start.to(tl.int64) * value_token_stride
    keys += head // HEADS_PER_KV * key_head_stride
    values += head // HEADS_PER_KV * value_head_stride
    begin, end = 0, num_keys
    whole = num_keys // KEYS * KEYS
    if IS_CAUSAL:
        end = tl.minimum(first + QUERIES, num_keys)
        whole = first // KEYS * KEYS
        if HAS_WINDOW:
            begin = tl.maximum(first + 1 - window, 0) // KEYS * KEYS
    elif HAS_WINDOW:
        step = tl.load(positions + token, mask=is_query, other=0).to(tl.int32) - first_position
    if HAS_WINDOW:
        whole = begin
    state = (
        tl.full((QUERIES,), -float("inf"), tl.float32),
        tl.zeros((QUERIES,), tl.float32),
        tl.zeros((QUERIES, VALUE_ROOM), tl.float32),
    )
    scale *= _LOG2_E  # for powers of two
    for key in range(begin, whole, KEYS):
        scores = _scores(
            queries, rest, keys, key, num_keys, key_token_stride, KEY_SIZE, KEY_MAIN, KEY_REST, KEYS, IS_WHOLE=True
        )
        scores = _scaled(scores, scale, softcap, HAS_SOFTCAP)
        state = _add(scores, state, values, key, num_keys, value_token_stride, VALUE_SIZE, KEYS, IS_WHOLE=True)
    for key in range(whole, end, KEYS):
        scores = _scores(
            queries, rest, keys, key, num_keys, key_token_stride, KEY_SIZE, KEY_MAIN, KEY_REST, KEYS, IS_WHOLE=False
        )
        scores = _scaled(scores, scale, softcap, HAS_SOFTCAP)
        seen = key + tl.arange(0, KEYS)
        is_seen = (seen < num_keys)[None, :]
        if IS_CAUSAL:
            is_seen = is_seen & (seen[None, :] <= step[:, None])
        if HAS_WINDOW:
            is_seen = is_seen & (step[:, None] - seen[None, :] < window)
        scores = tl.where(is_seen, scores, -float("inf"))
        state = _add(scores, state, values, key, num_keys, value_token_stride, VALUE_SIZE, KEYS, IS_WHOLE=False)
    highest, total, sums = state
    is_seen = total > 0.0
    divisor = tl.where(is_seen, total, 1.0)
    number = token * num_heads + head
    log_total = (highest + tl.log2(divisor)) * _LN_2
    tl.store(lse + number, tl.where(is_seen, log_total, -float("inf")), mask=is_query)
    place = tl.arange(0, VALUE_ROOM)
    made = (sums / divisor[:, None]).to(out.dtype.element_ty)
    is_number = is_query[:, None] & (place < VALUE_SIZE)[None, :]
    tl.store(out + number[:, None] * VALUE_SIZE + place[None, :], made, mask=is_number)


@triton.jit
def _scores(
    queries,
    rest,
    keys,
    key,
    num_keys,
    stride,
    SIZE: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Products `[queries, keys]` with the block of keys that begins at `key`."""
    seen = key + tl.arange(0, KEYS)
    rows, is_row = keys + seen[:, None].to(tl.int64) * stride, seen < num_keys
    scores = tl.dot(queries, tl.trans(_load_block(rows, is_row, 0, SIZE, MAIN, IS_WHOLE)))
    if REST > 0:
        scores = tl.dot(rest, tl.trans(_load_block(rows, is_row, MAIN, SIZE, REST, IS_WHOLE)), scores)
    return scores


@triton.jit
def _scaled(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores for powers of two, capped where they are."""
    if HAS_SOFTCAP:
        scores = (softcap * _LOG2_E) * (2.0 * tl.sigmoid(scores * (2.0 * scale * _LN_2 / softcap)) - 1.0)
    else:
        scores *= scale
    return scores


@triton.jit
def _add(scores, state, values, key, num_keys, stride, SIZE: tl.constexpr, KEYS: tl.constexpr, IS_WHOLE: tl.constexpr):
    """The highest score of each query, its sum of powers and of values, with a further block of keys."""
    highest, total, sums = state
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    base = new_highest
    if not IS_WHOLE:  # a query may have seen no key yet
        base = tl.where(new_highest == -float("inf"), 0.0, new_highest)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(highest - base)
    seen = key + tl.arange(0, KEYS)
    rows = values + seen[:, None].to(tl.int64) * stride
    block = _load_block(rows, seen < num_keys, 0, SIZE, sums.shape[1], IS_WHOLE)
    sums = tl.dot(weights.to(block.dtype), block, sums * shrink[:, None])
    return new_highest, total * shrink + tl.sum(weights, 1), sums


@triton.jit
def _load_block(rows, is_row, FIRST: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr, IS_WHOLE: tl.constexpr):
    """As `_load`; asks for nothing where all of it is there."""
    place = FIRST + tl.arange(0, ROOM)
    if not IS_WHOLE:
        numbers = _load(rows, is_row, FIRST, SIZE, ROOM)
    elif FIRST + ROOM > SIZE:
        numbers = tl.load(rows + place[None, :], mask=(place < SIZE)[None, :], other=0.0)
    else:
        numbers = tl.load(rows + place[None, :])
    return numbers


@triton.jit
def _load(rows, is_row, FIRST: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr):
    """`ROOM` numbers from `FIRST` on of the rows that are there, zeros past `SIZE`."""
    place = FIRST + tl.arange(0, ROOM)
    return tl.load(rows + place[None, :], mask=is_row[:, None] & (place < SIZE)[None, :], other=0.0)
