"""Stock `helm-run` with our engine: through the Runner in one batch a run, through the Client in small ones."""

import dataclasses
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helm.benchmark.model_deployment_registry import ClientSpec, ModelDeployment, register_model_deployment
from helm.benchmark.run import build_parser, helm_run
from helm.benchmark.runner import RunnerError
from helm.clients.auto_client import AutoClient
from helm.common.cache_backend_config import BlackHoleCacheBackendConfig
from helm.common.request import Request as HelmRequest
from helm.common.request import RequestResult
from helm.proxy.retry import NonRetriableException
from helm_support import FakeEngine, build_card, tokenizer_dir

import flexeval
from flexeval import helm_plugin
from flexeval.benchmark.helm.models import CLIENT_CLASS, register
from flexeval.errors import ConfigError, RequestError
from flexeval.helm_plugin import EngineArguments, FlexevalClient
from flexeval.request import Completion, Request

RUNNER = "flexeval.helm_plugin.FlexevalRunner"


class EngineDouble:
    """In the place of `flexeval.Engine`: remembers what was loaded."""

    loaded: list[FakeEngine]

    @classmethod
    def load(cls, model: str, **options: object) -> FakeEngine:
        engine = FakeEngine(tokenizer_dir())
        engine.load_arguments = {"model": model, **options}
        cls.loaded.append(engine)
        return engine


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeEngine]]:
    EngineDouble.loaded = []
    monkeypatch.setitem(vars(flexeval), "Engine", EngineDouble)
    yield EngineDouble.loaded


def run_helm(
    output: Path, *more: str, settings: tuple[str, ...] = ("none",), runner: bool = True, stops: bool = True
) -> list[Path]:
    """What the command `helm-run` does after it has set up its log; the directories of the runs."""
    local = output / "prod_env"
    for setting in settings:
        register(build_card(name="flexeval/plugged", setting=setting), local)
    arguments = ["--output-path", str(output), "--local-path", str(local), "--suite", "stock"]
    arguments += ["--max-eval-instances", "6", "--disable-cache", *more]
    arguments += ["--exit-on-error"] if stops else []
    arguments += ["--models-to-run", *[build_card(name="flexeval/plugged", setting=one).deployment for one in settings]]
    arguments += ["--runner-class-name", RUNNER] if runner else []
    helm_run(build_parser().parse_args(arguments))
    return sorted(path.parent for path in (output / "runs/stock").glob("*/stats.json"))


def test_helm_run_answers_each_run_in_one_batch(tmp_path: Path, engines: list[FakeEngine]) -> None:
    conf = tmp_path / "entries.conf"
    conf.write_text('entries: [{description: "simple_mcqa:model=text", priority: 1}]')
    runs = run_helm(tmp_path, "--conf-paths", str(conf), settings=("none", "w4"))
    assert [path.name.partition("model=")[2] for path in runs] == ["flexeval_plugged", "flexeval_plugged-w4"]
    assert [engine.load_arguments for engine in engines] == [
        {"model": "tiny", "setting": "none"},
        {"model": "tiny", "setting": "w4"},
    ]
    assert [[len(batch) for batch in engine.batches] for engine in engines] == [[6], [6]]
    assert not any(engine.is_open for engine in engines), "released at the end"


def test_a_dry_run_loads_no_engine(tmp_path: Path, engines: list[FakeEngine]) -> None:
    run_helm(tmp_path, "--dry-run", "--run-entries", "simple_mcqa:model=text")
    assert engines == []


def test_our_tasks_are_there_for_helm_run(tmp_path: Path) -> None:
    (run,) = run_helm(tmp_path, "--plugins", "flexeval.helm_plugin", "--run-entries", "hellaswag_packaged:model=text")
    spec = json.loads((run / "run_spec.json").read_text())
    assert spec["scenario_spec"]["class_name"] == "flexeval_tasks.hellaswag_packaged.HellaSwagPackagedScenario"


def test_runner_and_client_give_the_same_statistics(tmp_path: Path, engines: list[FakeEngine]) -> None:
    entry = ("--run-entries", "simple_mcqa:model=text")
    (by_runner,) = run_helm(tmp_path / "runner", *entry)
    (by_client,) = run_helm(tmp_path / "client", *entry, "--num-threads", "3", runner=False)

    def stats(run: Path) -> list[dict[str, object]]:
        clock = ("inference_runtime", "inference_denoised_runtime", "batch_size")
        return [one for one in json.loads((run / "stats.json").read_text()) if one["name"]["name"] not in clock]

    assert stats(by_client) == stats(by_runner)
    assert sum(len(batch) for batch in engines[1].batches) == 6
    assert engines[1].is_open, "a client keeps its engine"


def test_the_client_of_a_deployment_is_ours(tmp_path: Path) -> None:
    register(build_card(name="flexeval/served"), tmp_path)
    client = AutoClient({}, str(tmp_path), BlackHoleCacheBackendConfig())
    request = HelmRequest(model="flexeval/served", model_deployment="flexeval/served", prompt="1 + 1 =", max_tokens=4)
    result = client.make_request(request)
    assert result.success and len(result.completions) == 1


SAID = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3?"}]


@pytest.mark.parametrize(
    ("apply_chat_template", "has_one", "is_chat"),
    [(None, True, True), (None, False, False), (True, True, True), (False, True, False)],
)
def test_a_chat_template_is_applied_as_the_deployment_says_or_where_there_is_one(
    apply_chat_template: bool | None, has_one: bool, is_chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine(tokenizer_dir())
    engine.has_chat_template = has_one
    monkeypatch.setattr(EngineDouble, "load", lambda model, **options: engine)
    client = FlexevalClient("tiny", apply_chat_template=apply_chat_template)
    assert client.make_request(HelmRequest(prompt="1 + 1 =", max_tokens=8)).success
    result = client.make_request(HelmRequest(messages=SAID, max_tokens=8))
    assert result.success is is_chat
    assert [request.is_chat for batch in engine.batches for request in batch] == ([True, True] if is_chat else [False])
    if not is_chat:
        assert result.error is not None and "no chat template is applied" in result.error


def test_what_is_scored_stands_in_no_template(engines: list[FakeEngine]) -> None:
    client = FlexevalClient("tiny", apply_chat_template=True)
    client.make_request(HelmRequest(prompt="1 + 1 = 2", max_tokens=0, echo_prompt=True))
    assert [request.is_chat for request in engines[0].batches[0]] == [False]


@pytest.mark.parametrize("num_template_tokens", [0, 9])
def test_helm_run_asks_as_the_run_that_wrote_the_deployment(num_template_tokens: int, tmp_path: Path) -> None:
    card = dataclasses.replace(build_card(name="flexeval/asked"), num_template_tokens=num_template_tokens)
    register(card, tmp_path)
    assert EngineArguments.of_deployment("flexeval/asked").apply_chat_template is (num_template_tokens > 0)


def test_arguments_that_are_none_of_ours_are_named() -> None:
    register_model_deployment(
        ModelDeployment("flexeval/odd", ClientSpec(CLIENT_CLASS, {"model": "tiny", "sett": "w4"}))
    )
    with pytest.raises(ConfigError, match=r"flexeval/odd's client.*'sett'.*model, setting, .*apply_chat_template"):
        EngineArguments.of_deployment("flexeval/odd")


def test_requests_of_many_threads_are_answered_together(
    engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helm_plugin, "_GATHER_S", 0.2)
    client = FlexevalClient("tiny", setting="w4", engine_options={"gpu_memory": "16GiB"})
    together = threading.Barrier(8)

    def ask(number: int) -> str:
        together.wait()
        return client.make_request(HelmRequest(prompt=f"{number} + 1 =", max_tokens=8)).completions[0].text

    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(ask, range(8)))
    (engine,) = engines
    assert engine.load_arguments == {"model": "tiny", "setting": "w4", "gpu_memory": "16GiB"}
    assert [len(batch) for batch in engine.batches] == [8]
    alone = FakeEngine(tokenizer_dir()).generate([Request(prompt=f"{i} + 1 =", max_tokens=8) for i in range(8)])
    assert texts == [completion.text for completion in alone], "everyone gets the answer to their own question"


def test_a_request_that_cannot_be_served_fails_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FakeEngine, requests: list[Request], **_: object) -> list[Completion]:
        raise RequestError("the prompt is longer than the context")

    monkeypatch.setattr(FakeEngine, "generate", refuse)
    result = FlexevalClient("tiny").make_request(HelmRequest(prompt="x", max_tokens=1))
    assert not result.success and result.completions == []
    assert result.error == "the prompt is longer than the context"
    assert result.error_flags is not None and result.error_flags.is_retriable is False


def test_a_request_that_fails_fails_alone(engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helm_plugin, "_GATHER_S", 0.2)
    client = FlexevalClient("tiny", apply_chat_template=False)
    prompts = ["1 + 1 =", "it is too long", "2 + 2 =", "it breaks"]
    asked = [HelmRequest(prompt=prompt, max_tokens=8) for prompt in prompts] + [HelmRequest(messages=SAID)]
    together = threading.Barrier(len(asked))

    def ask(request: HelmRequest) -> RequestResult:
        together.wait()
        return client.make_request(request)

    with ThreadPoolExecutor(len(asked)) as threads:
        first, long, second, broken, chat = threads.map(ask, asked)
    assert first.success and second.success and engines[0].batches and len(engines[0].batches[-1]) == 3
    alone = FakeEngine(tokenizer_dir()).generate([Request(prompt="1 + 1 =", max_tokens=8)])
    assert first.completions[0].text == alone[0].text
    for result, words in ((long, "longer than"), (broken, "no numbers in layer 3"), (chat, "no chat template")):
        assert not result.success and result.completions == [] and words in str(result.error)
        assert result.error_flags is not None and result.error_flags.is_fatal and not result.error_flags.is_retriable


def test_a_run_of_which_a_request_failed_is_given_up_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FakeEngine, requests: list[Request]) -> list[Request]:
        if long := [request for request in requests if "Answer:" in request.prompt]:  # those of multiple choice
            raise RequestError(f"{len(long)} are longer than the context")
        return requests

    monkeypatch.setattr(FakeEngine, "token_requests", refuse)
    conf = tmp_path / "entries.conf"
    entries = ", ".join(
        f'{{description: "{name}:model=text", priority: 1}}' for name in ("simple_mcqa", "simple_classification")
    )
    conf.write_text(f"entries: [{entries}]")
    with pytest.raises(RunnerError, match="simple_mcqa"):
        run_helm(tmp_path, "--conf-paths", str(conf), stops=False)
    (run,) = (path.parent for path in (tmp_path / "runs/stock").glob("*/stats.json"))
    assert run.name.startswith("simple_classification")


def test_a_bug_is_not_tried_five_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(self: FakeEngine, requests: list[Request], **_: object) -> list[Completion]:
        raise RuntimeError("out of bounds")

    monkeypatch.setattr(FakeEngine, "generate", break_down)
    with pytest.raises(NonRetriableException, match="RuntimeError: out of bounds"):
        FlexevalClient("tiny").make_request(HelmRequest(prompt="x", max_tokens=1))


def test_deployments_of_others_are_refused() -> None:
    with pytest.raises(ConfigError, match="openai/gpt2 is a deployment of"):
        register_model_deployment(ModelDeployment("openai/gpt2", ClientSpec("helm.clients.openai_client.OpenAIClient")))
        EngineArguments.of_deployment("openai/gpt2")
