"""Layers come in order, sweep after sweep, never into a room that is in use; from disk by way of host memory too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexeval.engine.memory.disk import DiskTier
from flexeval.engine.memory.lane import InlineLane, Lane, ThreadLane
from flexeval.engine.memory.read_ahead import NUM_ROOMS, ReadAhead
from flexeval.engine.memory.slab_queue import SlabQueue
from flexeval.engine.memory.tier import MemoryTier
from flexeval.engine.trace import Trace
from flexeval.errors import DiskError
from flexeval.policy.policy import Tier as TierName

CPU = torch.device("cpu")


@dataclass
class Rooms:
    """Takes a room a layer in turns, and sees that nobody is in it."""

    takes_room: list[bool]
    num_rooms: int
    holders: dict[int, int] = field(default_factory=dict)
    sent: list[int] = field(default_factory=list)
    in_use: int | None = None
    num_taken: int = 0

    def send(self, layer: int) -> int | None:
        self.sent.append(layer)
        if not self.takes_room[layer]:
            return None
        room = self.num_taken % self.num_rooms
        self.num_taken += 1
        assert room not in self.holders, (layer, self.holders)
        self.holders[room] = layer
        return room

    def took(self, layer: int, room: int | None) -> None:
        if self.in_use is not None:
            del self.holders[self.in_use]
        assert room is None or self.holders[room] == layer
        self.in_use = room


@given(
    takes_room=st.lists(st.booleans(), min_size=1, max_size=8),
    num_rooms=st.integers(2, 4),
    num_sweeps=st.integers(1, 4),
    has_experts=st.booleans(),
)
def test_layers_come_in_order_and_as_far_ahead_as_there_is_room(
    takes_room: list[bool], num_rooms: int, num_sweeps: int, has_experts: bool
) -> None:
    rooms, num_layers = Rooms(takes_room, num_rooms), len(takes_room)
    queue = SlabQueue(
        rooms.send, takes_room=takes_room, num_rooms=num_rooms, waits_for_sweep=[has_experts] * num_layers
    )
    for sweep in range(num_sweeps):
        queue.begin_sweep(expects_more=sweep + 1 < num_sweeps)
        if rooms.in_use is not None:  # the last layer of the sweep before is done
            del rooms.holders[rooms.in_use]
            rooms.in_use = None
        queue.send()
        for layer in range(num_layers):
            rooms.took(layer, queue.take(layer))
            queue.send()
            is_full = len(rooms.holders) == num_rooms
            all_sent = len(rooms.sent) == num_layers * min(sweep + 1 + (not has_experts), num_sweeps)
            assert is_full or all_sent or len(rooms.sent) == num_layers * sweep + layer + 1 + num_layers
    assert rooms.sent == [*range(num_layers)] * num_sweeps


def test_what_a_sweep_left_that_failed_is_not_used() -> None:
    sent: list[int] = []
    queue = SlabQueue(sent.append, takes_room=[True] * 4, num_rooms=2, waits_for_sweep=[False] * 4)
    queue.begin_sweep(expects_more=False)
    queue.send()
    for layer in (0, 1):
        queue.take(layer)
        queue.send()
    queue.begin_sweep(expects_more=False)
    queue.send()
    for layer in range(4):
        queue.take(layer)
        queue.send()
    assert sent == [0, 1, 2, 0, 1, 2, 3]


@pytest.fixture(params=[True, False], ids=["beside", "in-line"])
def lanes(request: pytest.FixtureRequest) -> Iterator[tuple[Lane, Lane]]:
    lanes = (ThreadLane("disk", CPU), ThreadLane("link", CPU)) if request.param else (InlineLane(), InlineLane())
    yield lanes
    for lane in lanes:
        lane.close()


IS_READ = [False, True, True, False, True]


class Reading:
    """Layers 1, 2 and 4 of 5 rest on disk, as so many bytes each that say which layer it is."""

    def __init__(self, folder: Path, disk: Lane, link: Lane):
        self.folder, self.link, self.trace = folder, link, Trace()
        self.tier, self.host = DiskTier(folder), MemoryTier(TierName.CPU, CPU, compute_device=CPU)
        self.extents = [self.tier.allocate(5000 + layer) for layer in range(5)]
        for layer, extent in enumerate(self.extents):
            extent.write(torch.full((extent.num_bytes,), layer, dtype=torch.uint8))
        self.ahead = ReadAhead(
            self.extents, is_read=IS_READ, host_tier=self.host, lane=disk, device=CPU, trace=self.trace
        )

    def sweep(self, *, expects_more: bool, stop: int = 5) -> list[torch.Tensor | None]:
        """The bytes of each layer as the link finds them."""
        self.ahead.begin_sweep(expects_more=expects_more, next_layer=0)
        found: list[torch.Tensor | None] = []
        for layer in range(stop):
            slab = self.ahead.take(layer)
            if slab is None:
                found.append(None)
                continue

            def load(layer: int = layer, slab: object = slab) -> torch.Tensor:
                memory = slab.wait().memory()  # type: ignore[attr-defined]
                return memory[: self.extents[layer].num_bytes].clone()

            coming = self.link.submit(load)
            self.ahead.read_by(coming)
            found.append(coming.wait())
        return found


def test_slabs_on_disk_come_to_host_memory_before_they_are_asked_for(tmp_path: Path, lanes: tuple[Lane, Lane]) -> None:
    reading = Reading(tmp_path, *lanes)
    assert reading.host.used_bytes == NUM_ROOMS * 5004
    for sweep in range(3):
        for layer, slab in enumerate(reading.sweep(expects_more=sweep < 2)):
            assert (slab is not None) == IS_READ[layer]
            assert slab is None or (len(slab) == 5000 + layer and (slab == layer).all())
    lanes[0].submit(lambda: None).wait()
    assert reading.trace.lanes["disk"].num_bytes == 3 * (5001 + 5002 + 5004), "nothing is read in vain"
    reading.ahead.close()
    assert reading.host.used_bytes == 0


def test_after_a_sweep_that_failed_the_next_one_finds_its_own(tmp_path: Path, lanes: tuple[Lane, Lane]) -> None:
    reading = Reading(tmp_path, *lanes)
    reading.sweep(expects_more=True, stop=3)
    path = next(path for path in tmp_path.rglob("000002.bin"))
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(DiskError, match=r"000002\.bin"):
        reading.sweep(expects_more=True)
    path.write_bytes(whole)
    for layer, slab in enumerate(reading.sweep(expects_more=False)):
        assert slab is None or (slab == layer).all()
