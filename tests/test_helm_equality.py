"""The same answers and the same statistics as HELM's own client gives: both are started on the same runs.

A run of every adapter; SmolLM2 in float32, greedy.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm.benchmark.adaptation.adapter_spec import AdapterSpec
from helm.benchmark.adaptation.common_adapter_specs import (
    get_multiple_choice_separate_adapter_spec,
    get_ranking_binary_adapter_spec,
)
from helm.benchmark.metrics.common_metric_specs import (
    get_basic_metric_specs,
    get_basic_reference_metric_specs,
    get_exact_match_metric_specs,
    get_generic_metric_specs,
)
from helm.benchmark.run import build_parser, helm_run
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import (
    CORRECT_TAG,
    TEST_SPLIT,
    TRAIN_SPLIT,
    Input,
    Instance,
    Output,
    Reference,
    Scenario,
    ScenarioMetadata,
    ScenarioSpec,
)
from helm.clients.huggingface_client import HuggingFaceServerFactory
from helm_support import build_suite

from flexeval import Engine
from flexeval.benchmark.helm import HelmSuite, ModelCard
from flexeval.benchmark.helm.models import register
from flexeval.models import ModelSource
from flexeval.tokenizer import num_chat_tokens, open_tokenizer

NAME = "flexeval/smollm2"
ENTRIES = (
    "simple_mcqa:model=text",  # multiple_choice_joint
    "dyck_language:num_parenthesis_pairs=2,model=text",  # generation
    "capitals:method=multiple_choice_separate_original,model=text",
    "capitals:method=multiple_choice_separate_calibrated,model=text",
    "relevance:model=text",  # ranking_binary
    "document:model=text",  # language_modeling
)
"""Nothing is downloaded for any."""
CHAT_ENTRIES = ("simple_mcqa:model=text", "dyck_language:num_parenthesis_pairs=2,model=text")
NUM_INSTANCES = 2
CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo", "Cuba": "Havana"}


class CapitalsScenario(Scenario):
    """Questions with four answers, one of them right."""

    name = "capitals"
    description = "made for tests"
    tags = ()

    def get_instances(self, output_path: str) -> list[Instance]:
        return [self._instance(index, country) for index, country in enumerate(CAPITALS)]

    def _instance(self, index: int, country: str) -> Instance:
        cities = list(CAPITALS.values())
        offered = [CAPITALS[country], *(cities[(index + shift) % len(cities)] for shift in (1, 2, 3))]
        references = [Reference(Output(city), [CORRECT_TAG] if city == offered[0] else []) for city in sorted(offered)]
        split = TRAIN_SPLIT if index < 2 else TEST_SPLIT
        return Instance(Input(f"The capital of {country} is"), references=references, split=split)

    def get_metadata(self) -> ScenarioMetadata:
        return ScenarioMetadata(name=self.name, main_metric="exact_match", main_split=TEST_SPLIT)


class RelevanceScenario(CapitalsScenario):
    """Passages that answer a question, or do not: of every query one of each."""

    name = "relevance"

    def _instance(self, index: int, country: str) -> Instance:
        other = list(CAPITALS)[(index + 1) % len(CAPITALS)]
        references = [
            Reference(Output(f"{CAPITALS[name]} is the capital of {name}."), tags)
            for name, tags in ((country, [CORRECT_TAG]), (other, []))
        ]
        split = TRAIN_SPLIT if index < 4 else TEST_SPLIT
        return Instance(Input(f"What is the capital of {country}?"), references=references, split=split)


def run_spec(scenario: type[Scenario], adapter_spec: AdapterSpec, metric_specs: list[Any], name: str) -> RunSpec:
    return RunSpec(
        name=name,
        scenario_spec=ScenarioSpec(f"{__name__}.{scenario.__name__}"),
        adapter_spec=adapter_spec,
        metric_specs=metric_specs,
        groups=[scenario.name],
    )


@run_spec_function("capitals")
def get_capitals_spec(method: str) -> RunSpec:
    adapter_spec = get_multiple_choice_separate_adapter_spec(method=method)
    metric_specs = get_exact_match_metric_specs()
    return run_spec(CapitalsScenario, adapter_spec, metric_specs, f"capitals:method={method}")


@run_spec_function("relevance")
def get_relevance_spec() -> RunSpec:
    adapter_spec = get_ranking_binary_adapter_spec(max_train_instances=2, stop_sequences=["\n"])
    metric_specs = get_basic_reference_metric_specs() + get_generic_metric_specs() + get_basic_metric_specs([])
    return run_spec(RelevanceScenario, adapter_spec, metric_specs, "relevance")


@pytest.fixture(scope="module")
def card(smollm2: ModelSource) -> ModelCard:
    return ModelCard(
        name=NAME, model="smollm2", setting="none", tokenizer_dir=smollm2.directory, max_sequence_length=2048
    )


@pytest.fixture(scope="module")
def stock(smollm2: ModelSource, card: ModelCard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `helm-run` writes with its own client for models of transformers'."""
    return run_stock(smollm2, card, tmp_path_factory.mktemp("stock"), ENTRIES, apply_chat_template=False)


def run_stock(
    smollm2: ModelSource, card: ModelCard, output: Path, entries: Sequence[str], *, apply_chat_template: bool
) -> Path:
    HuggingFaceServerFactory._servers.clear()
    local = output / "prod_env"
    register(card, local)
    path = local / "model_deployments.yaml"
    deployments = yaml.safe_load(path.read_text())
    deployments["model_deployments"][0]["client_spec"] = {
        "class_name": "helm.clients.huggingface_client.HuggingFaceClient",
        "args": {
            "pretrained_model_name_or_path": str(smollm2.directory),
            "torch_dtype": "torch.float32",
            "device": "cpu",
            "apply_chat_template": apply_chat_template,
        },
    }
    path.write_text(yaml.safe_dump(deployments))
    arguments = ["--output-path", str(output), "--local-path", str(local), "--suite", "test", "--exit-on-error"]
    arguments += ["--max-eval-instances", str(NUM_INSTANCES), "--disable-cache", "--num-threads", "1"]
    arguments += ["--models-to-run", NAME, "--num-train-trials", "1", "--run-entries", *entries]
    helm_run(build_parser().parse_args(arguments))
    return output / "runs/test"


@pytest.fixture(scope="module")
def ours(smollm2: ModelSource, card: ModelCard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `flexeval run` writes."""
    return run_ours(smollm2, card, tmp_path_factory.mktemp("ours"), ENTRIES)


def run_ours(smollm2: ModelSource, card: ModelCard, output: Path, entries: Sequence[str]) -> Path:
    suite = HelmSuite(build_suite(*entries, max_eval_instances=NUM_INSTANCES), card, output=output, data=output)
    with Engine.load(smollm2, dtype="float32", device="cpu") as engine:
        suite.score(engine.generate(suite.collect()))
    return output / "runs/test"


@pytest.fixture(scope="module")
def stock_chat(smollm2: ModelSource, card: ModelCard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_stock(smollm2, card, tmp_path_factory.mktemp("stock"), CHAT_ENTRIES, apply_chat_template=True)


@pytest.fixture(scope="module")
def our_chat(smollm2: ModelSource, card: ModelCard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    num_template_tokens = num_chat_tokens(open_tokenizer(smollm2.directory))
    chat_card = dataclasses.replace(card, num_template_tokens=num_template_tokens)
    return run_ours(smollm2, chat_card, tmp_path_factory.mktemp("ours"), CHAT_ENTRIES)


def runs(folder: Path) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/stats.json"))}


def pairs(stock: Path, ours: Path, file: str) -> Iterator[tuple[str, Any, Any]]:
    """The name of each run, and what both have written of it."""
    theirs, mine = runs(stock), runs(ours)
    assert theirs.keys() == mine.keys()
    for name in theirs:
        yield name, *(json.loads((run[name] / file).read_text()) for run in (theirs, mine))


@pytest.mark.parametrize("file", ["scenario.json", "run_spec.json"])
def test_runs_are_the_same(stock: Path, ours: Path, file: str) -> None:
    for name, theirs, mine in pairs(stock, ours, file):
        assert theirs == mine, name


def test_requests_and_answers_are_the_same(stock: Path, ours: Path) -> None:
    """Theirs says 0.0 of every token that it draws, and nothing of why it ended."""
    for name, theirs, mine in pairs(stock, ours, "scenario_state.json"):
        assert len(theirs["request_states"]) == len(mine["request_states"]) > 0
        for their, my in zip(theirs["request_states"], mine["request_states"], strict=True):
            their_result, my_result = their.pop("result"), my.pop("result")
            assert their == my, name
            [their_answer], [my_answer] = their_result["completions"], my_result["completions"]
            assert their_answer["text"] == my_answer["text"], name
            assert [t["text"] for t in their_answer["tokens"]] == [t["text"] for t in my_answer["tokens"]], name
            their_logprobs, my_logprobs = (
                [token["logprob"] for token in answer["tokens"]] for answer in (their_answer, my_answer)
            )
            if my["request"]["max_tokens"]:
                assert not any(their_logprobs) and all(logprob < 0 for logprob in my_logprobs), name
            else:
                assert my_logprobs == pytest.approx(their_logprobs, abs=1e-4), name
            assert my_answer["finish_reason"]["reason"] in ("length", "stop", "endoftext")
            assert my_result["batch_request_time"] > my_result["request_time"] > 0


CLOCK = ("inference_runtime", "inference_denoised_runtime", "batch_size")
"""They answer one request at a time, we all at once."""
REASONS = ("finish_reason_unknown", "finish_reason_length", "finish_reason_stop", "finish_reason_endoftext")
OF_DRAWN_TOKENS = ("logprob", "logprob_per_byte", "bits_per_byte", "perplexity", "max_prob")
"""Statistics of their 0.0s."""
OF_TIES = ("predicted_index", "exact_match")
"""Of a ranking, where answers are compared by these 0.0s."""
CALIBRATION = ("ece_", "platt_", "selective_")
"""HELM leaves them out where all probabilities are 1."""


@pytest.mark.parametrize("file", ["stats.json", "per_instance_stats.json"])
def test_statistics_are_the_same(stock: Path, ours: Path, file: str) -> None:
    for name, theirs, mine in pairs(stock, ours, file):
        is_drawn = not name.startswith(("capitals", "document"))
        excused = {*CLOCK, *REASONS, *(OF_DRAWN_TOKENS if is_drawn else ())}
        excused |= set(OF_TIES if name.startswith("relevance") else ())
        their_stats, my_stats = flat(theirs), flat(mine)
        assert not their_stats.keys() - my_stats.keys(), name
        new = {key for key in my_stats.keys() - their_stats.keys() if json.loads(key)["name"] not in CLOCK}
        assert all(is_drawn and json.loads(key)["name"].startswith(CALIBRATION) for key in new), (name, new)
        compared = [key for key in their_stats if json.loads(key)["name"] not in excused]
        assert len(compared) > 10
        for key in compared:
            assert my_stats[key] == pytest.approx(their_stats[key], rel=1e-5, abs=1e-4), (name, key)


def flat(stats: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Statistics by name, those of an instance with its name."""
    if not stats or "stats" not in stats[0]:
        return {key(stat["name"]): numbers(stat) for stat in stats}
    return {
        key({**stat["name"], "instance": one["instance_id"], "trial": one["train_trial_index"]}): numbers(stat)
        for one in stats
        for stat in one["stats"]
    }


def key(name: dict[str, Any]) -> str:
    return json.dumps(name, sort_keys=True)


def numbers(stat: dict[str, Any]) -> dict[str, float]:
    return {field: value for field, value in stat.items() if field != "name"}


def test_chat_templates_are_applied_as_there(stock_chat: Path, our_chat: Path, ours: Path) -> None:
    answers = []
    for name, theirs, mine in pairs(stock_chat, our_chat, "scenario_state.json"):
        for their, my in zip(theirs["request_states"], mine["request_states"], strict=True):
            assert their["request"] == my["request"], "HELM knows the prompt without the template"
            answers.append(my["result"]["completions"][0]["text"])
            assert their["result"]["completions"][0]["text"] == answers[-1], name
    plain = [
        state["result"]["completions"][0]["text"]
        for name in runs(our_chat)
        for state in json.loads((runs(ours)[name] / "scenario_state.json").read_text())["request_states"]
    ]
    assert answers != plain, "the template changed nothing"
