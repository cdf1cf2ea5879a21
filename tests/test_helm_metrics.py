"""Metrics and annotators that lack something or fail: one line that names run and metric; the other runs are kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helm.benchmark.adaptation.common_adapter_specs import get_generation_adapter_spec
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.annotation.annotator import Annotator, AnnotatorSpec
from helm.benchmark.metrics.common_metric_specs import get_exact_match_metric_specs
from helm.benchmark.metrics.metric import MetricInterface, MetricResult, MetricSpec
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import ScenarioSpec
from helm.common.optional_dependencies import handle_module_not_found_error
from helm_support import FakeEngine, build_card, build_suite, tokenizer_dir

from flexeval.benchmark.helm import HelmSuite
from flexeval.benchmark.helm.entries import build_run_specs
from flexeval.benchmark.helm.log import quiet_import
from flexeval.benchmark.helm.models import register
from flexeval.benchmark.helm.punkt import wants_punkt
from flexeval.benchmark.suites import Suite
from flexeval.errors import DataError, ResultsError

GOOD = "simple_classification:model=text"
pytestmark = pytest.mark.filterwarnings("ignore:unknown class")  # the fake engine answers what it likes


def fail(how: str) -> None:
    match how:
        case "bug":
            raise KeyError("answer\nof two lines " + "x" * 1000)
        case "package":
            try:
                import no_such_package.of_metrics  # type: ignore[import-not-found]  # noqa: F401
            except ModuleNotFoundError as error:
                handle_module_not_found_error(error, ["summarization"])
        case "file":
            Path("/no/such/judgements.json").read_text()
        case "exit":  # what spaCy does where a model cannot be downloaded
            sys.exit(1)


class WhenAsked(MetricInterface):
    """Fails when it is asked to score."""

    def __init__(self, how: str):
        self._how = how

    def evaluate(self, *args: Any, **options: Any) -> MetricResult:
        fail(self._how)
        return MetricResult([], [])


class WhenMade(WhenAsked):
    """Fails when it is made."""

    def __init__(self, how: str):
        super().__init__(how)
        fail(how)


class Judge(Annotator):
    """Fails at the first answer, as one does whose service has no key."""

    name = "judge"

    def __init__(self, how: str):
        self._how = how

    def annotate(self, request_state: RequestState) -> Any:
        fail(self._how)
        return {"verdict": "good"}


@run_spec_function("judged")
def get_judged_spec(part: str, how: str) -> RunSpec:
    """Questions of HELM's simple classification, with one more metric or annotator."""
    path = f"{__name__}.{part}"
    metrics = get_exact_match_metric_specs()
    return RunSpec(
        name=f"judged:part={part},how={how}",
        scenario_spec=ScenarioSpec("helm.benchmark.scenarios.simple_scenarios.SimpleClassificationScenario"),
        adapter_spec=get_generation_adapter_spec(input_noun="Input", output_noun="Label"),
        metric_specs=metrics if part == "Judge" else [*metrics, MetricSpec(path, {"how": how})],
        annotators=[AnnotatorSpec(path, {"how": how})] if part == "Judge" else None,
        groups=["judged"],
    )


def entry(part: str, how: str) -> str:
    return f"judged:model=text,part={part},how={how}"


def suite_in(folder: Path, suite: Suite, **options: Any) -> HelmSuite:
    return HelmSuite(suite, build_card(), output=folder, data=folder, **options)


@pytest.mark.parametrize(
    ("how", "lack", "reason"),
    [
        ("bug", "working WhenMade", "KeyError: 'answer"),
        (
            "package",
            "package no_such_package",
            r'HELM\'s WhenMade: Optional .*pip install "crfm-helm\[summarization\]',
        ),
        ("file", "data at /no/such/judgements.json", "HELM's WhenMade: FileNotFoundError"),
        ("exit", "working WhenMade", "SystemExit: 1"),
    ],
)
def test_what_a_metric_lacks_is_said_before_anything_is_answered(
    how: str, lack: str, reason: str, tmp_path: Path
) -> None:
    suite = build_suite(GOOD, entry("WhenMade", how))
    with pytest.raises(
        DataError, match=f"^1 of 2 tasks .* {lack.removeprefix('data at ')} for judged.*{reason}"
    ) as caught:
        suite_in(tmp_path, suite).collect()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    others = suite_in(tmp_path, suite, skip_missing=True)
    assert {request.max_tokens for request in others.collect()} == {5}
    (said,) = others.skipped.values()
    assert said.startswith(f"no {lack}: ")


@pytest.mark.parametrize(
    ("part", "how", "message"),
    [
        ("WhenAsked", "bug", r"HELM's WhenAsked failed: KeyError: 'answer.*helm\.log has the traceback"),
        ("WhenAsked", "package", r"HELM's WhenAsked needs package no_such_package: .*pip install.*Install it"),
        ("WhenAsked", "file", r"HELM's WhenAsked needs data at /no/such/judgements\.json: .*Place it there"),
        ("WhenAsked", "exit", r"HELM's WhenAsked failed: SystemExit: 1"),
        ("Judge", "bug", r"HELM's Judge failed: KeyError: 'answer.*helm\.log has the traceback"),
        ("Judge", "file", r"HELM's Judge needs data at /no/such/judgements\.json"),
    ],
)
def test_a_metric_that_fails_costs_its_run_alone(part: str, how: str, message: str, tmp_path: Path) -> None:
    suite = suite_in(tmp_path, build_suite(entry(part, how), GOOD))
    scored = suite.score(FakeEngine(tokenizer_dir()).generate(suite.collect()))
    assert [task.name for task in scored.tasks] == ["simple_classification"]
    assert {instance.task for instance in scored.instances} == {"simple_classification"}
    ((task, said),) = suite.failed.items()
    assert task.startswith("judged") and "\n" not in said and len(said) < 800
    with pytest.raises(ResultsError, match=message):
        raise ResultsError(said)
    assert "(judged:part=" in said and "what is answered is kept" in said and "leave the entry out" in said
    assert "Traceback" in (tmp_path / "helm.log").read_text()
    written = {path.parent.name.partition(":")[0] for path in (tmp_path / "runs/test").glob("*/stats.json")}
    assert written == {"simple_classification"}, "a run without all of its metrics would look like one"


def test_where_nothing_can_be_scored_the_first_failure_is_raised(tmp_path: Path) -> None:
    suite = suite_in(tmp_path, build_suite(entry("WhenAsked", "file")))
    with pytest.raises(ResultsError, match="HELM's WhenAsked needs data at /no/such"):
        suite.score(FakeEngine(tokenizer_dir()).generate(suite.collect()))


def test_annotations_are_written_with_the_answers(tmp_path: Path) -> None:
    suite = suite_in(tmp_path, build_suite(entry("Judge", "not")))
    suite.score(FakeEngine(tokenizer_dir()).generate(suite.collect()))
    (state,) = (tmp_path / "runs/test").glob("*/scenario_state.json")
    assert json.loads(state.read_text())["request_states"][0]["annotations"] == {"judge": {"verdict": "good"}}


def test_what_is_imported_quietly_may_go_on_printing() -> None:
    """NLTK keeps the stream that it finds when it is imported, and prints there when HELM's metrics download."""
    with quiet_import():
        kept = sys.stdout
    print("Downloading punkt_tab", file=kept)


@pytest.mark.parametrize("entry", ["narrative_qa:model=text", "boolq:model=text"])
def test_metrics_that_split_sentences_want_their_model(entry: str, tmp_path: Path) -> None:
    (spec,) = build_run_specs(entry, build_suite(entry), register_card(tmp_path), None)
    assert wants_punkt(spec), "BLEU, and HELM's metrics of bias"
    (other,) = build_run_specs(GOOD, build_suite(GOOD), register_card(tmp_path), None)
    assert not wants_punkt(other)


def register_card(folder: Path) -> str:
    card = build_card()
    register(card, folder)
    return card.deployment
