"""What rows read is there until the row after the next, and is not allocated twice."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch

from flexeval.engine.compute.pace import Pace
from flexeval.engine.memory.lane import Transfer, _Outcome
from flexeval.engine.memory.read_buffers import ReadBuffers

CPU = torch.device("cpu")


def test_two_rows_are_there_at_once_and_the_third_takes_the_place_of_the_first() -> None:
    buffers, taken = ReadBuffers(CPU), []
    for row in range(6):
        buffers.next_turn()
        taken.append([buffers.take(100, most_bytes=200).fill_(row), buffers.take(50, most_bytes=50).fill_(row)])
        for before in taken[-2:]:
            assert len({int(number) for part in before for number in part}) == 1, "not overwritten by the next"
    places = [[part.data_ptr() for part in row] for row in taken]
    assert places == [places[0], places[1]] * 3
    assert len({place for row in places[:2] for place in row}) == 4


def test_a_log_that_grows_stays_in_its_place() -> None:
    buffers, places = ReadBuffers(CPU), []
    for length in range(100, 110):
        buffers.next_turn()
        places.append(buffers.take(length, most_bytes=120).data_ptr())
        assert len(buffers.take(1, most_bytes=1)) == 1
    assert len(set(places)) == 2
    buffers.next_turn()
    assert buffers.take(121, most_bytes=300).numel() == 121, "a larger one than was foreseen"
    with pytest.raises(AssertionError):
        buffers.take(2, most_bytes=1)


def test_a_row_that_takes_nothing_takes_no_turn() -> None:
    buffers = ReadBuffers(CPU)
    buffers.next_turn()
    first = buffers.take(10, most_bytes=10)
    for _ in range(3):
        buffers.next_turn()
    second = buffers.take(10, most_bytes=10)
    assert second.data_ptr() != first.data_ptr()


def test_what_another_lane_reads_is_not_overwritten_before_it_is_done() -> None:
    buffers, waited = ReadBuffers(CPU), []

    class Reader(Transfer[None]):
        def wait(self) -> None:
            waited.append(True)

    done: Future[_Outcome[None]] = Future()
    buffers.next_turn()
    buffers.take(10, most_bytes=10)
    buffers.keep_for(Reader(done))
    buffers.next_turn()
    buffers.take(10, most_bytes=10)
    assert not waited
    buffers.next_turn()
    assert waited == [True]
    buffers.take(10, most_bytes=10)
    buffers.next_turn()
    buffers.take(10, most_bytes=10)
    buffers.next_turn()
    assert waited == [True], "once"


@pytest.mark.gpu
def test_the_host_is_few_steps_ahead_of_the_device() -> None:
    device = torch.device("cuda")
    pace, work = Pace(device, lead=2), torch.randn(4096, 4096, device=device)
    done = []
    for _ in range(8):
        for _ in range(20):
            work = work @ work / 4096
        done.append(torch.cuda.Event())
        done[-1].record()
        pace.step()
        assert all(event.query() for event in done[:-2])
