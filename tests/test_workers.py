"""Threads that compute alone: in order, together, and nobody else's threads are counted anew."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from flexeval.workers import Workers, num_spare_cores


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_results_come_in_order_from_threads_that_are_torchs_only_one() -> None:
    everyone = threading.Barrier(3)

    def work(item: int) -> tuple[int, int]:
        everyone.wait(timeout=10)  # ends only if all three run at once
        return item, torch.get_num_threads()

    with Workers(3) as workers:
        for _ in range(2):
            assert workers.map(work, range(6)) == [(item, 1) for item in range(6)]
    assert torch.get_num_threads() == 2
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [2], "a thread that torch has not seen before"


def test_a_failure_is_the_callers_and_threads_end() -> None:
    before = threading.active_count()
    with Workers(2) as workers:
        with pytest.raises(ZeroDivisionError):
            workers.map(lambda item: 1 // item, [1, 0])
        assert workers.map(lambda item: 1 // item, [1]) == [1]
        assert threading.active_count() == before + 2
    assert threading.active_count() == before
    assert num_spare_cores() >= 1
