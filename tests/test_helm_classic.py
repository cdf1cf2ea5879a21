"""HELM Classic: every run spec of the suite can be made, and what needs no download runs to its scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import helm_lite_data
import nltk
import pytest
from helm.benchmark.runner import set_benchmark_output_path
from helm.benchmark.scenarios import math_scenario
from helm.benchmark.scenarios.raft_scenario import SUBSETS
from helm.benchmark.scenarios.scenario import create_scenario
from helm.common.object_spec import get_class_by_name
from helm_support import FakeEngine, build_card

from flexeval.benchmark.helm import HelmSuite
from flexeval.benchmark.helm.entries import build_run_specs, task_names
from flexeval.benchmark.helm.headline import LOWER_IS_BETTER, PREFERENCE
from flexeval.benchmark.helm.models import register
from flexeval.benchmark.suites import load_suite

RUNNABLE = ("pattern_match", "difficulty=easy", "dyck_language", "subject=algebra", "gsm")
"""Entries that make their questions up, or whose data are made up here: one of each kind."""
pytestmark = pytest.mark.filterwarnings("ignore:unknown class")  # the fake engine answers what it likes


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Made-up data, and HELM's downloads end at a closed door, at once."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    helm_lite_data.write_punkt(tmp_path / "nltk")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    monkeypatch.setattr(math_scenario, "load_dataset", helm_lite_data.load_dataset)
    helm_lite_data.write_all(load_suite("helm-classic"), tmp_path / "data/scenarios")
    settings = [{subset: ["text"] for subset in SUBSETS}, dict.fromkeys(SUBSETS, "Say yes or no.")]
    raft = tmp_path / "data/scenarios/raft/prompt_construction_settings.json"
    raft.parent.mkdir(parents=True)
    raft.write_text("\n".join(map(json.dumps, settings)))
    yield


def test_every_run_spec_can_be_made(tmp_path: Path) -> None:
    suite, card = load_suite("helm-classic"), build_card()
    register(card, tmp_path)
    set_benchmark_output_path(str(tmp_path / "data"))
    specs = [spec for entry in suite.entries for spec in build_run_specs(entry, suite, card.deployment, None)]
    assert len(set(task_names(specs))) == len(specs) == len(suite.entries) == 92
    for spec in specs:
        assert get_class_by_name(spec.scenario_spec.class_name), spec.name
        assert spec.metric_specs and spec.groups, spec.name
        assert spec.adapter_spec.max_eval_instances == 1000 and spec.adapter_spec.num_train_trials == 1
    perturbed = [spec for spec in specs if spec.data_augmenter_spec.perturbation_specs]
    assert len(perturbed) == 38, "robust and fair answers are what Classic asks for beside accuracy"


def test_what_needs_no_download_runs_to_its_scores(tmp_path: Path) -> None:
    whole, card = load_suite("helm-classic"), build_card()
    entries = tuple(entry for entry in whole.entries if any(part in entry for part in RUNNABLE))
    part = replace(whole, entries=entries)
    suite = HelmSuite(part, card, output=tmp_path / "helm", data=tmp_path / "data", max_eval_instances=2)
    scored = suite.score(FakeEngine(card.tokenizer_dir).generate(suite.collect()))
    assert suite.failed == {}
    assert [(task.name.partition(":")[0], task.metric) for task in scored.tasks] == [
        ("synthetic_reasoning", "quasi_exact_match"),
        ("synthetic_reasoning_natural", "f1_set_match"),
        ("dyck_language_np=3", "exact_match_indicator"),
        ("math", "math_equiv"),
        ("math", "math_equiv_chain_of_thought"),
        ("gsm", "final_number_exact_match"),
    ]
    assert {instance.task for instance in scored.instances} == {task.name for task in scored.tasks}


def test_every_task_has_a_number_that_stands_for_it(tmp_path: Path) -> None:
    """Declared by its scenario, or else of the metrics that HELM Classic's schema shows."""
    suite, card = load_suite("helm-classic"), build_card()
    register(card, tmp_path)
    set_benchmark_output_path(str(tmp_path / "data"))
    undeclared = {}
    for entry in suite.entries:
        (spec,) = build_run_specs(entry, suite, card.deployment, None)
        scenario = create_scenario(spec.scenario_spec)
        try:
            declared = scenario.get_metadata().main_metric
        except NotImplementedError:
            declared = "unknown"
        if declared == "unknown":
            undeclared[scenario.name] = {metric.class_name.rpartition(".")[2] for metric in spec.metric_specs}
    assert undeclared.keys() == {"blimp", "synthetic_reasoning", "copyright", "real_toxicity_prompts"}
    assert "BasicReferenceMetric" in undeclared["blimp"], "exact_match"
    assert "BasicGenerationMetric" in undeclared["synthetic_reasoning"], "quasi_exact_match"
    assert "ToxicityMetric" in undeclared["real_toxicity_prompts"], "toxic_frac"
    assert "BasicCopyrightMetric" in undeclared["copyright"], "longest_common_prefix_length"
    assert {"toxic_frac", "longest_common_prefix_length"} < LOWER_IS_BETTER & set(PREFERENCE)
