"""A trial run corrects what is foretold of a run by how long a few layers take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from policy_cases import LAPTOP
from test_engine_api import without_time
from test_engine_shortage import MANY
from tiny_directory import write_tiny_model

from flexeval.backends import trial
from flexeval.backends.loading import OpenModel, open_model
from flexeval.backends.native import Engine
from flexeval.engine.executor import Executor
from flexeval.engine.sizes import measure_workload, model_shape
from flexeval.policy.correction import NO_CORRECTION
from flexeval.policy.cost import CostModel, Lane
from flexeval.policy.hardware import Hardware
from flexeval.policy.measured import MeasuredSweep
from flexeval.policy.policy import Policy, Split
from flexeval.policy.sweeps import plan_sweeps
from flexeval.request import TokenRequest

NUM_LAYERS = 12
POLICY = Policy(row_tokens=64, sweep_tokens=128, group_sequences=4, num_groups=2)
REQUESTS = [
    TokenRequest(prompt_ids=tuple(range(3 + index, 23 + index)), max_tokens=12 * (index % 2), eos_ids=frozenset({5}))
    for index in range(40)
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def opened(directory: Path) -> OpenModel:
    return open_model(str(directory), setting="none", device="cpu", dtype="float32")


@pytest.fixture
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any run is long enough, and layers are large."""
    for name, value in (("LEAST_RUN_S", 0.0), ("MOST_SHARE", 1e9), ("MOST_S", 1e9), ("LEAST_BYTES", 0)):
        monkeypatch.setattr(trial, name, value)


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """It fills with the layers of each model that is tried out."""
    depths: list[int] = []
    place = trial._place

    def note(opened: OpenModel, num_layers: int, policy: Policy, *, is_apart: bool) -> Executor:
        depths.append(num_layers)
        return place(opened, num_layers, policy, is_apart=is_apart)

    monkeypatch.setattr(trial, "_place", note)
    return depths


def cost_model(opened: OpenModel, hardware: Hardware = LAPTOP) -> CostModel:
    shape = model_shape(opened.anatomy, None, torch.device("cpu"))
    return CostModel(shape=shape, workload=measure_workload(REQUESTS), hardware=hardware)


def try_out(opened: OpenModel, model: CostModel, policy: Policy = POLICY) -> CostModel:
    return replace(model, correction=trial.try_out(opened, model, policy, REQUESTS, is_apart=False))


@pytest.mark.parametrize(("factor", "sweep_s"), [(0.3, 0.0), (4.0, 0.0), (2.0, 0.5)])
def test_what_layers_take_longer_the_run_is_foretold_to_take_longer(
    opened: OpenModel, worth_it: None, placed: list[int], monkeypatch: pytest.MonkeyPatch, factor: float, sweep_s: float
) -> None:
    """On a machine that computes `factor` as long, and takes a while for each sweep whatever the layers."""
    model = cost_model(opened, replace(LAPTOP, launch_s=1e-3))  # so that a tiny model takes seconds
    answer = trial._answer

    def on_that_machine(executor: Executor, requests: Sequence[TokenRequest]) -> list[MeasuredSweep]:
        shape = replace(model.shape, num_layers=executor._anatomy.num_layers)
        short, place = replace(model, shape=shape), replace(model, shape=shape).place(POLICY)
        times = []
        for sweep in answer(executor, requests):
            lanes = [short.lane_seconds(POLICY, done, place)[Lane.COMPUTE] for done in sweep.done.values()]
            busy_s = factor * float(sum(lanes))
            times.append(replace(sweep, compute_s=busy_s, elapsed_s=busy_s + sweep_s))
        return times

    monkeypatch.setattr(trial, "_answer", on_that_machine)
    tried = try_out(opened, model)
    num_sweeps = sum(sweep.num_sweeps for sweep in plan_sweeps(POLICY, model.workload).values())
    assert tried.cost(POLICY).total_s == pytest.approx(
        factor * model.cost(POLICY).total_s + num_sweeps * sweep_s, rel=0.1
    )
    assert placed == [1, 3]


def test_a_trial_has_a_row_that_scores_and_a_block_that_generates_a_few_tokens(opened: OpenModel) -> None:
    sample = trial._sample(cost_model(opened), POLICY, REQUESTS, most_s=1e9)
    scored, drawn = ([r for r in sample if bool(r.max_tokens) is wanted] for wanted in (False, True))
    assert len(drawn) == POLICY.block_sequences and {r.max_tokens for r in drawn} == {trial.NUM_DRAWN}
    assert sum(len(r.prompt_ids) for r in scored) >= POLICY.row_tokens
    assert all(not r.eos_ids and r.is_stopped is None for r in sample), "every text is as long as planned"


def test_a_trial_is_as_small_as_the_run_is_short(opened: OpenModel) -> None:
    model = cost_model(opened)
    whole = trial._sample(model, POLICY, REQUESTS, most_s=1e9)
    whole_s = replace(model, workload=measure_workload(whole)).cost(POLICY).total_s
    part = trial._sample(model, POLICY, REQUESTS, most_s=0.6 * whole_s)
    assert 2 <= len(part) < len(whole)
    assert replace(model, workload=measure_workload(part)).cost(POLICY).total_s <= 0.6 * whole_s
    assert trial._sample(model, POLICY, REQUESTS, most_s=0.0) == []


def test_none_is_made_where_it_tells_nothing(
    opened: OpenModel, worth_it: None, placed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cost_model(opened)
    gpu = replace(LAPTOP, device="cuda", gpu_bytes=2**30, to_gpu_bytes_per_s=1e10, from_gpu_bytes_per_s=1e10)
    on_gpu = replace(POLICY, weights=Split(gpu=1.0), kv=Split(gpu=1.0), hidden=Split(gpu=1.0))
    assert try_out(opened, cost_model(opened, gpu), on_gpu).correction == NO_CORRECTION
    narrow = replace(LAPTOP, cpu_bytes=model.shape.resident_bytes)
    assert try_out(opened, cost_model(opened, narrow)).correction == NO_CORRECTION
    monkeypatch.setattr(trial, "LEAST_RUN_S", 1.01 * model.cost(POLICY).total_s)
    assert try_out(opened, model).correction == NO_CORRECTION
    monkeypatch.setattr(trial, "LEAST_RUN_S", 0.0)
    monkeypatch.setattr(trial, "MOST_S", 0.0)
    assert try_out(opened, model).correction == NO_CORRECTION
    monkeypatch.setattr(trial, "MOST_S", 1e9)
    monkeypatch.setattr(trial, "LEAST_BYTES", NUM_LAYERS * model.shape.layer_compute_bytes)
    assert try_out(opened, model).correction == NO_CORRECTION
    assert placed == []


@pytest.mark.parametrize(("error", "is_told"), [(MemoryError(), False), (AssertionError("a fault"), True)])
def test_memory_that_runs_out_in_it_is_told_by_the_run_itself(
    opened: OpenModel, worth_it: None, monkeypatch: pytest.MonkeyPatch, error: Exception, is_told: bool
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(trial, "_answer", fail)
    if is_told:
        with pytest.raises(AssertionError, match="a fault"):
            try_out(opened, cost_model(opened))
    else:
        assert try_out(opened, cost_model(opened)).correction == NO_CORRECTION


def test_a_family_of_which_a_layer_alone_is_no_model_runs_without_one(
    opened: OpenModel, worth_it: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("layer 3 must attend to all")

    monkeypatch.setattr(trial, "first_layers", refuse)
    assert try_out(opened, cost_model(opened)).correction == NO_CORRECTION


@pytest.mark.parametrize("setting", ["none", "w4kv4"])
def test_a_run_is_foretold_by_its_trial_and_answered_as_without(
    directory: Path, placed: list[int], monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    def answered() -> tuple[list[object], float, float]:
        with Engine.load(str(directory), setting=setting, device="cpu", dtype="float32", policy=POLICY) as engine:
            answers = [without_time(one) for one in engine.generate(MANY)]
            model = engine.cost_model(MANY)
            engine.generate(MANY[:2])
            foretold_s = model.cost(POLICY).total_s
            return answers, foretold_s, engine.usage().predicted_s - engine.cost_model(MANY[:2]).cost(POLICY).total_s

    plain, _, _ = answered()
    assert placed == []
    for name, value in (("LEAST_RUN_S", 0.0), ("MOST_SHARE", 1e9), ("MOST_S", 1e9), ("LEAST_BYTES", 0)):
        monkeypatch.setattr(trial, name, value)
    tried, foretold_s, predicted_s = answered()
    assert tried == plain
    assert placed == [1, 3], "once for all batches"
    assert predicted_s == pytest.approx(foretold_s)
