"""The order of a sweep's work: nothing that could go on is kept waiting, and all answers are what they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny_models import assert_equal_results, tiny_case, tiny_config, tiny_model

from flexeval.engine import executor as executor_module
from flexeval.engine.checkpoint import StateDictCheckpoint
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.executor import Executor
from flexeval.engine.sweep import Sweeper
from flexeval.planning.rows import RowPlan
from flexeval.policy.policy import Policy

NUM_LAYERS = 4


@pytest.mark.parametrize("counts", [(3, 0, 2, 0), (3, 3, 3, 3)], ids=["in-turn", "all"])
@pytest.mark.parametrize("overlap", [False, True], ids=["inline", "threads"])
def test_a_row_that_the_cpu_attended_for_goes_on_before_the_next_comes_back(
    counts: tuple[int, ...], overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To its next layer, wherever that attends in place, or to be read off: the CPU is at the other rows meanwhile."""
    events: list[tuple[str, int, int]] = []

    def noted(name: str, what: Callable[..., Any], place: Callable[..., tuple[int, int]]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            events.append((name, *place(*args)))
            return what(*args, **options)

        return run

    for name, place in (
        ("_run", lambda self, layer, row, *rest: (layer, row.index)),
        ("_set_out", lambda self, layer, row, *rest: (layer, row.index)),
        ("_come_back", lambda self, row, apart, *rest: (apart.layer, row.index)),
    ):
        monkeypatch.setattr(Sweeper, name, noted(name, getattr(Sweeper, name), place))
    order: list[int] = []
    monkeypatch.setattr(
        executor_module,
        "read_row",
        noted("read", executor_module.read_row, lambda plan, *rest: (NUM_LAYERS, order.pop(0))),
    )
    make_rows = Executor._make_rows

    def make(self: Executor, maker: Any, plans: Any) -> Any:
        rows = make_rows(self, maker, plans)
        order[:] = [row.index for row in rows]
        return rows

    monkeypatch.setattr(Executor, "_make_rows", make)

    def first_rows(plans: Sequence[RowPlan], **_: object) -> list[set[int]]:
        decode = [index for index, plan in enumerate(plans) if plan.decode and not plan.compactions]
        return [set(decode[:count]) for count in counts]

    monkeypatch.setattr(executor_module, "host_rows", first_rows)
    anatomy, case = Anatomy(tiny_config("llama"), torch.float32), tiny_case("llama")
    with Executor(
        anatomy,
        StateDictCheckpoint(anatomy, tiny_model("llama").state_dict()),
        Policy(host_attention=0.5, group_sequences=2, num_groups=3),
        codec=None,
        device=torch.device("cpu"),
        disk_tier=None,
        overlap=overlap,
    ) as executor:
        assert_equal_results(executor.execute(case.requests), case.expected)
    came_back = [index for index, event in enumerate(events) if event[0] == "_come_back"]
    assert {events[index][1] for index in came_back} == {layer for layer, count in enumerate(counts) if count}
    went_on = {"_run": 0, "_set_out": 0, "read": 0}
    for index in came_back:
        (_, layer, row), then = events[index], events[index + 1]
        assert then[1:] == (layer + 1, row)
        went_on[then[0]] += 1
    assert bool(went_on["_run"]) == (0 in counts) and bool(went_on["_set_out"]) == bool(went_on["read"]) == (
        counts[3] > 0
    )
