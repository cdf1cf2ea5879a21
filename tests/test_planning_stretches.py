"""Contexts fall into stretches and a rest that hold every token once, where it lies."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexeval.planning.logs import GroupLog, Seat
from flexeval.planning.stretches import MIN_TOKENS, Stretch, lay_out


def offsets(stretch: Stretch) -> list[int]:
    return list(range(stretch.offset, stretch.offset + stretch.length))


def check(places: np.ndarray) -> int:
    """Number of tokens left to be gathered."""
    stretches, rest = lay_out(places)
    assert sorted([*rest, *(offset for stretch in stretches for offset in offsets(stretch))]) == list(
        range(len(places))
    )
    for stretch in stretches:
        assert stretch.length >= MIN_TOKENS
        lies = stretch.place + np.arange(stretch.length) * stretch.step
        assert (places[offsets(stretch)] == lies).all()
    return len(rest)


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 5)), min_size=1, max_size=6))
def test_every_token_is_in_one_place(runs: list[tuple[int, int]]) -> None:
    steps = [step for length, step in runs for _ in range(length)]
    check(np.cumsum(steps, dtype=np.int32))


@pytest.mark.parametrize("places", [[7], [7, 8], [0, 5, 6]])
def test_short_contexts_are_gathered(places: list[int]) -> None:
    assert lay_out(np.array(places)).rest.tolist() == list(range(len(places)))


def test_a_prompt_and_the_steps_after_it_are_two_stretches() -> None:
    places = np.concatenate([np.arange(100, 612), 700 + 32 * np.arange(128)])
    stretches, rest = lay_out(places)
    assert stretches == (
        Stretch(offset=0, place=100, step=1, length=512),
        Stretch(offset=512, place=700, step=32, length=128),
    )
    assert not len(rest)


def test_little_of_a_log_that_has_been_lived_in_is_gathered() -> None:
    """Sequences of a group end and are replaced, and the log is compacted, as in `GroupLog`."""
    rng = random.Random(0)
    log, num_entered, num_tokens, num_left = GroupLog(group=0, num_seats=8, capacity=6000), 0, 0, 0
    for _ in range(300):
        for seat in [seat for seat in log.seats if rng.random() < 0.02]:
            log.leave(seat.stream)
        entering = 8 - len(log.seats)
        log.begin_sweep(400 * entering)
        for seat in log.step().seats:
            num_tokens, num_left = num_tokens + seat.length, num_left + check(seat.own_places)
        for _ in range(entering):
            seat = Seat(
                stream=num_entered,
                leaf=num_entered,
                above=None,
                first_position=0,
                places=np.zeros(750, dtype=np.int32),
                num_prompt_tokens=400,
            )
            num_entered += 1
            log.enter(seat)
            log.append(seat, 400)
    assert num_entered > 20
    assert num_left < 0.2 * num_tokens
