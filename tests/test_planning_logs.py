"""Logs of KV: what each sequence finds at its places is its own, however they come, go and are moved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexeval.planning.logs import EVERYWHERE, Crossing, GroupLog, Seat, SharedLog
from flexeval.planning.rows import SHARED, Compaction


def a_seat(stream: int, num_prompt: int, num_steps: int) -> Seat:
    return Seat(
        stream=stream,
        leaf=stream,
        above=None,
        first_position=0,
        places=np.zeros(num_prompt + num_steps, dtype=np.int32),
        num_prompt_tokens=num_prompt,
    )


def compacted(log: list[object], compaction: Compaction | None) -> list[object]:
    return log if compaction is None else [log[place] for place in compaction.places]


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), min_size=1, max_size=30),
    st.integers(1, 4),
    st.floats(0, 1),
)
def test_sequences_that_come_and_go_find_their_own(sizes: list[tuple[int, int]], num_seats: int, share: float) -> None:
    """(tokens of the prompt, steps until it ends) of each sequence; room for what any of them, or fewer, can need."""
    largest = sorted((sum(size) for size in sizes), reverse=True)
    capacity = max(int(share * sum(largest[:num_seats])), largest[0])
    group = GroupLog(group=0, num_seats=num_seats, capacity=capacity, num_promisable=capacity)
    waiting = list(enumerate(sizes))
    log: list[object] = []
    version = {0: 0}
    contexts: list[np.ndarray] = []
    while waiting or group.seats:
        entering = []
        while waiting and group.has_room(sum(waiting[0][1])):
            stream, size = waiting.pop(0)
            entering.append(a_seat(stream, *size))
            group.promise(stream, sum(size))
            group.enter(entering[-1])
        log = compacted(log, group.begin_sweep(sum(seat.num_prompt_tokens for seat in entering)))
        step = group.step()
        log = log[: step.log_length] + [(seat.stream, seat.length - 1) for seat in step.seats]
        if step.version == version[0]:  # then the device's copy of the places need only grow by a column
            assert [list(seat.own_places[:-1]) for seat in step.seats] == [list(context) for context in contexts]
            assert [seat.own_places[-1] for seat in step.seats] == list(range(step.log_length, group.length))
        version[0], contexts = step.version, [seat.own_places.copy() for seat in step.seats]
        for seat in entering:
            if seat.num_prompt_tokens:
                group.append(seat, seat.num_prompt_tokens)
                log += [(seat.stream, place) for place in range(seat.num_prompt_tokens)]
        assert group.length == len(log) <= capacity
        for seat in list(group.seats):
            assert [log[place] for place in seat.own_places] == [(seat.stream, place) for place in range(seat.length)]
            if seat.is_stepping and seat.length == len(seat.places):
                group.leave(seat.stream)


@given(st.data())
def test_shared_nodes_move_up_when_room_is_needed(data: st.DataObject) -> None:
    shared, log = SharedLog(20), list[object]()
    for node in range(20):
        live = sum(shared._sizes[other] for other in shared.starts)
        size = data.draw(st.integers(1, 8))
        if live + size > shared.capacity:
            for other in data.draw(st.permutations(sorted(shared.starts)))[: -(-len(shared.starts) // 2)]:
                shared.forget(other)
            live = sum(shared._sizes[other] for other in shared.starts)
            size = min(size, shared.capacity - live)
        compaction = shared.begin_sweep(size)
        assert compaction is None or compaction.group == SHARED
        log = compacted(log, compaction)[: shared.length]
        if size:
            shared.append(node, size)
            log += [(node, place) for place in range(size)]
        for other, start in shared.starts.items():
            assert log[start : start + shared._sizes[other]] == [
                (other, place) for place in range(shared._sizes[other])
            ]


@pytest.mark.parametrize(
    ("crossing", "num_steps"),
    [
        (EVERYWHERE, 1),  # twenty tokens read for nothing, twice, outweigh writing 63 at half the weight
        (Crossing(0.5, 0.5), 1),
        (Crossing(0.5, 1.0), 9),  # ten times ten, for half of 107 read and half of 87 written at half the weight
        (Crossing(0.0, 1.0), 40),  # nothing is read for nothing: when it is full
        (Crossing(0.0, 0.0), 40),
    ],
)
def test_a_log_is_compacted_once_its_waste_outweighs_the_writing(crossing: Crossing, num_steps: int) -> None:
    group = GroupLog(group=0, num_seats=4, capacity=200, num_promisable=880, crossing=crossing)
    for stream in range(4):
        group.promise(stream, 220)
        group.enter(a_seat(stream, 20, 200))
    group.begin_sweep(80)
    for seat in group.seats:
        group.append(seat, 20)
    group.leave(3)
    sweeps = 0
    while (compaction := group.begin_sweep(0)) is None:
        group.step()
        sweeps += 1
    assert sweeps == num_steps
    num_needed = 3 * (20 + num_steps)
    assert (compaction.log_length, len(compaction.places), group.length) == (num_needed + 20, num_needed, num_needed)
