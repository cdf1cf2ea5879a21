"""How far a batch is and when it should be done, by arithmetic that can be done by hand."""

from dataclasses import replace

import pytest

from flexeval.meter import Gauge, Meter, PhasePlan, TaskCount

PLAN = {
    "prefill": PhasePlan(num_sweeps=2, num_tokens=1000, elapsed_s=10.0),  # 100 tokens a second
    "decode": PhasePlan(num_sweeps=40, num_tokens=200, elapsed_s=40.0),  # 5 tokens a second
}
START = Gauge(plan=PLAN, planned_bytes={"cpu": 500})


@pytest.fixture
def gauge() -> list[Gauge]:
    """What the engine says, to be set by the test."""
    return [START]


@pytest.fixture
def meter(gauge: list[Gauge]) -> Meter:
    """Six requests, of which two only score and one was answered before."""
    tasks = {"mmlu": [0, 1], "gsm": [2, 3, 4, 5], "again": [1]}
    return Meter("w4", [0, 0, 51, 51, 51, 51], tasks, resumed=[0], read_gauge=lambda: gauge[0])


def test_tasks_are_counted_with_what_was_answered_before(meter: Meter) -> None:
    meter.finish([(1, 0), (4, 10)])
    meter.finish([(4, 10)])  # told twice, counted once
    now = meter.read()
    assert (now.num_requests, now.num_done, now.num_resumed) == (6, 3, 1)
    assert now.tasks == (
        TaskCount(name="mmlu", num_requests=2, num_done=2),
        TaskCount(name="gsm", num_requests=4, num_done=1),
        TaskCount(name="again", num_requests=1, num_done=1),
    )


def test_speed_stands_beside_what_the_plan_says_of_the_same_tokens(meter: Meter, gauge: list[Gauge]) -> None:
    gauge[0] = replace(START, num_sweeps=5, num_prompt_tokens=500, num_decode_tokens=50, elapsed_s=30.0)
    now = meter.read()
    assert now.tokens_per_s == pytest.approx(550 / 30)
    assert now.planned_tokens_per_s == pytest.approx(550 / (500 / 100 + 50 / 5))
    assert now.num_planned_sweeps == 42


def test_what_is_left_goes_at_the_pace_so_far(meter: Meter, gauge: list[Gauge]) -> None:
    gauge[0] = replace(START, num_prompt_tokens=500, num_decode_tokens=50, elapsed_s=30.0)  # twice the plan's 15 s
    assert meter.read().left_s == pytest.approx(2 * (500 / 100 + (200 - 50) / 5))
    meter.finish([(2, 11), (3, 16)])  # beside their first tokens a quarter of what they might have drawn
    in_flight = 50 - 25
    assert meter.read().left_s == pytest.approx(2 * (500 / 100 + (100 - in_flight) / 4 / 5))


def test_before_anything_is_computed_the_plan_says_what_is_left(meter: Meter, gauge: list[Gauge]) -> None:
    now = meter.read()
    assert now.left_s == pytest.approx(10 + 40)
    assert now.tokens_per_s is None and now.planned_tokens_per_s is None
    gauge[0] = Gauge()
    assert meter.read().left_s is None


def test_nothing_is_left_when_all_is_answered(meter: Meter) -> None:
    meter.finish([(index, 0) for index in range(1, 6)])
    assert meter.read().left_s == 0
