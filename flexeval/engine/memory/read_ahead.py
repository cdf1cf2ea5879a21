"""Slabs on disk on their way to a GPU: read into host memory long before the link takes them.

The disk is slower than the link, and its layers lie far apart. So the next one is read as soon as there is room for it,
whatever layer is computed. Knows extents and lanes; not what slabs hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from flexeval.engine.memory.lane import Lane, Transfer
from flexeval.engine.memory.slab_queue import SlabQueue
from flexeval.engine.memory.tier import Extent, Tier
from flexeval.engine.trace import Trace

NUM_ROOMS = 2
"""In host memory: one is read into while the link takes what is in the other."""


class _Reading(NamedTuple):
    room: int
    slab: Transfer[Extent]


class ReadAhead:
    """What rests on disk, by way of rooms in host memory that it takes in turns."""

    def __init__(
        self,
        extents: Sequence[Extent],
        *,
        is_read: Sequence[bool],
        host_tier: Tier,
        lane: Lane,
        device: torch.device,
        trace: Trace,
    ):
        """Read layer l's slab from `extents[l]` where `is_read[l]`. Raises `CapacityError`.

        The rooms are of `host_tier`; from there `device` takes the slabs.
        """
        self._extents = extents
        self._is_read = is_read
        self._lane = lane
        self._device = device
        self._trace = trace
        num_bytes = max((extent.num_bytes for extent, is_it in zip(extents, is_read, strict=True) if is_it), default=0)
        self._rooms = [host_tier.allocate(num_bytes) for _ in range(NUM_ROOMS)] if num_bytes else []
        self._readers: list[Transfer[Tensor] | None] = [None] * NUM_ROOMS  # per room, who read it last
        self._num_reads, self._taken_room = 0, 0
        self._queue = SlabQueue(
            self._send, takes_room=is_read, num_rooms=NUM_ROOMS, waits_for_sweep=[False] * len(is_read)
        )

    def begin_sweep(self, *, expects_more: bool, next_layer: int) -> None:
        """See `SlabQueue.begin_sweep`."""
        self._queue.begin_sweep(expects_more=expects_more, next_layer=next_layer)
        self._queue.send()

    def take(self, layer: int) -> Transfer[Extent] | None:
        """The next layer's slab in host memory, until `read_by`; None where it is not read ahead."""
        reading = self._queue.take(layer)
        if reading is None:
            return None
        self._taken_room = reading.room
        return reading.slab

    def read_by(self, reader: Transfer[Tensor]) -> None:
        """The slab that was taken last is overwritten once that is done."""
        self._readers[self._taken_room] = reader
        self._queue.send()

    def close(self) -> None:
        """Give the rooms back; nothing may be on its way."""
        for room in self._rooms:
            room.free()
        self._rooms = []

    def _send(self, layer: int) -> _Reading | None:
        if not self._is_read[layer]:
            return None
        room = self._num_reads % NUM_ROOMS
        self._num_reads += 1
        slab = self._lane.submit(self._read, self._extents[layer], self._rooms[room], self._readers[room])
        return _Reading(room, slab)

    def _read(self, extent: Extent, room: Extent, last_reader: Transfer[Tensor] | None) -> Extent:
        if last_reader is not None:
            with suppress(Exception):  # whoever takes that slab is told
                last_reader.wait()
            if self._device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        memory = room.memory()
        assert memory is not None
        extent.read(memory[: extent.num_bytes])
        self._trace.moved("disk", extent.num_bytes)
        return room
