"""`flexeval plan`: what it says beforehand is what a run then does, and what more memory would bring is so."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from policy_cases import LAPTOP, OPT_6_7B, OPT_30B, T4, generating, scoring
from tiny_directory import write_tiny_model

from flexeval.cli import main
from flexeval.forecast.forecast import GAIN_BYTES, WORTHWHILE, _gains
from flexeval.policy.cost import CostModel
from flexeval.policy.policy import Tier
from flexeval.policy.search import search
from flexeval.results import RunResults

SUITE = """entries: [
    {description: "simple_classification:model=text", priority: 1}
    {description: "simple_mcqa:model=text", priority: 1}
]
max_eval_instances: 4
"""


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line as the shell would; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["flexeval", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


@pytest.fixture
def options(tmp_path: Path) -> list[object]:
    (tmp_path / "small.conf").write_text(SUITE)
    model = write_tiny_model(tmp_path / "model")
    return ["--suite", tmp_path / "small.conf", "--model", model, "--dtype", "float32", "--cpu-memory", "2GiB"]


def test_a_run_does_what_was_planned(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--setting", "none", "--setting", "w4-g32"]
    assert call(monkeypatch, "plan", *options, *settings, "--out", tmp_path / "plan.json") == 0
    shown = capsys.readouterr().out
    assert "nothing needs to be offloaded" in shown and "bound by computing" in shown and "simple_mcqa" in shown
    assert call(monkeypatch, "run", *options, *settings, "--out", tmp_path / "out") == 0
    results = RunResults.load(tmp_path / "out")
    plans = json.loads((tmp_path / "plan.json").read_text())["settings"]
    for planned, done in zip(plans, results.settings, strict=True):
        assert (planned["setting"], planned["policy"]) == (done.setting, done.policy)
        assert planned["summary"]["num_computed_tokens"] == done.num_computed_prompt_tokens
        assert done.peak_bytes["cpu"] <= planned["peak_bytes"]["cpu"] <= planned["usable_bytes"]["cpu"]
        assert done.predicted_s == pytest.approx(planned["elapsed_s"], rel=0.01), "the run foretells the same"
        assert done.planned_bytes["cpu"] == pytest.approx(planned["peak_bytes"]["cpu"], abs=1)
        tasks = planned["tasks"].values()
        assert sum(task["elapsed_s"] for task in tasks) == pytest.approx(planned["elapsed_s"])
        assert sum(task["num_generated_tokens"] for task in tasks) >= done.num_generated_tokens
        assert {task: part["num_requests"] for task, part in planned["tasks"].items()} == {
            info.name: sum(i.task == info.name and i.setting == done.setting for i in results.instances)
            for info in results.tasks
        }


def test_a_dry_run_answers_nothing_and_leaves_nothing(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", *options, "--dry-run", "--out", tmp_path / "out") == 0
    assert "without loading the weights" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_is_offloaded_is_shown(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["--policy", "disk-weights=0.5,disk-kv=1", "--disk", f"{tmp_path / 'disk'}:1GiB"]
    assert call(monkeypatch, "plan", *options, *fixed) == 0
    shown = capsys.readouterr().out
    assert ("Policy: weights 50% cpu, 50% disk" in shown and "reading from disk" in shown) or "computing" in shown
    assert "nothing needs to be offloaded" not in shown


def test_what_does_not_fit_is_one_line(
    options: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", *options[:-1], "10KiB") == 2
    [line] = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("flexeval:") and "--cpu-memory" in line


@pytest.mark.parametrize(
    ("shape", "workload", "hardware"),
    [(OPT_30B, generating(64), T4), (OPT_6_7B, scoring(64), replace(LAPTOP, cpu_bytes=64 * 10**9))],
    ids=["offloaded", "whole"],
)
def test_a_gain_is_what_a_larger_tier_would_save(shape: object, workload: object, hardware: object) -> None:
    model = CostModel(shape=shape, workload=workload, hardware=hardware)  # type: ignore[arg-type]
    cost = model.cost(search(model.shape, model.workload, model.hardware))
    tiers = [tier for tier in Tier if model.hardware.capacity_bytes(tier)]
    gains = _gains(model, cost, tiers)
    assert ("gpu" in gains) == (hardware is T4)
    for tier in tiers:
        field = f"{tier}_bytes"
        larger = replace(model.hardware, **{field: getattr(model.hardware, field) + GAIN_BYTES})
        again = replace(model, hardware=larger)
        saved_s = cost.total_s - again.cost(search(again.shape, again.workload, larger)).total_s
        assert gains.get(str(tier), 0.0) == pytest.approx(saved_s if saved_s > WORTHWHILE * cost.total_s else 0.0)
