"""A row plan as index tensors on the device, made once per sweep and used by every layer.

Knows indices; not the tensors of any layer.

Shapes: T tokens of the row, B sequences, L longest of them, S longest context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexeval.planning.rows import AncestorSpan, DecodeSpan, FreshSpan, Integers, RowPlan

PADDING_LIMIT = 1.25
"""Fresh spans share a padded batch while the longest is at most this times the shortest ..."""
PADDING_TOKENS = 16
"""... or at most this many tokens longer."""
SPARE_STEPS = 64
"""Steps that a group's contexts have room for on the device before they are laid out anew."""


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


class DecodeBatch:
    """One new token for each sequence of a group."""

    def __init__(self, span: DecodeSpan, contexts: _Contexts):
        self.span = span
        """Which log and which tokens of the row."""
        self.max_length = contexts.max_length
        """S, the longest context."""
        self.index_BS = contexts.index_BS[:, : contexts.max_length]
        """int32: place of each context token in the log, the new token included; padding repeats place 0."""
        self.lengths_B = contexts.lengths_B
        """int32: tokens of each context."""
        self._first_positions_B1 = contexts.first_positions_B1
        self._is_context_BS: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.index_BS.shape[0]

    @property
    def is_context_BS(self) -> Tensor:
        """False where `index_BS` is padding."""
        if self._is_context_BS is None:
            self._is_context_BS = self._steps_S < self.lengths_B[:, None]
        return self._is_context_BS

    @property
    def key_position_BS(self) -> Tensor:
        """Position of each context token."""
        return self._first_positions_B1 + self._steps_S

    @property
    def _steps_S(self) -> Tensor:
        return torch.arange(self.max_length, device=self.index_BS.device)


class _Contexts:
    """The contexts of a group's sequences on the device: kept from sweep to sweep, one column longer each time."""

    def __init__(self, span: DecodeSpan, device: torch.device):
        lengths = np.array([len(tokens) for tokens in span.own_tokens])
        self.version = span.version
        self.max_length = int(lengths.max())
        index_BS = np.zeros((len(lengths), self.max_length + SPARE_STEPS), dtype=np.int32)
        for row, tokens in zip(index_BS, span.own_tokens, strict=True):
            row[: len(tokens)] = tokens
        self.index_BS = _move(index_BS, device)
        self.lengths_B = _move(lengths.astype(np.int32), device)
        self.first_positions_B1 = _move(np.array(span.first_own_positions)[:, None], device)
        self._last_B1 = _move(lengths[:, None] - 1, device)
        self._sequence_B1 = torch.arange(len(lengths), dtype=torch.int32, device=device)[:, None]

    def can_append(self, span: DecodeSpan) -> bool:
        """Whether the group's next step adds nothing but one token to each context, and there is room for it."""
        return span.version == self.version and self.max_length < self.index_BS.shape[1]

    def append(self, span: DecodeSpan) -> None:
        """Add the step's tokens, which lie at the end of the log in the order of the sequences."""
        self.max_length += 1
        assert self.max_length == max(map(len, span.own_tokens)), (span.group, self.max_length)
        self._last_B1 += 1
        self.lengths_B += 1
        self.index_BS.scatter_(1, self._last_B1, self._sequence_B1 + span.log_length)


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

    def _decode(self, span: DecodeSpan) -> DecodeBatch:
        contexts = self._contexts.get(span.group)
        if contexts is not None and contexts.can_append(span):
            contexts.append(span)
        else:
            contexts = self._contexts[span.group] = _Contexts(span, self._device)
        return DecodeBatch(span, contexts)


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
