"""Lanes: work runs in order, beside the caller, and its result or failure comes out where it is waited for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ragged_requests, tiny_config, tiny_model
from torch.utils._pytree import tree_leaves

from flexeval.engine.checkpoint import StateDictCheckpoint
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.row import Row
from flexeval.engine.executor import Executor
from flexeval.engine.memory.disk import DiskTier
from flexeval.engine.memory.kv import KVCache
from flexeval.engine.memory.kv_context import LoadedContext
from flexeval.engine.memory.lane import InlineLane, Lane, ThreadLane, Transfer, ahead, drain
from flexeval.policy.policy import Policy

SOON_S = 5.0
"""A deadline that only a deadlock misses."""
LANES: dict[str, Callable[[], Lane]] = {
    "inline": InlineLane,
    "thread": lambda: ThreadLane("tested", torch.device("cpu")),
    "cuda": lambda: ThreadLane("tested", torch.device("cuda", 0)),
}
every_lane = pytest.mark.parametrize(
    "lane", ["inline", "thread", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


@pytest.fixture
def lane(request: pytest.FixtureRequest) -> Iterator[Lane]:
    lane = LANES[request.param]()
    yield lane
    lane.close()


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


@every_lane
def test_work_runs_in_the_order_of_submission_and_results_in_any(lane: Lane) -> None:
    ran: list[int] = []

    def work(number: int) -> int:
        ran.append(number)
        return number * number

    transfers = [lane.submit(work, number) for number in range(20)]
    assert [transfer.wait() for transfer in reversed(transfers)] == [n * n for n in reversed(range(20))]
    assert ran == list(range(20))
    assert transfers[3].wait() == 9, "a result can be waited for twice"


@every_lane
def test_a_failure_surfaces_at_wait_and_the_lane_works_on(lane: Lane) -> None:
    failing = lane.submit(lambda: 1 / 0)
    fine = lane.submit(lambda: "fine")
    assert fine.wait() == "fine"
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failing.wait()


@every_lane
def test_draining_waits_for_all_that_was_submitted_and_hides_no_failure_of_it(lane: Lane) -> None:
    done: list[int] = []
    failing = lane.submit(lambda: 1 / 0)
    lane.submit(lambda: (time.sleep(0.02), done.append(1)))
    drain(lane)
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        failing.wait()


@every_lane
def test_work_runs_without_gradients_like_its_caller(lane: Lane) -> None:
    with torch.inference_mode():
        assert lane.submit(torch.is_inference_mode_enabled).wait()


@every_lane
def test_busy_seconds_are_counted(lane: Lane) -> None:
    lane.submit(time.sleep, 0.02).wait()
    drain(lane)
    before, *others = lane.watch.take_laps()
    assert 0.019 <= before < SOON_S and not others


@every_lane
def test_work_belongs_to_the_lap_in_which_its_turn_comes(lane: Lane) -> None:
    lane.submit(time.sleep, 0.02)
    lane.submit(lane.watch.next_lap)
    lane.submit(time.sleep, 0.04)
    lane.submit(lane.watch.next_lap)
    drain(lane)
    first, second, third = lane.watch.take_laps()
    # a device's clock is not the host's: its events lay 0.1 ms closer once
    assert 0.019 <= first < SOON_S and 0.039 <= second < SOON_S and third < 0.01
    assert lane.watch.take_laps() == [0.0]


@pytest.mark.gpu
def test_on_a_gpu_a_lane_is_busy_while_the_device_copies() -> None:
    device = torch.device("cuda", 0)
    lane = ThreadLane("tested", device)
    host = torch.empty(2**29, dtype=torch.uint8, pin_memory=True)
    out = torch.empty_like(host, device=device)
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    lane.submit(lambda: out.copy_(host, non_blocking=True)).wait()
    end.record()
    end.synchronize()
    (busy_s,) = lane.watch.take_laps()
    # An H100's fastest link carries 64 GB/s: the host is done long before the device has copied half a gigabyte.
    assert 2**29 / 64e9 <= busy_s <= start.elapsed_time(end) / 1000
    lane.close()


@every_lane
def test_closing_finishes_what_was_submitted_and_ends_the_thread(lane: Lane) -> None:
    done: list[int] = []
    for number in range(3):
        lane.submit(lambda number=number: (time.sleep(0.005), done.append(number)))
    lane.close()
    assert done == [0, 1, 2]
    assert not [name for name in thread_names() if name.startswith("tested")]
    lane.close()


def test_a_thread_lane_works_beside_its_caller() -> None:
    lane, gate = ThreadLane("tested", torch.device("cpu")), threading.Event()
    transfer = lane.submit(gate.wait, SOON_S)
    assert [name for name in thread_names() if name.startswith("tested")]
    gate.set()  # only a caller that was not held up by the submission gets here in time
    assert transfer.wait() is True
    lane.close()


def test_a_load_may_wait_for_a_store_on_another_lane() -> None:
    loads, stores = ThreadLane("loads", torch.device("cpu")), ThreadLane("stores", torch.device("cpu"))
    gate, log = threading.Event(), []
    store = stores.submit(lambda: (gate.wait(SOON_S), log.append("stored")))
    load = loads.submit(lambda: (store.wait(), log.append("loaded")))
    gate.set()
    load.wait()
    assert log == ["stored", "loaded"]
    loads.close()
    stores.close()


class Watched:
    """A lane that notes what is submitted to it."""

    def __init__(self, lane: Lane):
        self._lane = lane
        self.watch = lane.watch
        self.submitted: list[Any] = []

    def submit(self, work: Callable[..., Any], *args: Any) -> Transfer[Any]:
        self.submitted += args
        return self._lane.submit(work, *args)

    def close(self) -> None:
        self._lane.close()


@every_lane
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_ahead_yields_in_order_and_keeps_the_next_loads_in_flight(lane: Lane, depth: int) -> None:
    watched = Watched(lane)
    for index, value in enumerate(ahead(watched, str, range(6), depth=depth)):
        assert value == str(index)
        assert watched.submitted == list(range(min(index + 1 + depth, 6)))
    assert list(ahead(watched, str, [])) == []


def test_ahead_loads_while_the_caller_computes() -> None:
    lane = ThreadLane("tested", torch.device("cpu"))
    started = [threading.Event() for _ in range(3)]

    def load(key: int) -> int:
        started[key].set()
        return key

    values = ahead(lane, load, range(3))
    assert next(values) == 0
    assert started[1].wait(SOON_S), "the next load runs before it is asked for"
    assert not started[2].is_set()
    assert list(values) == [1, 2]
    lane.close()


@every_lane
def test_ahead_fails_at_the_item_that_failed(lane: Lane) -> None:
    values = ahead(lane, lambda key: 1 // (2 - key), range(4), depth=2)
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(values)


@pytest.mark.gpu
def test_a_lane_on_a_gpu_sees_the_callers_work_and_the_caller_the_lanes() -> None:
    lane = ThreadLane("tested", torch.device("cuda", 0))
    numbers = torch.zeros(1 << 22, device="cuda")
    for _ in range(200):
        numbers += 1
    copied = lane.submit(lambda tensor: tensor.clone().mul_(2), numbers)
    assert copied.wait().eq(400).all()
    lane.close()


@pytest.fixture
def two_lanes() -> Iterator[tuple[ThreadLane, ThreadLane]]:
    first = ThreadLane("first", torch.device("cuda", 0))
    behind = ThreadLane("behind", torch.device("cuda", 0), goes_behind=[first])
    yield first, behind
    for lane in (behind, first):
        lane.close()


@pytest.mark.gpu
def test_a_lane_that_goes_behind_lets_others_through(two_lanes: tuple[ThreadLane, ThreadLane]) -> None:
    """Two copies are always in its stream's queue, so that the device would never come to another stream's."""
    first, behind = two_lanes
    host = torch.zeros(32 * 2**20, dtype=torch.uint8, pin_memory=True)
    device, lane_device = torch.empty_like(host, device="cuda"), torch.empty(1000, dtype=torch.uint8, device="cuda")
    is_through = []

    def copy_all() -> None:
        pieces: deque[torch.cuda.Event] = deque()
        done = torch.cuda.Event()

        def copy_one() -> None:
            lane_device.copy_(host[:1000], non_blocking=True)
            done.record()

        for piece in range(60):
            if piece == 10:
                first.submit(copy_one)._future.result(SOON_S)
            behind.give_way()
            device.copy_(host, non_blocking=True)
            pieces.append(torch.cuda.Event(blocking=True))
            pieces[-1].record()
            if len(pieces) > 2:
                pieces.popleft().synchronize()
            is_through.append(piece >= 10 and done.query())

    behind.submit(copy_all).wait()
    assert is_through.index(True) < 20, is_through


@pytest.mark.gpu
def test_a_lane_does_not_wait_for_what_waits_itself(two_lanes: tuple[ThreadLane, ThreadLane]) -> None:
    first, behind = two_lanes
    torch.cuda._sleep(2**31)  # about a second, at the clock of any GPU
    is_awake = torch.cuda.current_stream().record_event()
    drain(first)
    passed = behind.submit(behind.give_way)
    passed._future.result(SOON_S)
    assert not is_awake.query(), "it was waited for"
    torch.cuda.synchronize()


def test_what_a_row_reads_is_found_by_its_lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane lends tensors that it finds in what it hands back: others would be overwritten while they are read."""
    load, found = KVCache.load, 0

    def spy(self: KVCache, layer: int, row: Row) -> LoadedContext:
        nonlocal found
        context = load(self, layer, row)
        held = [log.data_CB for log in (*context.own.values(), *context.ancestors.values())]
        assert {id(data) for data in held} <= {id(leaf) for leaf in tree_leaves(context)}
        found += len(held)
        return context

    monkeypatch.setattr(KVCache, "load", spy)
    anatomy = Anatomy(tiny_config("llama"), torch.float32)
    checkpoint = StateDictCheckpoint(anatomy, tiny_model("llama").state_dict())
    policy, device = Policy.parse("disk-kv=1"), torch.device("cpu")
    with Executor(anatomy, checkpoint, policy, codec=None, device=device, disk_tier=DiskTier(tmp_path)) as executor:
        executor.execute(ragged_requests())
    assert found > 40
