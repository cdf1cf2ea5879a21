"""A row plan as index tensors on the device, made once per sweep and used by every layer.

Knows indices; not the tensors of any layer.

Shapes: T tokens of the row, B sequences, L longest of them, S longest context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexeval.planning.rows import AncestorSpan, DecodeSpan, FreshSpan, RowPlan

PADDING_LIMIT = 1.25
"""Fresh spans share a padded batch while the longest is at most this times the shortest ..."""
PADDING_TOKENS = 16
"""... or at most this many tokens longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshBatch:
    """Fresh spans of similar length, padded to the longest."""

    index_BL: Tensor
    """Token of the row at each place; padding repeats the span's last token."""
    token_M: Tensor
    """Tokens of the row that the batch holds, without padding ..."""
    place_M: Tensor
    """... and where each lies in the flattened `[B * L]` batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """One new token for each sequence of a group."""

    span: DecodeSpan
    """Which log and which tokens of the row."""
    index_BS: Tensor
    """Place of each context token in the log, the new token included; padding repeats place 0."""
    is_context_BS: Tensor
    """False where `index_BS` is padding."""
    key_position_BS: Tensor
    """Position of each context token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A packed row, ready to be computed."""

    index: int
    """Its place among the rows of the sweep."""
    plan: RowPlan
    """The integers it was made from."""
    ids_1T: Tensor
    """New tokens."""
    positions_1T: Tensor
    """Position of each in its sequence."""
    fresh: tuple[FreshBatch, ...]
    """Nodes on their first pass."""
    decode: tuple[DecodeBatch, ...]
    """Sequences that generate."""

    @property
    def ancestors(self) -> tuple[AncestorSpan, ...]:
        """What tokens see before their own context."""
        return self.plan.ancestors


def make_row(index: int, plan: RowPlan, device: torch.device) -> Row:
    """Put a plan's indices on the device."""

    def move(values: object, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=dtype).to(device, non_blocking=True)

    fresh = []
    for spans in _similar(plan.fresh):
        longest = max(span.length for span in spans)
        starts = np.array([span.start for span in spans])[:, None]
        lengths = np.array([span.length for span in spans])[:, None]
        steps = np.arange(longest)[None, :]
        is_token = steps < lengths
        index_BL = starts + np.minimum(steps, lengths - 1)
        fresh.append(
            FreshBatch(
                index_BL=move(index_BL), token_M=move(index_BL[is_token]), place_M=move(np.flatnonzero(is_token))
            )
        )
    decode = []
    for span in plan.decode:
        longest = max(map(len, span.own_tokens))
        index_BS = np.zeros((len(span.own_tokens), longest), dtype=np.int64)
        for row, tokens in zip(index_BS, span.own_tokens, strict=True):
            row[: len(tokens)] = tokens
        lengths = np.array([len(tokens) for tokens in span.own_tokens])[:, None]
        positions = np.array(span.first_own_positions)[:, None] + np.arange(longest)[None, :]
        decode.append(
            DecodeBatch(
                span=span,
                index_BS=move(index_BS),
                is_context_BS=move(np.arange(longest)[None, :] < lengths, torch.bool),
                key_position_BS=move(positions),
            )
        )
    return Row(
        index=index,
        plan=plan,
        ids_1T=move([plan.token_ids]),
        positions_1T=move([plan.positions]),
        fresh=tuple(fresh),
        decode=tuple(decode),
    )


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
