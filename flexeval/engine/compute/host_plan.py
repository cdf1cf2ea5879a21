"""What the CPU reads to attend for a row, planned once a step and used at every layer. Knows rows and logs; no layer.

Shapes: T tokens of the row, K KV heads, M query heads to a KV head, B parts of contexts in a call, S tokens of a part,
A descendants' tokens, L tokens of an ancestor, Q the descendants' queries of one KV head, P parts of all calls, Z parts
of one token's context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexeval.planning.rows import AncestorSpan, Integers, RowPlan
from flexeval.planning.stretches import Batch, lay_out

SHARES_PER_THREAD = 4
"""Parts times KV heads for each thread that a call should have, so that threads end at about the same time."""
SHORT_REST = 16
"""Rests of fewer tokens are gathered together, however different their lengths are."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rest:
    """Tokens to gather, of parts that have about as many of them; padding repeats place 0."""

    sequences: tuple[int, ...]
    """Whose context each part is of."""
    index_BS: Tensor
    """Place of each token in the log."""
    bias_B1S: Tensor | None
    """-inf where it is padding, 0 elsewhere; None where nothing is."""


class Read(NamedTuple):
    """One call: a query each for parts of contexts."""

    log: int
    """Which of the row's logs they lie in."""
    parts: Batch | Rest
    """What of it."""


class Above(NamedTuple):
    """One call: the queries of all descendants of a node."""

    span: AncestorSpan
    """Whose they are, and the node."""
    first: int
    """The first of its tokens that any of them sees."""
    mask_1QL: Tensor | None
    """Which of the tokens from there on each sees; None where each sees all."""


class HostPlan:
    """How to attend for a row at all layers of a step that see as far and have as many heads."""

    def __init__(self, row: RowPlan, *, window: int | None, num_kv_heads: int, heads_per_kv: int):
        """Plan for as many threads as torch has in the thread that asks."""
        self.reads: list[Read] = []
        """Calls over what sequences have for themselves."""
        self.aboves: list[Above] = []
        """Calls over what they share."""
        self.num_keys = 0
        """Tokens whose keys and values are read."""
        num_parts = -(-SHARES_PER_THREAD * torch.get_num_threads() // num_kv_heads)
        tokens: list[int] = []
        for log, span in enumerate(row.decode):
            first = 0 if window is None else -window
            contexts = [np.asarray(places)[first:] for places in span.own_tokens]
            self.num_keys += sum(map(len, contexts))
            layout = lay_out(contexts, num_parts=num_parts)
            calls: list[Batch | Rest] = [*layout.batches, *_rests(layout.rest)]
            for parts in calls:
                self.reads.append(Read(log, parts))
                tokens += [span.start + sequence for sequence in parts.sequences]
        self.sizes = [len(read.parts.sequences) for read in self.reads]
        """Parts of each read."""
        self.token_B = torch.tensor(tokens)
        """Token of the row that each of these parts is for."""
        for ancestor in row.ancestors:
            first = _first_seen(ancestor, row, window)
            if first < ancestor.num_keys:
                self.aboves.append(Above(ancestor, first, _mask(ancestor, row, window, first, heads_per_kv)))
                self.num_keys += ancestor.num_keys - first
                tokens += range(ancestor.start, ancestor.start + ancestor.length)
        self.num_tokens = row.num_tokens
        """T."""
        self.part_X: Tensor | None = None
        """The parts of each token, as a flat `[Z, T]`; None if they come out like that."""
        self.is_padding_ZT11: Tensor | None = None
        """Where that repeats part 0, as a token has fewer parts than another; None if none has."""
        self._place_parts(np.array(tokens))

    def _place_parts(self, token_P: Integers) -> None:
        counts_T = np.bincount(token_P, minlength=self.num_tokens)
        assert counts_T.min() > 0, (counts_T, "every token sees itself")
        order_P = np.argsort(token_P, kind="stable")
        nth_P = np.arange(len(order_P)) - np.repeat(np.cumsum(counts_T) - counts_T, counts_T)
        part_ZT = np.zeros((counts_T.max(), self.num_tokens), dtype=np.int64)
        part_ZT[nth_P, token_P[order_P]] = order_P
        is_padding_ZT = np.arange(counts_T.max())[:, None] >= counts_T
        if is_padding_ZT.any():
            self.is_padding_ZT11 = torch.from_numpy(is_padding_ZT)[..., None, None]
        if not np.array_equal(part_ZT.ravel(), np.arange(len(order_P))):
            self.part_X = torch.from_numpy(part_ZT.ravel())


def _rests(rests: Sequence[Integers]) -> Iterator[Rest]:
    """Sequences' rests, in calls in which none has twice as many tokens as another, or all few: padding stays small."""

    def size(sequence: int) -> int:
        return max(SHORT_REST - 1, len(rests[sequence])).bit_length()

    order = sorted((sequence for sequence, places in enumerate(rests) if len(places)), key=size)
    for _, batch in groupby(order, key=size):
        sequences = tuple(batch)
        lengths = np.array([len(rests[sequence]) for sequence in sequences])
        is_token_BS = np.arange(lengths.max()) < lengths[:, None]
        index_BS = np.zeros(is_token_BS.shape, dtype=np.int64)
        index_BS[is_token_BS] = np.concatenate([rests[sequence] for sequence in sequences])
        bias_BS = np.where(is_token_BS, np.float32(0), np.float32(-np.inf))
        yield Rest(
            sequences=sequences,
            index_BS=torch.from_numpy(index_BS),
            bias_B1S=None if is_token_BS.all() else torch.from_numpy(bias_BS)[:, None],
        )


def _first_seen(ancestor: AncestorSpan, row: RowPlan, window: int | None) -> int:
    """The first token of an ancestor that any of its descendants sees, counted from the ancestor's first."""
    if window is None:
        return 0
    first_position = int(min(row.positions[ancestor.start : ancestor.start + ancestor.length]))
    return max(0, first_position - window + 1 - ancestor.first_key_position)


def _mask(ancestor: AncestorSpan, row: RowPlan, window: int | None, first: int, heads_per_kv: int) -> Tensor | None:
    """What each query sees of an ancestor's tokens from `first` on; None where each sees all."""
    if window is None or ancestor.last_position - ancestor.first_key_position - first < window:
        return None
    key_position_L = ancestor.first_key_position + np.arange(first, ancestor.num_keys)
    position_A = np.asarray(row.positions[ancestor.start : ancestor.start + ancestor.length])
    is_seen_AL = torch.from_numpy(position_A[:, None] - key_position_L < window)
    return is_seen_AL.repeat_interleave(heads_per_kv, dim=0)[None]
