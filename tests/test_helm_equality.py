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
from helm.benchmark.adaptation.adapter_spec import ADAPT_CHAT, AdapterSpec
from helm.benchmark.adaptation.common_adapter_specs import (
    get_language_modeling_adapter_spec,
    get_multiple_choice_separate_adapter_spec,
    get_ranking_binary_adapter_spec,
)
from helm.benchmark.metrics.common_metric_specs import (
    get_basic_metric_specs,
    get_basic_reference_metric_specs,
    get_exact_match_metric_specs,
    get_generic_metric_specs,
    get_language_modeling_metric_specs,
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
from helm_support import DocumentScenario, build_suite

from flexeval import Engine
from flexeval.benchmark.helm import HelmSuite, ModelCard
from flexeval.benchmark.helm.models import CLIENT_CLASS, register
from flexeval.models import ModelSource
from flexeval.tokenizer import num_chat_tokens, open_tokenizer

NAME = "flexeval/smollm2"
ENTRIES = (
    "simple_mcqa:model=text",  # multiple_choice_joint
    "dyck_language:num_parenthesis_pairs=2,model=text",  # generation
    "capitals:method=multiple_choice_separate_original,model=text",
    "capitals:method=multiple_choice_separate_calibrated,model=text",
    "relevance:model=text",  # ranking_binary
    "document_in_windows:model=text",  # language_modeling
)
"""Nothing is downloaded for any."""
CHAT_ENTRIES = (
    "simple_mcqa:model=text",
    "conversation:model=text",  # chat
)
NUM_INSTANCES = 2
CONTEXT = 512
"""Of the deployment: windows of the model's own would be long to compute."""
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


class WindowsScenario(DocumentScenario):
    """A document that is a little longer than the context, and a short one."""

    def get_instances(self, output_path: str) -> list[Instance]:
        long, short = super().get_instances(output_path)
        return [dataclasses.replace(long, input=Input(long.input.text[: 3 * CONTEXT])), short]


class ConversationScenario(CapitalsScenario):
    """Conversations of several turns, one begun by the system, one that the assistant spoke last in."""

    name = "conversation"

    def _instance(self, index: int, country: str) -> Instance:
        said = ["Hello!", "Hello. What would you like to know?", f"What is the capital of {country}?", "It is"]
        messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(said)]
        begun = [{"role": "system", "content": "Answer in one word."}] if index == 0 else []
        answered = Reference(Output(CAPITALS[country]), [CORRECT_TAG])
        spoken = [*begun, *messages[: 4 if index == 1 else 3]]
        return Instance(Input(messages=spoken), references=[answered], split=TEST_SPLIT)


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


@run_spec_function("document_in_windows")
def get_windows_spec() -> RunSpec:
    metric_specs = get_language_modeling_metric_specs([])
    return run_spec(WindowsScenario, get_language_modeling_adapter_spec(), metric_specs, "document_in_windows")


@run_spec_function("conversation")
def get_conversation_spec() -> RunSpec:
    adapter_spec = AdapterSpec(method=ADAPT_CHAT, max_train_instances=0, num_outputs=1, max_tokens=6, temperature=0.0)
    metric_specs = get_exact_match_metric_specs() + get_generic_metric_specs()
    return run_spec(ConversationScenario, adapter_spec, metric_specs, "conversation")


@pytest.fixture(scope="module")
def card(smollm2: ModelSource) -> ModelCard:
    return ModelCard(
        name=NAME, model="smollm2", setting="none", tokenizer_dir=smollm2.directory, max_sequence_length=CONTEXT
    )


@pytest.fixture(scope="module")
def stock(smollm2: ModelSource, card: ModelCard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `helm-run` writes with its own client for models of transformers'."""
    HuggingFaceServerFactory._servers.clear()
    return run_helm(card, tmp_path_factory.mktemp("stock"), ENTRIES, helms_client(smollm2, apply_chat_template=False))


@pytest.fixture(scope="module")
def ours(smollm2: ModelSource, card: ModelCard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `flexeval run` writes."""
    return run_ours(smollm2, card, tmp_path_factory.mktemp("ours"), ENTRIES)


@pytest.fixture(scope="module")
def stock_chat(smollm2: ModelSource, chat_card: ModelCard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HELM's client applies the chat template that it finds."""
    HuggingFaceServerFactory._servers.clear()
    return run_helm(chat_card, tmp_path_factory.mktemp("stock"), CHAT_ENTRIES, helms_client(smollm2))


@pytest.fixture(scope="module")
def our_chat(smollm2: ModelSource, chat_card: ModelCard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_ours(smollm2, chat_card, tmp_path_factory.mktemp("ours"), CHAT_ENTRIES)


@pytest.fixture(scope="module")
def plugged_chat(smollm2: ModelSource, chat_card: ModelCard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `helm-run` writes with our Runner, which finds the chat template as well."""
    options = {"dtype": "float32", "device": "cpu"}
    spec = {"class_name": CLIENT_CLASS, "args": {"model": str(smollm2.directory), "engine_options": options}}
    runner = ("--runner-class-name", "flexeval.helm_plugin.FlexevalRunner")
    return run_helm(chat_card, tmp_path_factory.mktemp("plugged"), CHAT_ENTRIES, spec, *runner)


@pytest.fixture(scope="module")
def chat_card(card: ModelCard) -> ModelCard:
    return dataclasses.replace(card, num_template_tokens=num_chat_tokens(open_tokenizer(card.tokenizer_dir)))


def helms_client(smollm2: ModelSource, **more: bool) -> dict[str, Any]:
    path = str(smollm2.directory)
    args = {"pretrained_model_name_or_path": path, "torch_dtype": "torch.float32", "device": "cpu", **more}
    return {"class_name": "helm.clients.huggingface_client.HuggingFaceClient", "args": args}


def run_helm(card: ModelCard, output: Path, entries: Sequence[str], client_spec: dict[str, Any], *more: str) -> Path:
    """The command `helm-run` for a deployment with this client."""
    local = output / "prod_env"
    register(card, local)
    path = local / "model_deployments.yaml"
    deployments = yaml.safe_load(path.read_text())
    deployments["model_deployments"][0]["client_spec"] = client_spec
    path.write_text(yaml.safe_dump(deployments))
    arguments = ["--output-path", str(output), "--local-path", str(local), "--suite", "test", "--exit-on-error"]
    arguments += ["--max-eval-instances", str(NUM_INSTANCES), "--disable-cache", "--num-threads", "1", *more]
    arguments += ["--models-to-run", NAME, "--num-train-trials", "1", "--run-entries", *entries]
    helm_run(build_parser().parse_args(arguments))
    return output / "runs/test"


def run_ours(smollm2: ModelSource, card: ModelCard, output: Path, entries: Sequence[str]) -> Path:
    suite = HelmSuite(build_suite(*entries, max_eval_instances=NUM_INSTANCES), card, output=output, data=output)
    with Engine.load(smollm2, dtype="float32", device="cpu") as engine:
        suite.score(engine.generate(suite.collect()))
    return output / "runs/test"


Both = tuple[Path, Path]
"""What HELM's client and what ours gave."""


@pytest.fixture(scope="module", params=[("stock", "ours"), ("stock_chat", "our_chat"), ("stock_chat", "plugged_chat")])
def both(request: pytest.FixtureRequest) -> Both:
    theirs, mine = request.param
    return request.getfixturevalue(theirs), request.getfixturevalue(mine)


def runs(folder: Path) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/stats.json"))}


def pairs(both: Both, file: str) -> Iterator[tuple[str, Any, Any]]:
    """The name of each run, and what both have written of it."""
    theirs, mine = map(runs, both)
    assert theirs.keys() == mine.keys()
    for name in theirs:
        yield name, *(json.loads((run[name] / file).read_text()) for run in (theirs, mine))


@pytest.mark.parametrize("file", ["scenario.json", "run_spec.json"])
def test_runs_are_the_same(both: Both, file: str) -> None:
    for name, theirs, mine in pairs(both, file):
        assert theirs == mine, name


def test_both_write_the_same_files(both: Both) -> None:
    theirs, mine = map(runs, both)
    for name in theirs:
        assert {path.name for path in theirs[name].iterdir()} == {path.name for path in mine[name].iterdir()}, name


def test_requests_and_answers_are_the_same(both: Both) -> None:
    """Theirs says 0.0 of every token that it draws, and nothing of why it ended."""
    for name, theirs, mine in pairs(both, "scenario_state.json"):
        assert len(theirs["request_states"]) == len(mine["request_states"]) > 0
        assert len(mine["request_states"]) == 3 or not name.startswith("document"), "two windows and a short document"
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
def test_statistics_are_the_same(both: Both, file: str) -> None:
    for name, theirs, mine in pairs(both, file):
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


def test_times_are_real(both: Both) -> None:
    """HELM's efficiency metrics: of a batch, and of one request's share of it."""
    for name, run in runs(both[1]).items():
        by_name = {stat["name"]["name"]: stat for stat in json.loads((run / "stats.json").read_text())}
        whole, share, size = (by_name[name]["mean"] for name in CLOCK)
        assert whole > share > 0, name
        assert size > 1 and share == pytest.approx(whole / size), name
        assert by_name["num_output_tokens"]["mean"] >= 0 and by_name["num_completion_tokens"]["mean"] > 0


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


def test_chat_templates_change_answers(our_chat: Path, ours: Path) -> None:
    asked, plain = runs(our_chat), runs(ours)
    common = asked.keys() & plain.keys()
    assert common and all(texts(asked[name]) != texts(plain[name]) for name in common)


def texts(run: Path) -> list[str]:
    states = json.loads((run / "scenario_state.json").read_text())["request_states"]
    return [state["result"]["completions"][0]["text"] for state in states]
