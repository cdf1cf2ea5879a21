"""The contexts of sequences that decode, as index tensors on the device. Knows where tokens lie; not what they hold.

They are kept from step to step and updated where they are, so that what was recorded to read them stays right.

Shapes: B sequences, S longest context.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from flexeval.planning.rows import DecodeSpan

SPARE_STEPS, ROOM_STEPS = 64, 256
"""Steps that a group's contexts have room for on the device at least, and of what their room is a multiple."""


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


class Contexts:
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
