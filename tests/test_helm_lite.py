"""All of HELM Lite from scenario to leaderboard, on made-up data: every run is scored, every column is filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import datasets
import helm_lite_data
import nltk
import pytest
from helm.benchmark.run_expander import IN_CONTEXT_LEARNING_INSTRUCTIONS_PREFIX, OutputFormatInstructions
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import set_benchmark_output_path
from helm.benchmark.scenarios import math_scenario, wmt_14_scenario
from helm_support import FakeEngine, build_card, empty_columns, summarize

from flexeval.benchmark.helm import HelmSuite, Scored
from flexeval.benchmark.helm.entries import build_run_specs
from flexeval.benchmark.helm.models import register
from flexeval.benchmark.suites import load_suite
from flexeval.request import Request


class Evaluated(NamedTuple):
    """A suite that has been asked and scored."""

    output: Path
    name: str
    requests: list[Request]
    scored: Scored


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The hub's datasets and BLEU's tokenizer, made up."""
    punkt = tmp_path_factory.mktemp("nltk")
    helm_lite_data.write_punkt(punkt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [str(punkt)])
        for module in (datasets, math_scenario, wmt_14_scenario):
            patch.setattr(module, "load_dataset", helm_lite_data.load_dataset)
        yield


def evaluate(name: str, folder: Path) -> Evaluated:
    suite, card = load_suite(name), build_card()
    helm_lite_data.write_all(suite, folder / "data/scenarios")
    helm = HelmSuite(suite, card, output=folder / "helm", data=folder / "data", max_eval_instances=4)
    requests = helm.collect()
    scored = helm.score(FakeEngine(card.tokenizer_dir).generate(requests))
    return Evaluated(folder / "helm", suite.name, requests, scored)


@pytest.fixture(scope="module")
def whole(offline: None, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    return evaluate("helm-lite-full", tmp_path_factory.mktemp("whole"))


def test_all_entries_are_asked_and_scored(whole: Evaluated) -> None:
    assert len(whole.scored.tasks) == 108
    assert {task.metric for task in whole.scored.tasks} == {
        "f1_score",
        "exact_match",
        "quasi_exact_match",
        "final_number_exact_match",
        "math_equiv_chain_of_thought",
        "bleu_4",
    }
    asked = {instance.task for instance in whole.scored.instances}
    assert asked == {task.name for task in whole.scored.tasks}
    assert len(list((whole.output / "runs" / whole.name).glob("*/per_instance_stats.json"))) == 108


def test_the_leaderboard_has_no_empty_column(whole: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = summarize(whole.output, whole.name, "schema_lite.yaml", monkeypatch)["core_scenarios"]
    accuracy = next(table for table in tables if table["title"] == "Accuracy")
    assert len(accuracy["header"]) == 12, "the model, the mean win rate and ten scenarios"
    assert empty_columns(accuracy) == []


def test_instruct_models_are_told_how_to_answer(offline: None, tmp_path: Path) -> None:
    instructed = evaluate("helm-lite-instruct", tmp_path)
    assert len(instructed.scored.tasks) == 28
    words = ("Answer with only", "answer with only", "Respond with only", "Your response should", "Do not", "only")
    assert sum(any(word in request.prompt for word in words) for request in instructed.requests) > 20


@pytest.fixture
def build_specs(tmp_path: Path) -> Callable[[str, bool], dict[str, RunSpec]]:
    """Makes a suite's run specs for a model that follows instructions, or one that does not, by entry."""

    def build(name: str, is_instruct: bool) -> dict[str, RunSpec]:
        suite = load_suite(name)
        kind = "told" if is_instruct else "plain"
        card = replace(build_card(name=f"flexeval/{kind}"), is_instruct=is_instruct)
        register(card, tmp_path)
        data = tmp_path / kind / name
        helm_lite_data.write_all(suite, data / "scenarios")
        set_benchmark_output_path(str(data))
        return {entry: build_run_specs(entry, suite, card.deployment, None)[0] for entry in suite.entries}

    return build


BuildSpecs = Callable[[str, bool], dict[str, RunSpec]]


def test_instruct_models_get_the_instructions_that_helm_gives_them_and_no_others(build_specs: BuildSpecs) -> None:
    """HELM has two ways: a frame around the prompt for models of the tag, and instructions of the entry's own."""
    framed, plain = build_specs("helm-lite", True), build_specs("helm-lite", False)
    for entry, spec in framed.items():
        has_frame = spec.adapter_spec.global_prefix.startswith(IN_CONTEXT_LEARNING_INSTRUCTIONS_PREFIX)
        assert has_frame == ("follow_format_instructions=instruct" in entry), entry
        assert spec.adapter_spec.instructions == plain[entry].adapter_spec.instructions, entry
        assert plain[entry].adapter_spec.global_prefix == "", entry
    told, also_told = build_specs("helm-lite-instruct", True), build_specs("helm-lite-instruct", False)
    for entry, spec in told.items():
        assert spec.adapter_spec.global_prefix == "", "no frame as well"
        assert spec.adapter_spec.instructions == also_told[entry].adapter_spec.instructions, entry
        name, _, scenario = entry.partition(",output_format_instructions=")
        (without,) = [other for other in plain if matches(other, name)]
        expected = plain[without].adapter_spec.instructions
        (own,) = OutputFormatInstructions(scenario).expand(plain[without]) if scenario else [plain[without]]
        assert spec.adapter_spec.instructions == own.adapter_spec.instructions, entry
        assert (spec.adapter_spec.instructions != expected) == bool(scenario), entry


def matches(plain: str, told: str) -> bool:
    return plain.replace(",follow_format_instructions=instruct", "") == told.replace(",stop=none", "")


def test_instruct_models_are_asked_in_chat() -> None:
    """As HELM's client asks those that have a template."""
    assert load_suite("helm-lite-instruct").chat_template
    assert not load_suite("helm-lite").chat_template
