"""Rows on the device: what is kept there from sweep to sweep is what would be made anew."""

from __future__ import annotations

import random

import pytest
import torch

from flexeval.engine.compute import row as rows
from flexeval.engine.compute.readout import Readout, Tokens
from flexeval.engine.compute.row import DecodeBatch, RowMaker
from flexeval.engine.scheduler import Scheduler
from flexeval.planning.rows import RowPlan
from flexeval.policy.policy import Policy
from flexeval.request import TokenRequest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def assert_is(batch: DecodeBatch, plan: RowPlan) -> None:
    """The batch holds its span's contexts, padded with place 0."""
    (span,) = [span for span in plan.decode if span.group == batch.span.group]
    contexts = [own.tolist() for own in span.own_tokens]
    longest = max(map(len, contexts))
    padded = [own + [0] * (longest - len(own)) for own in contexts]
    assert (batch.num_sequences, batch.max_length) == (len(contexts), longest)
    assert batch.index_BS.dtype == batch.lengths_B.dtype == torch.int32
    assert batch.index_BS.tolist() == padded
    assert batch.lengths_B.tolist() == list(map(len, contexts))
    assert batch.is_context_BS.tolist() == [[step < len(own) for step in range(longest)] for own in contexts]
    first = batch.key_position_BS[:, 0].tolist()
    assert first == list(span.first_own_positions)
    assert batch.key_position_BS.tolist() == [[start + step for step in range(longest)] for start in first]


def test_contexts_stay_on_the_device_and_grow(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SPARE_STEPS", 5)
    rng = random.Random(0)
    requests = [
        TokenRequest(
            prompt_ids=(*range(40), 100 + index, *range(rng.randint(0, 9))),
            max_tokens=40,
            is_stopped=lambda ids, length=length: len(ids) == length,
        )
        for index, length in enumerate(rng.choices([2, 9, 30], k=24))
    ]
    scheduler, maker = Scheduler(requests, Policy(group_sequences=4, num_groups=2)), RowMaker(device)
    num_laid_out = num_steps = 0
    last: dict[int, int] = {}
    while scheduler.has_work:
        for index, plan in enumerate(scheduler.plan_sweep()):
            row = maker.make(index, plan)
            assert row.ids_1T.tolist() == [list(plan.token_ids)]
            assert row.positions_1T.tolist() == [list(plan.positions)]
            for batch in row.decode:
                assert_is(batch, plan)
                num_steps += 1
                num_laid_out += last.get(batch.span.group) != batch.index_BS.data_ptr()
                last[batch.span.group] = batch.index_BS.data_ptr()
            scheduler.record(plan, Readout(Tokens.zeros(0, 0), Tokens.zeros(len(plan.generators), 0)))
        scheduler.finish_sweep(1.0)
    assert num_steps > 50 and num_laid_out < num_steps / 2, (num_steps, num_laid_out)
