"""A thread gets a team of the spare cores; nobody else's threads are counted anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flexeval.engine.memory.attention_lane import AttentionLane
from flexeval.engine.memory.lane import InlineLane, ThreadLane
from flexeval.engine.trace import Trace
from flexeval.team import give_spare_cores, num_spare_cores


@pytest.fixture(autouse=True)
def three_of_five_cores_are_spare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(5)), raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_a_new_thread(ask: Callable[[], int]) -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ask).result()


@pytest.mark.parametrize("has_asked_before", [False, True])
def test_one_thread_has_a_team_and_others_have_what_they_had(has_asked_before: bool) -> None:
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as other:
        assert other.submit(torch.get_num_threads).result() == 2
        if has_asked_before:
            assert pool.submit(torch.get_num_threads).result() == 2
        give_spare_cores(lambda take: pool.submit(take).result())
        pool.submit(lambda: torch.randn(10**5).exp()).result()
        assert pool.submit(torch.get_num_threads).result() == 3
        assert other.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2
    assert in_a_new_thread(torch.get_num_threads) == 2


def test_the_callers_own_thread_is_left_as_it_is() -> None:
    give_spare_cores(lambda take: take())
    assert torch.get_num_threads() == in_a_new_thread(torch.get_num_threads) == 2


def test_the_lane_that_attends_has_a_team() -> None:
    cpu = torch.device("cpu")
    lane = ThreadLane("host_attention", cpu)
    try:
        AttentionLane(lane, device=cpu, trace=Trace())
        assert lane.submit(torch.get_num_threads).wait() == 3
    finally:
        lane.close()
    AttentionLane(InlineLane(), device=cpu, trace=Trace())
    assert torch.get_num_threads() == in_a_new_thread(torch.get_num_threads) == 2


def test_some_core_is_always_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_spare_cores() == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert num_spare_cores() == 1
