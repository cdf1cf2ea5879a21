"""What a sparse setting spares the link and asks of memory, in numbers. Knows sizes; no policy and no tensor."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from flexeval.config import SparseMethod, Sparsity
from flexeval.policy.sweeps import Sweep
from flexeval.policy.work import ModelShape

SHEET_SCORES = 2**23
"""Scores written out at a time at most, or those of one token."""
SHEET_BYTES = 32
"""Memory for each of them: the scores and what is sorted of them, masks, weights."""
GATHERED_NUMBERS = 2**25
"""Numbers of keys and values gathered from logs at a time at most, or those of one sequence."""
GATHERED_BYTES = 12
"""Memory for each of them: as they rest, in 32 bits, and as a product wants them."""
PAGE_TOKENS = 16
"""Positions of a page of Quest, as in its paper's experiments."""


class ValueBytes(NamedTuple):
    """Values of a layer that a sweep could read, in bytes."""

    spared: float
    """Not chosen: they stay."""
    chosen: float
    """Fetched."""


def value_bytes(shape: ModelShape, sweep: Sweep) -> ValueBytes:
    """Of one layer, if its KV rests in host memory: of the values that sequences have for themselves."""
    num_bytes = sweep.num_own_read * shape.value_bytes_per_token
    if shape.sparsity is None or not num_bytes:
        return ValueBytes(0.0, num_bytes)
    heads_per_kv = shape.num_query_heads // shape.num_kv_heads
    share = fetched_share(shape.sparsity, sweep.num_pairs / sweep.num_tokens, heads_per_kv=heads_per_kv)
    return ValueBytes((1 - share) * num_bytes, share * num_bytes)


def num_kept(sparsity: Sparsity, num_visible: float) -> float:
    """Keys that one query attends to of those it may see; of Quest's page that is still filling, half is there."""
    num_keys = ceil(sparsity.percent * num_visible / 100)
    if sparsity.method is SparseMethod.TOPK:
        return num_keys
    return min(num_visible, PAGE_TOKENS * (ceil(num_keys / PAGE_TOKENS) - 1) + (PAGE_TOKENS + 1) / 2)


def fetched_share(sparsity: Sparsity, num_visible: float, *, heads_per_kv: int) -> float:
    """Share of values that the queries of one KV head choose together, in (0, 1].

    1 - (1 - s) ** M, were M heads to choose independently; in truth they agree more often, so it is rarely more.
    """
    return 1 - (1 - num_kept(sparsity, num_visible) / num_visible) ** heads_per_kv


def sparse_workspace_bytes(*, num_scores: float, num_numbers: float) -> int:
    """Memory for scores and for what is gathered, of a call that has so many in all."""
    scores_bytes = min(SHEET_SCORES, num_scores) * SHEET_BYTES
    return int(scores_bytes + min(GATHERED_NUMBERS, num_numbers) * GATHERED_BYTES)
