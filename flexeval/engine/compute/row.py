"""A row plan as index tensors on the device, made once per sweep and used by every layer.

Knows indices; not the tensors of any layer.

Shapes: T tokens of the row, B sequences, L longest of them, S longest context.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexeval.planning.rows import AncestorSpan, DecodeSpan, FreshSpan, Integers, RowPlan

PADDING_LIMIT = 1.25
"""Fresh spans share a padded batch while the longest is at most this times the shortest ..."""
PADDING_TOKENS = 16
"""... or at most this many tokens longer."""
SPARE_STEPS, ROOM_STEPS = 64, 256
"""Steps that a group's contexts have room for on the device at least, and of what their room is a multiple."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshBatch:
    """Fresh spans of similar length, padded to the longest."""

    index_BL: Tensor
    """Token of the row at each place; padding repeats the span's last token."""
    token_M: Tensor
    """Tokens of the row that the batch holds, without padding ..."""
    place_M: Tensor
    """... and where each lies in the flattened `[B * L]` batch."""


class Runs(NamedTuple):
    """Fresh spans back to back."""

    bounds: Tensor
    """int32: first token of each in the row, and the end of the last."""
    longest: int
    """Tokens of the longest."""


@dataclass(frozen=True, kw_only=True)  # without slots, which leave nothing to cache in
class DecodeBatch:
    """One new token for each sequence of a group."""

    span: DecodeSpan
    """Which log and which tokens of the row."""
    index_BS: Tensor
    """int32: place of each context token in the log, the new token included; padding repeats place 0."""
    lengths_B: Tensor
    """int32: tokens of each context."""
    last_place_B: Tensor
    """int64: place of each new token."""
    room: int
    """Tokens that contexts have room for where they lie now: in so far, the tensors stay the same from step to step."""
    address: int
    """Equal for tensors that lie in the same place."""

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.index_BS.shape[0]

    @cached_property
    def is_context_BS(self) -> Tensor:
        """False where `index_BS` is padding."""
        return self.steps_S < self.lengths_B[:, None]

    @property
    def steps_S(self) -> Tensor:
        """Which token of a context stands at each place of `index_BS`."""
        return torch.arange(self.index_BS.shape[1], device=self.index_BS.device)


class _Contexts:
    """The contexts of a group's sequences on the device: kept from sweep to sweep, one column longer each time.

    They are laid out anew where sequences have come or gone, in the same place as long as there is room.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._version: int | None = None
        self._num_sequences = self._max_length = 0
        self._address = 0
        self._index = self._lengths = torch.zeros(0, 0, dtype=torch.int32, device=device)
        self._last_place = self._order = torch.zeros(0, dtype=torch.int64, device=device)

    def batch(self, span: DecodeSpan) -> DecodeBatch:
        """A step of the group."""
        if span.version == self._version and self._max_length < self._index.shape[1]:
            self._append(span)
        else:
            self._lay_out(span)
        num = self._num_sequences
        return DecodeBatch(
            span=span,
            index_BS=self._index[:num, : self._max_length],
            lengths_B=self._lengths[:num],
            last_place_B=self._last_place[:num],
            room=self._index.shape[1],
            address=self._address,
        )

    def whole(self, batch: DecodeBatch) -> DecodeBatch:
        """The same with all the room that there is: it holds for later steps as well."""
        return replace(batch, index_BS=self._index[: batch.num_sequences])

    def _lay_out(self, span: DecodeSpan) -> None:
        lengths = np.array([len(tokens) for tokens in span.own_tokens], dtype=np.int32)
        num, longest = len(lengths), int(lengths.max())
        if num > self._index.shape[0] or longest > self._index.shape[1]:
            self._make_room(num, longest)
        index = np.zeros((num, longest), dtype=np.int32)
        for row, tokens in zip(index, span.own_tokens, strict=True):
            row[: len(tokens)] = tokens
        self._version, self._num_sequences, self._max_length = span.version, num, longest
        self._index.zero_()  # padding that whoever gathers can read
        self._index[:num, :longest].copy_(torch.from_numpy(index), non_blocking=True)
        self._lengths[:num].copy_(torch.from_numpy(lengths), non_blocking=True)
        places = np.array([tokens[-1] for tokens in span.own_tokens], dtype=np.int64)
        self._last_place[:num].copy_(torch.from_numpy(places), non_blocking=True)

    def _append(self, span: DecodeSpan) -> None:
        """Add the step's tokens, which lie at the end of the log in the order of the sequences."""
        num = self._num_sequences
        self._max_length += 1
        assert self._max_length == max(map(len, span.own_tokens)), (span.group, self._max_length)
        torch.add(self._order[:num], span.log_length, out=self._last_place[:num])
        place_B1 = self._lengths[:num, None].long()
        self._index[:num].scatter_(1, place_B1, self._last_place[:num, None].int())
        self._lengths[:num] += 1

    def _make_room(self, num_sequences: int, length: int) -> None:
        """Larger tensors than before; those before stay as they are for whoever still has them."""
        rows = max(num_sequences, self._index.shape[0])
        columns = -(-(length + SPARE_STEPS) // ROOM_STEPS) * ROOM_STEPS
        self._address += 1
        self._index = torch.zeros(rows, columns, dtype=torch.int32, device=self._device)
        self._lengths = torch.zeros(rows, dtype=torch.int32, device=self._device)
        self._last_place = torch.zeros(rows, dtype=torch.int64, device=self._device)
        self._order = torch.arange(rows, device=self._device)


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

    def __init__(self, device: torch.device):
        """Rows are computed on `device`."""
        self._device = device
        self._contexts: dict[int, _Contexts] = {}

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
            runs=self._runs(plan.fresh) if plan.fresh else None,
            decode=tuple(self._decode(span) for span in plan.decode),
            compactions=tuple(
                CompactionBatch(
                    group=compaction.group,
                    log_length=compaction.log_length,
                    places_C=_move(compaction.places, self._device),
                )
                for compaction in plan.compactions
            ),
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

    def _runs(self, spans: Sequence[FreshSpan]) -> Runs:
        bounds = np.array([*(span.start for span in spans), spans[-1].start + spans[-1].length], dtype=np.int32)
        lengths = [span.length for span in spans]
        assert (np.diff(bounds) == lengths).all(), (bounds, lengths, "fresh spans lie back to back")
        return Runs(_move(bounds, self._device), max(lengths))

    def for_later(self, row: Row) -> Row:
        """The row with contexts that hold for its next steps as well, as far as they have room."""
        decode = tuple(self._contexts[batch.span.group].whole(batch) for batch in row.decode)
        return replace(row, decode=decode)

    def _decode(self, span: DecodeSpan) -> DecodeBatch:
        if span.group not in self._contexts:
            self._contexts[span.group] = _Contexts(self._device)
        return self._contexts[span.group].batch(span)


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
