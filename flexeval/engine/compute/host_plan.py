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

from flexeval.engine.compute.host_decode import PIECES_PER_THREAD, Parts
from flexeval.planning.rows import AncestorSpan, Integers, RowPlan

MIN_PART_TOKENS = 128
"""Tokens of the parts of a context that is cut."""
SHORT = 16
"""Parts of fewer tokens are gathered together, however different their lengths are."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gathered:
    """One call of torch: parts of one log that have about as many tokens; padding repeats place 0."""

    log: int
    """Which of the row's logs they lie in."""
    index_BS: Tensor
    """Place of each token in the log."""
    bias_B1S: Tensor | None
    """-inf where it is padding, 0 elsewhere; None where nothing is."""
    token_B: Tensor
    """Token of the row that asks."""


class Above(NamedTuple):
    """One call: the queries of all descendants of a node."""

    span: AncestorSpan
    """Whose they are, and the node."""
    first: int
    """The first of its tokens that any of them sees."""
    mask_1QL: Tensor | None
    """Which of the tokens from there on each sees; None where each sees all."""


class _Part(NamedTuple):
    """Tokens of one sequence's own context."""

    log: int
    token: int
    places: Integers


class HostPlan:
    """How to attend for a row at all layers of a step that see as far and have as many heads."""

    def __init__(
        self,
        row: RowPlan,
        *,
        window: int | None,
        num_kv_heads: int,
        heads_per_kv: int,
        num_threads: int,
        has_kernel: bool,
        sees_above: bool,
    ):
        """Plan for so many threads, for our kernel or for torch, and for ancestors or without them."""
        num_pieces = -(-PIECES_PER_THREAD * num_threads // num_kv_heads)
        parts = list(_parts(row, window, num_pieces))
        self.num_keys = sum(len(part.places) for part in parts)
        """Tokens whose keys and values are read."""
        self.together = _together(parts) if has_kernel else None
        """What sequences have for themselves, for our kernel; None where torch attends."""
        self.gathered = () if has_kernel else tuple(_gather(parts))
        """The same for torch, a call each."""
        self.aboves: list[Above] = []
        """Calls over what they share."""
        asking = [call.token_B for call in self.gathered] if self.together is None else [self.together.token_P]
        tokens: list[int] = torch.cat(asking).tolist()
        for ancestor in row.ancestors if sees_above else ():
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
        self.is_whole = self.part_X is None and len(tokens) == row.num_tokens
        """Whether each token has one part, in order."""

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


def _parts(row: RowPlan, window: int | None, num_pieces: int) -> Iterator[_Part]:
    """Each sequence's own context, cut where there are fewer than `num_pieces` of them."""
    first = 0 if window is None else -window
    num_cuts = -(-num_pieces // row.num_tokens)
    for log, span in enumerate(row.decode):
        for sequence, own_tokens in enumerate(span.own_tokens):
            places = np.asarray(own_tokens, dtype=np.int32)[first:]
            for part in np.array_split(places, max(1, min(num_cuts, len(places) // MIN_PART_TOKENS))):
                yield _Part(log, span.start + sequence, part)


def _together(parts: Sequence[_Part]) -> Parts:
    num_tokens = [0] * (parts[-1].log + 1)
    for part in parts:
        num_tokens[part.log] = max(num_tokens[part.log], int(part.places[-1]) + 1)
    return Parts(
        logs=[part.log for part in parts],
        token_P=torch.tensor([part.token for part in parts]),
        bounds=torch.from_numpy(np.cumsum([0, *(len(part.places) for part in parts)], dtype=np.int64)),
        places=torch.from_numpy(np.concatenate([part.places for part in parts])),
        num_tokens=num_tokens,
    )


def _gather(parts: Sequence[_Part]) -> Iterator[Gathered]:
    """In calls in which no part has twice as many tokens as another, or all have few: padding stays small."""

    def kind(part: _Part) -> tuple[int, int]:
        return part.log, max(SHORT - 1, len(part.places)).bit_length()

    for (log, _), members in groupby(sorted(parts, key=kind), key=kind):
        batch = list(members)
        lengths = np.array([len(part.places) for part in batch])
        is_token_BS = np.arange(lengths.max()) < lengths[:, None]
        index_BS = np.zeros(is_token_BS.shape, dtype=np.int64)
        index_BS[is_token_BS] = np.concatenate([part.places for part in batch])
        bias_BS = np.where(is_token_BS, np.float32(0), np.float32(-np.inf))
        yield Gathered(
            log=log,
            index_BS=torch.from_numpy(index_BS),
            bias_B1S=None if is_token_BS.all() else torch.from_numpy(bias_BS)[:, None],
            token_B=torch.tensor([part.token for part in batch]),
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
