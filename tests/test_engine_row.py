"""Rows on the device: what is kept there from sweep to sweep is what would be made anew."""

from __future__ import annotations

import random

import pytest
import torch

from flexeval.engine.compute import contexts
from flexeval.engine.compute.contexts import DecodeBatch
from flexeval.engine.compute.readout import Readout, Tokens
from flexeval.engine.compute.row import RowMaker
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
    assert batch.index_BS.shape == (len(contexts), longest) and longest <= batch.room
    assert batch.index_BS.dtype == batch.lengths_B.dtype == torch.int32
    assert batch.index_BS.tolist() == padded
    assert batch.lengths_B.tolist() == list(map(len, contexts))
    assert batch.last_place_B.tolist() == [own[-1] for own in contexts]
    assert batch.is_context_BS.tolist() == [[step < len(own) for step in range(longest)] for own in contexts]


def test_contexts_stay_on_the_device_and_grow(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "SPARE_STEPS", 2)
    monkeypatch.setattr(contexts, "ROOM_STEPS", 3)
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
    num_moved = num_steps = num_kept = 0
    last: dict[int, DecodeBatch] = {}
    while scheduler.has_work:
        for index, plan in enumerate(scheduler.plan_sweep()):
            row = maker.make(index, plan)
            assert (row.steady is None) == (bool(plan.fresh) or bool(plan.compactions))
            assert row.ids_1T.tolist() == [list(plan.token_ids)]
            assert row.positions_1T.tolist() == [list(plan.positions)]
            for batch, whole in zip(row.decode, maker.for_later(row).decode, strict=True):
                assert_is(batch, plan)
                num_steps += 1
                assert (whole.index_BS.data_ptr(), whole.index_BS.shape[1]) == (batch.index_BS.data_ptr(), batch.room)
                if (before := last.get(batch.span.group)) is not None:
                    stays = before.index_BS.data_ptr() == batch.index_BS.data_ptr()
                    assert stays == (before.address == batch.address)
                    assert not stays or before.lengths_B.data_ptr() == batch.lengths_B.data_ptr()
                    num_moved += not stays
                    num_kept += stays and before.span.version != batch.span.version
                last[batch.span.group] = batch
            scheduler.record(plan, Readout(Tokens.zeros(0, 0), Tokens.zeros(len(plan.generators), 0)))
        scheduler.finish_sweep(1.0)
    assert num_steps > 50 and 0 < num_moved < num_steps / 4 and num_kept > 10, (num_steps, num_moved, num_kept)
