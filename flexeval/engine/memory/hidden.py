"""Hidden states between two layers: a row's rest where the policy says. Knows rows by number; not what they hold.

One lane carries both directions, so a row is always saved before it is loaded again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexeval.engine.memory.lane import Lane, Transfer, drain
from flexeval.engine.memory.tier import Extent, Tier
from flexeval.engine.trace import Trace


class HiddenStore:
    """The hidden states of one sweep's rows."""

    def __init__(self, tiers: Sequence[Tier], *, device: torch.device, device_tier: Tier, lane: Lane, trace: Trace):
        """Row r rests on `tiers[r]`; on `device_tier` it just stays where it was computed."""
        self.lane = lane
        self._tiers = tiers
        self._device = device
        self._device_tier = device_tier
        self._trace = trace
        self._resident: dict[int, Tensor] = {}
        self._extents: dict[int, Extent] = {}
        self._like: dict[int, Tensor] = {}
        self._writes: dict[int, Transfer[None]] = {}

    def stays(self, row: int) -> bool:
        """Whether a row's hidden states never leave the compute device."""
        return self._tiers[row] is self._device_tier

    def save(self, row: int, hidden_1TD: Tensor) -> None:
        """Put a row's hidden states to rest."""
        if self.stays(row):
            self._resident[row] = hidden_1TD
            return
        if row not in self._extents:
            self._extents[row] = self._tiers[row].allocate(hidden_1TD.numel() * hidden_1TD.element_size())
            self._like[row] = torch.empty_like(hidden_1TD, device="meta")
        self._writes[row] = self.lane.submit(self._write, row, hidden_1TD)

    def wait(self, row: int) -> None:
        """Have the caller's stream see that a row's hidden states rest where they are to."""
        if row in self._writes:
            self._writes[row].wait()

    def load(self, row: int) -> Tensor:
        """A row's hidden states on the compute device; runs on the lane."""
        if row in self._resident:
            return self._resident[row]
        self._writes[row].wait()  # done long since, on this very lane: raises where it failed
        hidden_1TD = torch.empty_like(self._like[row], device=self._device)
        data = hidden_1TD.view(-1).view(torch.uint8)
        self._extents[row].read(data)
        self._trace.moved("hidden", data.numel())
        return hidden_1TD

    def close(self) -> None:
        """Give back everything, also in the middle of a sweep."""
        drain(self.lane)
        for extent in self._extents.values():
            extent.free()
        self._extents, self._resident = {}, {}

    def _write(self, row: int, hidden_1TD: Tensor) -> None:
        data = hidden_1TD.reshape(-1).view(torch.uint8)
        self._extents[row].write(data)
        self._trace.moved("hidden", data.numel())
