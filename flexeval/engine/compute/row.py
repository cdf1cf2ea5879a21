"""A row plan as index tensors on the device, made once per sweep and used by every layer.

Knows indices; not the tensors of any layer.

Shapes: T tokens of the row, W of them needed, B sequences, L longest of them, S longest context, U blocks of queries.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexeval.engine.compute.contexts import Contexts, DecodeBatch
from flexeval.engine.compute.positions import Positions
from flexeval.planning.rows import AncestorSpan, DecodeSpan, FreshSpan, Integers, RowPlan

PADDING_LIMIT = 1.25
"""Fresh spans share a padded batch while the longest is at most this times the shortest ..."""
PADDING_TOKENS = 16
"""... or at most this many tokens longer."""
NEEDED_SHARE, LEAST_SPARED = 0.5, 256
"""In the last layer only needed tokens go on after attention where they are at most this share of a row's, and at least
so many others are spared: keys and values of the needed ones are computed once more, and Python takes its time."""
QUERY_BLOCK = 64
"""Tokens of a run that one program of a GPU attends for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshBatch:
    """Fresh spans of similar length, padded to the longest."""

    index_BL: Tensor
    """Token of the row at each place; padding repeats the span's last token."""
    token_M: Tensor
    """Tokens of the row that the batch holds, without padding ..."""
    place_M: Tensor
    """... and where each lies in the flattened `[B * L]` batch."""


class Needed(NamedTuple):
    """The tokens of a row that are read off after the last layer, where most are not."""

    index_W: Tensor
    """Which of the row's, in ascending order."""
    ids_1W: Tensor
    """Theirs."""
    positions_1W: Tensor
    """Position of each in its sequence."""


class Runs(NamedTuple):
    """Fresh spans back to back."""

    bounds: Tensor
    """int32: first token of each in the row, and the end of the last."""
    longest: int
    """Tokens of the longest."""
    blocks_U3: Tensor
    """int32, for every `QUERY_BLOCK` tokens of each: first token of the span, its end, and first token of the block.
    Those that see most come first: none is left over when all others are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactionBatch:
    """A log to rewrite before the row reads it."""

    group: int
    """Whose log."""
    log_length: int
    """Tokens in it until now."""
    places_C: Tensor
    """Where the tokens lie that stay, in ascending order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A packed row, ready to be computed."""

    index: int
    """Its place among the rows of the sweep."""
    plan: RowPlan
    """The integers it was made from."""
    is_replayed: bool
    """Whether its layers are run from recordings, once there are any."""
    ids_1T: Tensor
    """New tokens, and behind them what fills up a row that is replayed."""
    positions_1T: Tensor
    """Position of each in its sequence."""
    fresh: tuple[FreshBatch, ...]
    """Nodes on their first pass."""
    runs: Runs | None
    """The same without padding, if there are any."""
    decode: tuple[DecodeBatch, ...]
    """Sequences that generate."""
    compactions: tuple[CompactionBatch, ...]
    """Logs to rewrite first."""
    needed: Needed | None
    """What the last layer is to go on with after its attention; None is all tokens."""
    read_groups: frozenset[int]
    """The groups whose logs it reads or rewrites."""

    @property
    def ancestors(self) -> tuple[AncestorSpan, ...]:
        """What tokens see before their own context."""
        return self.plan.ancestors

    @property
    def steady(self) -> Hashable:
        """Equal for rows that decode from the same places: their launches are the same. None where there are none such.

        Positions are left out: only windows over ancestors ask for them.
        """
        if self.fresh or self.compactions:
            return None
        own = tuple((batch.span.group, batch.span.start, batch.num_sequences, batch.address) for batch in self.decode)
        above = tuple((span.start, span.length, span.num_keys, span.source) for span in self.ancestors)
        return own, above


class RowMaker:
    """Makes the rows of one batch of requests, in the order in which they are computed."""

    def __init__(self, device: torch.device, *, is_apart: bool = False):
        """Rows are computed on `device`; those of requests apart show no room that others have made for contexts."""
        self._device = device
        self._is_apart = is_apart
        self._contexts: dict[int, Contexts] = {}

    def make(self, index: int, plan: RowPlan, *, replayed_size: int | None = None) -> Row:
        """Put a plan's indices on the device; a row that is replayed is filled up to a size that recurs."""
        num_filling = 0 if replayed_size is None else replayed_size - plan.num_tokens
        return Row(
            index=index,
            plan=plan,
            is_replayed=replayed_size is not None,
            ids_1T=_move(np.pad(plan.token_ids, (0, num_filling))[None], self._device),
            positions_1T=_move(np.pad(plan.positions, (0, num_filling))[None], self._device),
            fresh=tuple(self._fresh(spans) for spans in _similar(plan.fresh)),
            runs=make_runs(plan.fresh, self._device) if plan.fresh and self._device.type == "cuda" else None,
            decode=tuple(self._decode(span) for span in plan.decode),
            compactions=tuple(
                CompactionBatch(
                    group=compaction.group,
                    log_length=compaction.log_length,
                    places_C=_move(compaction.places, self._device),
                )
                for compaction in plan.compactions
            ),
            needed=self._needed(plan) if plan.fresh else None,
            read_groups=frozenset(
                [
                    *(span.group for span in plan.decode),
                    *(compaction.group for compaction in plan.compactions),
                    *(span.source.group for span in plan.ancestors if span.source.group is not None),
                ]
            ),
        )

    def _needed(self, plan: RowPlan) -> Needed | None:
        wanted_W = Positions(plan).wanted_W
        num_wanted, num_spared = len(wanted_W), plan.num_tokens - len(wanted_W)
        if not 0 < num_wanted <= NEEDED_SHARE * plan.num_tokens or num_spared < LEAST_SPARED:
            return None
        return Needed(
            index_W=_move(wanted_W, self._device),
            ids_1W=_move(plan.token_ids[None, wanted_W], self._device),
            positions_1W=_move(plan.positions[None, wanted_W], self._device),
        )

    def _fresh(self, spans: Sequence[FreshSpan]) -> FreshBatch:
        longest = max(span.length for span in spans)
        starts = np.array([span.start for span in spans])[:, None]
        lengths = np.array([span.length for span in spans])[:, None]
        steps = np.arange(longest)[None, :]
        is_token = steps < lengths
        index_BL = starts + np.minimum(steps, lengths - 1)
        return FreshBatch(
            index_BL=_move(index_BL, self._device),
            token_M=_move(index_BL[is_token], self._device),
            place_M=_move(np.flatnonzero(is_token), self._device),
        )

    def for_later(self, row: Row) -> Row:
        """The row with contexts that hold for its next steps as well, as far as they have room."""
        decode = tuple(self._contexts[batch.span.group].whole(batch) for batch in row.decode)
        return replace(row, decode=decode)

    def _decode(self, span: DecodeSpan) -> DecodeBatch:
        if span.group not in self._contexts:
            self._contexts[span.group] = Contexts(self._device)
        batch = self._contexts[span.group].batch(span)
        return replace(batch, room=batch.index_BS.shape[1]) if self._is_apart else batch


def make_runs(spans: Sequence[FreshSpan], device: torch.device) -> Runs:
    """Fresh spans of a row, which lie back to back."""
    bounds = np.array([*(span.start for span in spans), spans[-1].start + spans[-1].length], dtype=np.int32)
    lengths = [span.length for span in spans]
    assert (np.diff(bounds) == lengths).all(), (bounds, lengths, "fresh spans lie back to back")
    blocks_U3 = np.array(
        [
            (span.start, span.start + span.length, span.start + step)
            for span in spans
            for step in range(0, span.length, QUERY_BLOCK)
        ],
        dtype=np.int32,
    )
    most_first_U = np.argsort(blocks_U3[:, 0] - blocks_U3[:, 2], kind="stable")
    return Runs(_move(bounds, device), max(lengths), _move(blocks_U3[most_first_U], device))


def _move(values: Integers, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def _similar(spans: tuple[FreshSpan, ...]) -> Iterator[list[FreshSpan]]:
    """Spans in batches of similar length, shortest first, so that padding stays small."""
    batch: list[FreshSpan] = []
    for span in sorted(spans, key=lambda span: span.length):
        if batch and span.length > max(batch[0].length * PADDING_LIMIT, batch[0].length + PADDING_TOKENS):
            yield batch
            batch = []
        batch.append(span)
    if batch:
        yield batch
