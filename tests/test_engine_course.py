"""A run that is followed as it goes: foretold again after its first block, and placed anew where that pays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_api import without_time
from test_engine_placement import loaded, ragged_work
from test_engine_shortage import MANY, Listener, load
from tiny_directory import write_tiny_model
from tiny_models import assert_equal_results

from flexeval.backends import course, placing
from flexeval.engine.scheduler import Scheduler
from flexeval.engine.trace import SweepTrace
from flexeval.errors import CapacityError
from flexeval.policy.correction import Correction
from flexeval.policy.cost import CostModel
from flexeval.policy.policy import Policy, Split, apart
from flexeval.policy.sweeps import COUNTS, DECODE, PREFILL, Sweep
from flexeval.request import TokenRequest, TokenResult

BLOCKS = Policy(row_tokens=24, sweep_tokens=48, group_sequences=2, num_groups=2)
OTHER = Policy(row_tokens=128, sweep_tokens=256, group_sequences=3, num_groups=1, weights=Split(cpu=0.5, disk=0.5))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is long enough to be measured, and a search for a policy that comes in blocks."""
    monkeypatch.setattr(course, "LEAST_MEASURED_S", 0.0)

    def choose(*_: object, fixed: Policy | None, is_apart: bool) -> Policy:
        return fixed or (apart(BLOCKS) if is_apart else BLOCKS)

    monkeypatch.setattr("flexeval.backends.placing.choose", choose)


@pytest.fixture
def moves(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> list[Policy]:
    """Another policy always pays, once; it fills this list with what is was asked about."""
    asked: list[Policy] = []

    def find(model: CostModel, policy: Policy, **_: Any) -> Policy | None:
        asked.append(policy)
        return OTHER if policy != OTHER else None

    monkeypatch.setattr(course, "is_worth_a_search", lambda *_: True)
    monkeypatch.setattr(course, "better_policy", find)
    return asked


def test_a_batch_is_foretold_again_after_its_first_block(model: str, small_blocks: None) -> None:
    with load(model, policy="auto") as engine:
        engine.generate(MANY)
        usage = engine.usage()
        gauge = engine.gauge()
    assert usage.corrected_s > 0 and usage.moves == []
    assert gauge.corrected_s == usage.corrected_s and gauge.foretold_s == usage.predicted_s
    assert gauge.left_s == 0


def test_a_short_batch_is_not_foretold_again(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "LEAST_MEASURED_S", 1e9)
    with load(model) as engine:
        engine.generate(MANY)
        assert engine.usage().corrected_s == 0 and engine.gauge().corrected_s is None


def traced(number: int, *phases: str) -> SweepTrace:
    """A sweep with a part of each phase."""
    done = {phase: Sweep(phase=phase, num_sweeps=1, num_calls=1, **dict.fromkeys(COUNTS, 1.0)) for phase in phases}
    return SweepTrace(num_fresh_tokens=number, num_decode_tokens=0, done=done)


@pytest.mark.parametrize(
    ("phases", "first"),
    [
        ([(PREFILL,)], []),
        ([(PREFILL,), (PREFILL,)], [0]),
        ([(PREFILL,), (PREFILL, DECODE), (DECODE,), (PREFILL, DECODE)], [0, 1]),
        ([(PREFILL,), (DECODE,), (DECODE,)], [1]),
    ],
)
def test_the_first_sweep_of_a_phase_is_known_by_the_others(phases: list[tuple[str, ...]], first: list[int]) -> None:
    sweeps = [traced(number, *parts) for number, parts in enumerate(phases)]
    found, others = course._first_of_phases(sweeps)
    assert [sweep.num_fresh_tokens for sweep in found] == first
    assert others == [sweep for sweep in sweeps if sweep not in found]


def test_a_block_has_a_few_sweeps_of_each_phase(
    model: str, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[int] = []

    def correct(
        model: CostModel, policy: Policy, sweeps: list[object], known: Correction, *, untimed: list[object]
    ) -> Correction:
        looked_at.append(len(sweeps) + len(untimed))
        return known

    monkeypatch.setattr(course, "correct", correct)
    with load(model, policy="auto") as engine:
        engine.generate([request for request in MANY if request.max_tokens > 1])
        num_steps = sum(DECODE in sweep.done for sweep in engine.trace.sweeps)
    assert num_steps > 8 and looked_at[0] >= 8


def test_the_rest_is_placed_anew_and_every_answer_is_the_same_and_given_once(
    model: str, moves: list[Policy], tmp_path: Path
) -> None:
    with load(model) as engine:
        expected = list(map(without_time, engine.generate(MANY)))
    assert not moves, "what was set by hand stays"
    listen = Listener()
    with load(model, policy="auto", disk=str(tmp_path)) as engine:
        assert list(map(without_time, engine.generate(MANY, on_completions=listen))) == expected
        usage = engine.usage()
    assert listen.told == dict.fromkeys(range(len(MANY)), 1)
    [words] = usage.moves
    assert "weights 50% cpu, 50% disk instead of 100% cpu" in words and "num groups 1 instead of 2" in words
    assert Policy.from_json(usage.policy) == OTHER and moves[0] == BLOCKS
    assert usage.splits == [] and usage.predicted_s > 0 and usage.corrected_s > 0


def test_a_better_placement_that_finds_no_room_is_given_up(
    model: str, moves: list[Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was begun is answered; the rest is, too, on a placement that is searched for within less memory."""
    place, num_placed = placing.place_weights, 0

    def fail_at_the_second(*args: Any, **options: Any) -> Any:
        nonlocal num_placed
        num_placed += 1
        if num_placed == 2:
            raise CapacityError("no room for 5 MiB more in cpu memory", tier="cpu")
        return place(*args, **options)

    monkeypatch.setattr(placing, "place_weights", fail_at_the_second)
    listen = Listener()
    with load(model) as engine:
        expected = list(map(without_time, engine.generate(MANY)))
    num_placed = 0
    with load(model, policy="auto", disk=str(tmp_path)) as engine:
        assert list(map(without_time, engine.generate(MANY, on_completions=listen))) == expected
        usage = engine.usage()
    assert listen.told == dict.fromkeys(range(len(MANY)), 1) and num_placed >= 3
    assert len(usage.splits) == 1 and "of cpu memory used instead of" in usage.splits[0]
    assert len(usage.moves) >= 1 and usage.predicted_s > 0


SCORES, TEXTS = ([r for r in MANY if (r.max_tokens > 1) == generates] for generates in (False, True))


@pytest.mark.parametrize("searches", [0.0, 1e12], ids=["worth-it", "too-short"])
def test_another_batch_has_its_own_sizes(model: str, searches: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that only scores has a single sequence in flight: texts would be written one after the other."""
    monkeypatch.setattr("flexeval.policy.replanning.SEARCHES", searches)
    with load(model, policy="auto") as engine:
        engine.generate(SCORES)
        alone, executor = Policy.from_json(engine.usage().policy), engine._placements.at_hand.executor
        answers = engine.generate(TEXTS)
        together, stays = Policy.from_json(engine.usage().policy), engine._placements.at_hand.executor is executor
        engine.generate(SCORES)
        engine.generate(TEXTS)
        assert Policy.from_json(engine.usage().policy) == together, "whatever came between"
    assert alone.block_sequences == 1 and stays
    assert (together.block_sequences > 1) == (searches == 0)
    with load(model, policy="auto") as engine:
        assert list(map(without_time, answers)) == list(map(without_time, engine.generate(TEXTS)))


def test_what_is_deterministic_stays_where_it_is(model: str, moves: list[Policy]) -> None:
    with load(model, policy="auto", deterministic=True) as engine:
        engine.generate(MANY)
        assert not moves and engine.usage().moves == []
        assert engine.usage().corrected_s > 0, "it is foretold again all the same"


def closing_at(sweep: int, waiting: list[int]) -> Callable[[Callable[[], list[int]]], bool]:
    """Asked after each sweep: it is enough after so many; what waits then is noted."""
    num_sweeps = 0

    def is_enough(find_waiting: Callable[[], list[int]]) -> bool:
        nonlocal num_sweeps
        num_sweeps += 1
        if num_sweeps == sweep:
            waiting.extend(find_waiting())
        return num_sweeps == sweep

    return is_enough


@settings(max_examples=15, deadline=None)
@given(
    requests=ragged_work(),
    sweep=st.integers(1, 6),
    rows=st.sampled_from([16, 64]),
    sweeps=st.sampled_from([16, 40, 200]),
    seats=st.integers(1, 4),
)
def test_what_has_begun_is_finished_and_nothing_else(
    requests: list[TokenRequest], sweep: int, rows: int, sweeps: int, seats: int, tmp_path_factory: Any
) -> None:
    """Prompts that take several sweeps are begun with their first one."""
    policy = Policy(row_tokens=rows, sweep_tokens=max(rows, sweeps), group_sequences=seats)
    told: dict[int, TokenResult] = {}
    with loaded(policy, tmp_path_factory.mktemp("disk")) as executor:
        whole = executor.execute(requests)
        waiting: list[int] = []
        executor.execute(requests, on_results=told.update, is_enough=closing_at(sweep, waiting))
        again = executor.execute(requests)
    assert sorted([*told, *waiting]) == list(range(len(requests)))
    assert_equal_results(list(told.values()), [whole[index] for index in told])
    assert_equal_results(again, whole)


def test_a_closed_scheduler_expects_no_sweep_for_what_is_left_out() -> None:
    requests = [TokenRequest(prompt_ids=tuple(range(n, n + 20)), max_tokens=1) for n in (0, 100, 200)]
    scheduler = Scheduler(requests, Policy(row_tokens=20, sweep_tokens=20))
    scheduler.plan_sweep()
    assert scheduler.expects_more and scheduler.find_waiting() == [1, 2]
    scheduler.close()
    assert not scheduler.expects_more and scheduler.is_closed
