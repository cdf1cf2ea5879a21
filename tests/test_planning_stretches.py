"""Contexts fall into batches and a rest that hold every token once, where it lies."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexeval.planning.logs import GroupLog, Seat
from flexeval.planning.stretches import MIN_LENGTH, MIN_PART_TOKENS, MIN_TOKENS, Batch, even_runs, lay_out


def places_of(batch: Batch) -> list[range]:
    """Where each part's tokens lie."""
    starts = [batch.place + part * batch.spacing for part in range(len(batch.sequences))]
    return [range(start, start + batch.length * batch.step, batch.step) for start in starts]


def check(contexts: Sequence[np.ndarray], *, num_parts: int = 1) -> list[int]:
    """Number of tokens of each context that are left to be gathered."""
    batches, rest = lay_out(contexts, num_parts=num_parts)
    found: list[list[int]] = [places.tolist() for places in rest]
    for batch in batches:
        assert batch.length >= MIN_LENGTH
        assert len(batch.sequences) * batch.length >= MIN_TOKENS
        assert batch.stop == places_of(batch)[-1][-1] + 1
        for sequence, places in zip(batch.sequences, places_of(batch), strict=True):
            found[sequence] += places
    assert [sorted(places) for places in found] == [places.tolist() for places in contexts]
    assert all((np.diff(places) > 0).all() for places in rest)
    return [len(places) for places in rest]


def log_of(events: Sequence[tuple[str, int]]) -> list[np.ndarray]:
    """Contexts in a log in which sequences `enter` with a prompt, all `step` so many times, and one may `leave`."""
    contexts: dict[int, list[int]] = {}
    length = num_entered = 0
    for event, number in events:
        if event == "enter":
            contexts[num_entered] = list(range(length, length + number))
            length, num_entered = length + number, num_entered + 1
        elif event == "leave" and len(contexts) > 1:
            del contexts[list(contexts)[number % len(contexts)]]
        elif event == "step":
            for _ in range(number):
                for places in contexts.values():
                    places.append(length)
                    length += 1
        elif event == "compact":
            kept = sorted(place for places in contexts.values() for place in places)
            contexts = {name: np.searchsorted(kept, places).tolist() for name, places in contexts.items()}
            length = len(kept)
    return [np.array(places, dtype=np.int32) for places in contexts.values()]


EVENTS = st.one_of(
    st.tuples(st.just("enter"), st.sampled_from([1, 5, 20, 20, 300, 300, 301])),
    st.tuples(st.just("step"), st.integers(1, 90)),
    st.tuples(st.sampled_from(["leave", "compact"]), st.integers(0, 9)),
)


@given(st.lists(EVENTS, max_size=14), st.sampled_from([1, 2, 3, 7, 40]))
def test_every_token_of_a_log_is_in_one_place(events: list[tuple[str, int]], num_parts: int) -> None:
    check(log_of([("enter", 9), *events]), num_parts=num_parts)


@given(st.lists(st.tuples(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(1, 100)), max_size=6))
def test_so_it_is_in_a_log_of_any_pattern(runs: list[tuple[list[int], int]]) -> None:
    """Runs of places that belong to sequences by turns; what is 0's is nobody's."""
    owners = np.array([owner for pattern, times in [([1, 2, 3, 4], 1), *runs] for owner in pattern * times])
    check([np.flatnonzero(owners == owner) for owner in range(1, 5)], num_parts=5)


@pytest.mark.parametrize("places", [[7], [7, 8], [0, 5, 6], range(MIN_TOKENS - 1)])
def test_a_short_context_is_gathered(places: Sequence[int]) -> None:
    batches, (rest,) = lay_out([np.array(places)], num_parts=9)
    assert not batches and rest.tolist() == list(places)


@pytest.mark.parametrize(
    ("places", "shortest", "runs"),
    [
        ([3], 2, []),
        ([3, 9], 2, [(0, 2)]),
        ([0, 5, 10, 40, 45], 2, [(0, 3), (3, 5)]),
        ([0, 5, 7, 12], 2, [(0, 2), (2, 4)]),
        ([0, 1, 2, 3, 9, 15, 21], 4, [(0, 4)]),
        ([0, 1, 2, 3, 9, 15, 21], 3, [(0, 4), (4, 7)]),
    ],
)
def test_runs_of_even_steps_have_no_place_in_common(
    places: list[int], shortest: int, runs: list[tuple[int, int]]
) -> None:
    assert list(even_runs(np.array(places), shortest=shortest)) == [range(*run) for run in runs]


@pytest.mark.parametrize("num_parts", [1, 7, 64])
def test_prompts_of_one_length_are_a_batch_and_the_steps_after_them_another(num_parts: int) -> None:
    contexts = log_of([*[("enter", 512)] * 32, ("step", 20)])
    everyone = tuple(range(32))
    batches, rest = lay_out(contexts, num_parts=num_parts)
    assert batches == (
        Batch(sequences=everyone, place=0, spacing=512, step=1, length=512),
        Batch(sequences=everyone, place=32 * 512, spacing=1, step=32, length=20),
    )
    assert not any(map(len, rest))


@pytest.mark.parametrize(("lengths", "num_batches"), [((300, 400, 500), 3), ((400, 500, 400), 2), ((8,) * 9, 1)])
def test_only_what_lies_alike_and_evenly_is_a_batch(lengths: tuple[int, ...], num_batches: int) -> None:
    batches, rest = lay_out(log_of([("enter", length) for length in lengths]), num_parts=1)
    assert len(batches) == num_batches
    assert not any(map(len, rest))


def test_a_lone_stretch_is_cut_so_that_all_threads_are_busy() -> None:
    """In parts of equal size, and not too short ones; less than a token for each part is left over."""
    contexts = [1000 + 3 * np.arange(1001)]
    (batch,), rest = lay_out(contexts, num_parts=5)
    assert batch == Batch(sequences=(0,) * 5, place=1000, spacing=600, step=3, length=200)
    assert [len(places) for places in rest] == [1]
    (batch,), rest = lay_out(contexts, num_parts=64)
    assert len(batch.sequences) == 1001 // MIN_PART_TOKENS
    assert len(rest[0]) < len(batch.sequences)


def test_few_stretches_are_cut_one_by_one_and_many_are_left_whole() -> None:
    for count, is_cut in ((2, True), (3, False)):
        contexts = log_of([("enter", 512)] * count)
        batches, _ = lay_out(contexts, num_parts=6)
        assert [batch.length for batch in batches] == ([128] * 2 if is_cut else [512])
        check(contexts, num_parts=6)


def test_little_of_a_log_that_has_been_lived_in_is_gathered() -> None:
    """Sequences of a group end and are replaced, and the log is compacted, as in `GroupLog`."""
    rng = random.Random(0)
    log, num_entered, num_tokens, num_left = GroupLog(group=0, num_seats=8, capacity=6000), 0, 0, 0
    num_calls = num_steps = 0
    for _ in range(300):
        for seat in [seat for seat in log.seats if rng.random() < 0.02]:
            log.leave(seat.stream)
        entering = 8 - len(log.seats)
        log.begin_sweep(400 * entering)
        if contexts := [seat.own_places for seat in log.step().seats]:
            num_tokens += sum(map(len, contexts))
            num_left += sum(check(contexts))
            num_calls += len(lay_out(contexts, num_parts=1).batches)
            num_steps += 1
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
    assert num_left < 0.06 * num_tokens, num_left / num_tokens
    assert num_calls < 8 * num_steps, num_calls / num_steps
