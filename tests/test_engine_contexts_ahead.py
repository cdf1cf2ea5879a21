"""What rows read of logs is on its way in the order in which it is asked for, and what several want in turn, once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny_models import tiny_config, tiny_model

from flexeval.engine.checkpoint import StateDictCheckpoint
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.row import Row
from flexeval.engine.executor import Executor
from flexeval.engine.memory.contexts_ahead import ContextsAhead, Wanted
from flexeval.engine.memory.kv import KVCache
from flexeval.engine.memory.kv_context import Cache
from flexeval.engine.memory.lane import InlineLane
from flexeval.planning.rows import KeySource
from flexeval.policy.policy import Policy
from flexeval.request import TokenRequest


class Loads:
    """A cache that notes what is loaded, a layer of which lies in place."""

    def __init__(self) -> None:
        self.lane_in = InlineLane()
        self.done: list[str] = []

    def is_in_place(self, layer: int) -> bool:
        return layer == 1

    def load(self, layer: int, row: Row) -> str:
        self.done.append(f"{layer}:{row.index}")
        return self.done[-1]

    def load_above(self, layer: int, row: Row) -> str:
        self.done.append(f"{layer}:{row.index} above")
        return self.done[-1]


def row(index: int, *places: int) -> Row:
    spans = [SimpleNamespace(source=KeySource(group=-1, log_start=place)) for place in places]
    return cast(Row, SimpleNamespace(index=index, ancestors=spans, read_groups={-1}))


def prompts(index: int) -> Row:
    return cast(Row, SimpleNamespace(index=index, ancestors=[], read_groups=set()))


def test_what_rows_share_is_brought_once_in_turn() -> None:
    loads = Loads()
    rows = [row(0, 5), row(1, 5), row(2, 5, 9), row(3, 5), row(4)]
    wanted = [Wanted(layer, one, is_above_alone=True) for layer in range(3) for one in rows[:4]]
    wanted[4:4] = [Wanted(0, rows[4])]
    wanted.append(Wanted(2, rows[4]))
    contexts = ContextsAhead(cast(Cache, loads), 3, wanted)
    taken = []
    for number, one in enumerate(wanted):
        taken.append(contexts.take(one))
        assert number > 0 or loads.done == ["0:0 above", "0:2 above"], "the next is on its way"
    first = ["0:0 above", "0:0 above", "0:2 above", "0:3 above", "0:4"]
    in_place = ["1:0 above", "1:1 above", "1:2 above", "1:3 above"]
    last = ["2:0 above", "2:0 above", "2:2 above", "2:3 above", "2:4"]
    assert taken == first + in_place + last
    assert sorted(loads.done) == sorted({*taken}), "nothing twice"


def test_a_row_that_reads_no_log_does_not_hold_up_what_the_next_one_reads() -> None:
    loads = Loads()
    rows = [row(0), prompts(1)]
    wanted = [Wanted(layer, one) for layer in (0, 2) for one in rows]
    contexts = ContextsAhead(cast(Cache, loads), 3, wanted)
    assert contexts.take(wanted[0]) == "0:0" and loads.done == ["0:0", "2:0"], "before the first is in use"
    assert [contexts.take(one) for one in wanted[1:]] == ["0:1", "2:0", "2:1"]


@pytest.mark.parametrize("overlap", [False, True])
def test_rows_for_which_the_cpu_attends_get_what_they_share(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nothing lies in place: two groups decode under one header, and a third under another."""
    num_loads = 0
    load_above = KVCache.load_above

    def count(self: KVCache, *rest: Any) -> Any:
        nonlocal num_loads
        num_loads += 1
        return load_above(self, *rest)

    header, other = tuple(range(100, 140)), tuple(range(150, 190))
    tails = [range(start, start + 9) for start in (1, 20, 40, 60)]
    prompts = [header + tuple(tail) for tail in tails] + [other + tuple(tail) for tail in tails[:2]]
    requests = [TokenRequest(prompt_ids=ids, max_tokens=4) for ids in prompts]
    anatomy = Anatomy(tiny_config("llama"), torch.float32)
    checkpoint = StateDictCheckpoint(anatomy, tiny_model("llama").state_dict())
    how = {"codec": None, "device": torch.device("cpu"), "disk_tier": None, "overlap": overlap}
    answers = []
    monkeypatch.setattr(KVCache, "is_in_place", lambda self, layer: False)
    monkeypatch.setattr(KVCache, "load_above", count)
    for share in (0, 1):
        policy = Policy.parse(f"host-attention={share},group-sequences=2,num-groups=3,row-tokens=3")
        with Executor(anatomy, checkpoint, policy, **how) as executor:
            answers.append([result.token_ids for result in executor.execute(requests)])
        assert num_loads == share * 3 * 4 * 2, "sweeps that decode, layers and headers"
    assert answers[0] == answers[1] and len({*answers[0]}) > 1
