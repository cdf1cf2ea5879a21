"""Which number stands for a task: HELM Lite's table, other scenarios, and documents scored by their log-probability."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from helm.benchmark.adaptation.adapter_spec import AdapterSpec
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.augmentations.perturbation_description import PerturbationDescription
from helm.benchmark.metrics.metric import PerInstanceStats
from helm.benchmark.metrics.metric_name import MetricName
from helm.benchmark.metrics.statistic import Stat
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import set_benchmark_output_path
from helm.benchmark.scenarios.scenario import (
    CORRECT_TAG,
    Input,
    Instance,
    Output,
    Reference,
    Scenario,
    create_scenario,
)
from helm.common.request import Request as HelmRequest
from helm_support import build_card

from flexeval.benchmark.helm.convert import from_helm
from flexeval.benchmark.helm.entries import build_run_specs, task_names
from flexeval.benchmark.helm.headline import Headline, choose_headline, instance_results, question_stats
from flexeval.benchmark.helm.models import register
from flexeval.benchmark.helm.runs import AdaptedRun
from flexeval.benchmark.suites import load_suite
from flexeval.errors import ResultsError
from flexeval.request import Completion, FinishReason

HELM_LITE = {
    "narrative_qa": ("f1_score", "test"),
    "natural_qa": ("f1_score", "valid"),
    "commonsense": ("exact_match", "test"),
    "mmlu": ("exact_match", "test"),
    "math": ("math_equiv_chain_of_thought", "test"),
    "gsm": ("final_number_exact_match", "test"),
    "legalbench": ("quasi_exact_match", "test"),
    "med_qa": ("quasi_exact_match", "test"),
    "wmt_14": ("bleu_4", "test"),
}
"""Headline metric and split of https://crfm.stanford.edu/helm/lite/, by run spec."""


def specs_of(name: str, output: Path) -> dict[str, RunSpec]:
    """All runs of a shipped suite, built without data: LegalBench alone reads a file, which is made up here."""
    settings = output / "scenarios/legalbench/prompt_construction_settings.json"
    settings.parent.mkdir(parents=True)
    tasks = [entry.partition("subset=")[2].partition(",")[0] for entry in load_suite(name).entries]
    subsets = [task for task in tasks if task]
    line = json.dumps(dict.fromkeys(subsets, "x"))
    settings.write_text("\n".join([line] * 5))
    set_benchmark_output_path(str(output))
    register(build_card(), output / "prod_env")
    suite = load_suite(name)
    specs = [spec for entry in suite.entries for spec in build_run_specs(entry, suite, "flexeval/tiny", None)]
    return dict(zip(task_names(specs), specs, strict=True))


def stat(name: str, *values: float, split: str = "test") -> Stat:
    result = Stat(MetricName(name, split=split))
    for value in values:
        result.add(value)
    return result


class Undeclared(Scenario):
    """A scenario without metadata."""

    name = "undeclared"
    description = ""
    tags = ()

    def get_instances(self, output_path: str) -> list[Instance]:
        return []


def build_run(scenario: Scenario, *instances: Instance, echo: bool = False, method: str = "") -> AdaptedRun:
    states = [
        RequestState(
            instance=instance,
            reference_index=None,
            request_mode=None,
            train_trial_index=0,
            output_mapping=None,
            request=HelmRequest(prompt=instance.input.text, echo_prompt=echo),
            result=None,
            num_train_instances=0,
            prompt_truncated=False,
        )
        for instance in instances
    ]
    requests = tuple(from_helm(state.request) for state in states)
    spec = RunSpec("undeclared", None, AdapterSpec(method=method), [])
    return AdaptedRun(spec=spec, scenario=scenario, state=ScenarioState(AdapterSpec(), states), requests=requests)


def question(identity: str, split: str, perturbation: PerturbationDescription | None = None) -> Instance:
    reference = Reference(Output("yes"), [CORRECT_TAG])
    return Instance(Input(f"prompt {identity}"), [reference], split=split, id=identity, perturbation=perturbation)


def answer(text: str, num_prompt_tokens: int = 3) -> Completion:
    return Completion(
        text=text,
        token_ids=(1,),
        tokens=(text,),
        logprobs=(-1.0,),
        finish_reason=FinishReason.STOP,
        num_prompt_tokens=num_prompt_tokens,
        num_generated_tokens=1,
        elapsed_s=0.5,
    )


@pytest.mark.parametrize(("suite", "num_runs"), [("helm-lite-full", 108), ("helm-lite-instruct", 28)])
def test_helm_lite_is_headed_as_on_its_leaderboard(suite: str, num_runs: int, tmp_path: Path) -> None:
    specs = specs_of(suite, tmp_path)
    assert len(specs) == num_runs
    for task, spec in specs.items():
        run = AdaptedRun(
            spec=spec,
            scenario=create_scenario(spec.scenario_spec),
            state=build_run(Undeclared(), *(question(split, split) for split in ("test", "valid"))).state,
            requests=(),
        )
        names = [name for metric in spec.metric_specs for name in metric.args.get("names", [])]
        stats = {("id0", 0): dict.fromkeys(names, 0.0)}
        assert choose_headline(run, stats) == Headline(*HELM_LITE[task.partition(":")[0]]), task
        assert spec.adapter_spec.max_eval_instances == 1000
        assert spec.adapter_spec.num_train_trials == 1


def test_names_are_short_and_hold_what_differs(tmp_path: Path) -> None:
    names = list(specs_of("helm-lite-full", tmp_path))
    assert {"mmlu: abstract_algebra", "natural_qa: closedbook", "math: algebra, level=1", "wmt_14: cs-en"} < set(names)
    assert {"narrative_qa", "gsm", "med_qa", "commonsense: openbookqa", "legalbench: proa"} < set(names)


def test_equal_short_names_are_told_apart(tmp_path: Path) -> None:
    register(build_card(), tmp_path)
    suite = load_suite("helm-lite")
    entries = [f"mmlu:model=text,subject=anatomy{more}" for more in ("", ",max_train_instances=0")]
    specs = [spec for entry in entries for spec in build_run_specs(entry, suite, "flexeval/tiny", None)]
    assert task_names(specs) == [
        "mmlu: anatomy, multiple_choice_joint",
        "mmlu: anatomy, multiple_choice_joint, max_train_instances=0",
    ]


def test_a_scenario_that_declares_nothing_is_headed_by_preference() -> None:
    run = build_run(Undeclared(), question("id0", "valid"), question("id1", "valid"), question("id2", "test"))
    stats = {("id2", 0): {"f1_score": 0.5, "exact_match": 1.0, "num_references": 4.0}}
    assert choose_headline(run, stats) == Headline("exact_match", "test")
    run = build_run(Undeclared(), question("id0", "valid"))
    assert choose_headline(run, stats) == Headline("exact_match", "valid")


def test_how_sure_a_model_was_of_its_own_words_heads_nothing() -> None:
    """HELM computes bits per byte of what was generated as well."""
    stats = {("id0", 0): {"bits_per_byte": 1.0, "longest_common_prefix_length": 3.0}}
    alone = {("id0", 0): {"bits_per_byte": 1.0}}
    generated = build_run(Undeclared(), question("id0", "test"), method="generation")
    assert choose_headline(generated, stats) == Headline("longest_common_prefix_length", "test")
    with pytest.raises(ResultsError, match="no metric per question that can stand for undeclared"):
        choose_headline(generated, alone)
    document = build_run(Undeclared(), question("id0", "test"), echo=True, method="language_modeling")
    assert choose_headline(document, alone) == Headline("bits_per_byte", "test")


def test_a_document_in_windows_is_one_question() -> None:
    windows = [
        PerInstanceStats("id0", None, 0, [stat("logprob", -8 * math.log(2)), stat("num_bytes", 10), stat("x", 1)]),
        PerInstanceStats("id0", None, 0, [stat("logprob", -12 * math.log(2)), stat("num_bytes", 30), stat("x", 1)]),
    ]
    stats = question_stats(windows)
    assert stats["id0", 0]["bits_per_byte"] == pytest.approx(20 / 40)
    run = build_run(Undeclared(), *[question("id0", "test")] * 2, echo=True)
    parts = [answer("prompt id0", 3), answer("prompt id0", 4)]
    (result,) = instance_results(run, parts, stats, Headline("bits_per_byte", "test"), task="t", setting="none")
    assert result.score == pytest.approx(0.5)
    assert (result.num_prompt_tokens, result.elapsed_s, result.output) == (7, 1.0, "")
    assert result.requests == {run.requests[0].short_hash(): True}, "a document is text as it should be"


def test_perturbed_copies_do_not_count() -> None:
    noisy = PerturbationDescription(name="typos")
    items = [
        PerInstanceStats("id0", None, 0, [stat("exact_match", 1)]),
        PerInstanceStats("id0", noisy, 0, [stat("exact_match", 0)]),
    ]
    stats = question_stats(items)
    assert stats == {("id0", 0): {"exact_match": 1.0}}
    run = build_run(Undeclared(), question("id0", "test"), question("id0", "test", noisy))
    results = instance_results(
        run, [answer(" yes"), answer(" no")], stats, Headline("exact_match", "test"), task="t", setting="none"
    )
    assert [(result.score, result.output, result.reference) for result in results] == [(1.0, " yes", "yes")]


def test_a_conversation_is_shown_turn_by_turn() -> None:
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it?"}]
    run = build_run(Undeclared(), question("id0", "test"))
    (state,) = run.state.request_states
    run.state.request_states[0] = replace(state, request=HelmRequest(messages=said))
    stats = {("id0", 0): {"exact_match": 1.0}}
    (result,) = instance_results(run, [answer("yes")], stats, Headline("exact_match", "test"), task="t", setting="none")
    assert result.prompt == "system: Be brief.\nuser: Is it?"


def test_a_question_without_the_headline_is_not_passed_over() -> None:
    run = build_run(Undeclared(), question("id0", "test"), question("id1", "test"))
    stats = {("id0", 0): {"exact_match": 1.0}, ("id1", 0): {"num_references": 1.0}}
    headline = choose_headline(run, stats)
    with pytest.raises(ResultsError, match="no exact_match for question id1"):
        instance_results(run, [answer(" yes")] * 2, stats, headline, task="t", setting="none")
