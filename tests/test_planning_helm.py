"""A suite of HELM Lite's shape: most prompt tokens are computed once for many, and planning costs what it must."""

from __future__ import annotations

import random
import sys
from typing import Any, NamedTuple

import pytest

from flexeval.engine.compute.readout import Readout, Tokens
from flexeval.engine.scheduler import Scheduler
from flexeval.engine.sizes import measure_workload
from flexeval.planning.summary import PlanSummary
from flexeval.policy.policy import Policy
from flexeval.request import TokenRequest


class Task(NamedTuple):
    """One run, or several of one kind, with the token counts measured on the real ones."""

    num_runs: int
    num_questions: int
    num_header: int
    num_own: int
    max_tokens: int


HELM_LITE = (
    Task(num_runs=57, num_questions=100, num_header=583, num_own=103, max_tokens=1),  # mmlu
    Task(num_runs=1, num_questions=300, num_header=3100, num_own=700, max_tokens=100),  # narrative_qa
    Task(num_runs=2, num_questions=300, num_header=700, num_own=120, max_tokens=300),  # natural_qa
    Task(num_runs=7, num_questions=100, num_header=900, num_own=90, max_tokens=400),  # math
    Task(num_runs=1, num_questions=300, num_header=750, num_own=70, max_tokens=400),  # gsm
    Task(num_runs=5, num_questions=100, num_header=300, num_own=100, max_tokens=30),  # legalbench
    Task(num_runs=5, num_questions=100, num_header=60, num_own=50, max_tokens=100),  # wmt_14, one example
    Task(num_runs=1, num_questions=300, num_header=900, num_own=180, max_tokens=1),  # med_qa
)
POLICY = Policy(row_tokens=2048, sweep_tokens=16384, group_sequences=32, num_groups=4)


def requests_of(tasks: tuple[Task, ...], *, share: float = 1.0) -> list[TokenRequest]:
    """Prompts of random tokens: a header for each run, then a question of about the task's length."""
    rng = random.Random(0)
    requests = []
    for task in tasks:
        for _ in range(task.num_runs):
            header = rng.choices(range(50_000), k=task.num_header)
            for _ in range(round(task.num_questions * share)):
                question = rng.choices(range(50_000), k=rng.randint(task.num_own // 2, task.num_own * 3 // 2))
                requests.append(TokenRequest(prompt_ids=(*header, *question), max_tokens=task.max_tokens))
    return requests


def test_four_of_five_prompt_tokens_are_saved() -> None:
    requests = requests_of(HELM_LITE, share=0.2)
    again = Scheduler([*requests, *requests[:50]], POLICY).summary
    summary = Scheduler(requests, POLICY).summary
    assert summary.saved_share > 0.8
    assert summary.num_duplicate_tokens == 0
    assert again.num_computed_tokens == summary.num_computed_tokens
    assert again.num_duplicate_tokens == sum(len(request.prompt_ids) for request in requests[:50])
    for one in (summary, again):
        saved = one.num_duplicate_tokens + one.num_shared_tokens
        assert one.num_asked_tokens == one.num_computed_tokens + saved
    assert str(summary).startswith(f"{summary.num_asked_tokens:,} prompt tokens asked")


def test_an_empty_batch_has_nothing_to_save() -> None:
    summary = Scheduler([], POLICY).summary
    assert summary == PlanSummary(
        num_requests=0,
        num_distinct=0,
        num_asked_tokens=0,
        num_duplicate_tokens=0,
        num_shared_tokens=0,
        num_last_tokens=0,
        num_computed_tokens=0,
        num_nodes=0,
    )
    assert summary.saved_share == 0


def count_calls(num_requests: int, max_tokens: int) -> int:
    """Calls of Python functions, and by them, that it takes to plan and follow a batch; no tensor is touched."""
    task = Task(num_runs=num_requests // 100, num_questions=100, num_header=100, num_own=20, max_tokens=max_tokens)
    requests = requests_of((task,))
    num_calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        measure_workload(requests)
        scheduler = Scheduler(requests, POLICY)
        while scheduler.has_work:
            for plan in scheduler.plan_sweep():
                scheduler.record(plan, Readout(Tokens.zeros(0, 0), Tokens.zeros(len(plan.generators), 0)))
            scheduler.finish_sweep(1.0)
    finally:
        sys.setprofile(None)
    return num_calls


@pytest.mark.parametrize("max_tokens", [1, 6], ids=["scoring", "generating"])
def test_planning_costs_in_proportion_to_the_requests(max_tokens: int) -> None:
    once, fourfold, sixteenfold = (count_calls(num, max_tokens) for num in (300, 1200, 4800))
    assert fourfold < 4.4 * once
    assert sixteenfold < 4.4 * fourfold
