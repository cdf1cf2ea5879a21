"""What the HELM tests run on instead of a model: a tiny tokenizer, an engine that answers from a hash, a document."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm.benchmark.adaptation.common_adapter_specs import get_language_modeling_adapter_spec
from helm.benchmark.metrics.common_metric_specs import get_language_modeling_metric_specs
from helm.benchmark.presentation.summarize import main
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import TEST_SPLIT, Input, Instance, Scenario, ScenarioMetadata, ScenarioSpec
from tiny_tokenizer import tokenizer_dir
from transformers import AutoTokenizer

from flexeval.backends.backend import OnCompletions
from flexeval.benchmark.helm import HelmSuite, ModelCard, Scored
from flexeval.benchmark.suites import Suite
from flexeval.errors import FailedRequestsError, RequestError
from flexeval.request import Completion, FinishReason, Request

CONTEXT = 2048
Table = dict[str, Any]
"""One of `helm-summarize`'s."""


def build_card(*, name: str = "flexeval/tiny", setting: str = "none", adds_bos: bool = False) -> ModelCard:
    return ModelCard(
        name=f"{name}-bos" if adds_bos else name,
        model="tiny",
        setting=setting,
        tokenizer_dir=tokenizer_dir(adds_bos=adds_bos),
        max_sequence_length=CONTEXT,
    )


def build_suite(*entries: str, max_eval_instances: int | None = 8, num_train_trials: int = 1) -> Suite:
    """A suite that is not in any file."""
    return Suite(
        name="test",
        path=Path("test.conf"),
        entries=entries,
        max_eval_instances=max_eval_instances,
        num_train_trials=num_train_trials,
    )


def run_suite(suite: Suite, output: Path, card: ModelCard) -> tuple[list[Request], list[Completion], Scored]:
    """Collect, answer with the fake engine, score."""
    helm_suite = HelmSuite(suite, card, output=output, data=output)
    requests = helm_suite.collect()
    completions = FakeEngine(card.tokenizer_dir).generate(requests)
    return requests, completions, helm_suite.score(completions)


def summarize(output: Path, suite: str, schema: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Table]]:
    """Run `helm-summarize` in this process with one of HELM's schemas; return its tables by group.

    `test_helm_server.py` runs the command itself. Here it would import HELM anew and read its files with a slow reader.
    """
    monkeypatch.setattr(yaml, "safe_load", partial(yaml.load, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    command = ["helm-summarize", "--suite", suite, "--output-path", str(output), "--num-threads", "1"]
    command += ["--local-path", str(output / "prod_env"), "--schema-path", str(files("helm.benchmark.static") / schema)]
    monkeypatch.setattr("sys.argv", command)
    main()
    folder = output / "runs" / suite / "groups"
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def empty_columns(table: Table) -> list[str]:
    """The columns of one model's table in which there is no number, but for its name and its mean win rate."""
    header, (row,) = [cell["value"] for cell in table["header"]], table["rows"]
    pairs = zip(header[2:], row[2:], strict=True)
    return [name for name, cell in pairs if not isinstance(cell.get("value"), int | float)]


class DocumentScenario(Scenario):
    """Two documents to be scored, the first longer than the context."""

    name = "document"
    description = "made for tests"
    tags = ()

    def get_instances(self, output_path: str) -> list[Instance]:
        # HELM loses a token or two where its windows cut a character in pieces: the long text is ASCII.
        texts = ["Dyck words ( [ ] ) of 12 letters. " * 200, "The answer is → 12 cafés."]
        return [Instance(Input(text), references=[], split=TEST_SPLIT) for text in texts]

    def get_metadata(self) -> ScenarioMetadata:
        return ScenarioMetadata(name=self.name, main_metric="bits_per_byte", main_split=TEST_SPLIT)


@run_spec_function("document")
def get_document_spec() -> RunSpec:
    return RunSpec(
        name="document",
        scenario_spec=ScenarioSpec(f"{__name__}.DocumentScenario"),
        adapter_spec=get_language_modeling_adapter_spec(),
        metric_specs=get_language_modeling_metric_specs([]),
        groups=["document"],
    )


TOO_LONG, BREAKS = "too long", "breaks"
"""In a prompt: what the engine refuses, and what the model has no numbers for."""


class FakeEngine:
    """Answers like an engine: real tokens, true counts, and content that depends on the request alone."""

    def __init__(self, folder: Path):
        self.load_arguments: dict[str, object] = {}
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self.batches: list[list[Request]] = []
        self.is_open = False
        self.has_chat_template = False

    def __enter__(self) -> FakeEngine:
        self.is_open = True
        return self

    def __exit__(self, *error: object) -> None:
        self.is_open = False

    def token_requests(self, requests: Sequence[Request]) -> Sequence[Request]:
        if long := [request.prompt for request in requests if TOO_LONG in request.prompt]:
            raise RequestError(f"{long[0]!r} is longer than the context")
        return requests

    def generate(self, requests: Sequence[Request], on_completions: OnCompletions = lambda _: None) -> list[Completion]:
        self.token_requests(requests)
        self.batches.append(list(requests))
        answers = []
        broken = {at: "no numbers in layer 3" for at, request in enumerate(requests) if BREAKS in request.prompt}
        if broken:
            whole = [at for at in range(len(requests)) if at not in broken]
            on_completions([(at, self._complete(requests[at], 0)) for at in whole])
            raise FailedRequestsError(broken)
        for request in requests:
            first, *others = [self._complete(request, index) for index in range(request.num_completions)]
            answers.append(replace(first, alternatives=tuple(others)))
        return answers

    def _complete(self, request: Request, index: int) -> Completion:
        prompt = "\n".join(message.content for message in request.messages) or request.prompt
        content = f"{prompt}|{request.seed}|{index}"
        rng = random.Random(int(hashlib.md5(content.encode()).hexdigest(), 16))
        has_bos = str(prompt).startswith("<s>")
        prompt_ids = self._tokenizer.encode(prompt, add_special_tokens=not has_bos)
        assert len(prompt_ids) + request.max_tokens <= CONTEXT, "an engine refuses what does not fit"
        text = rng.choice([" A", " B", " C", " D", " yes", " } >", " The answer is 12."])
        ids = self._tokenizer.encode(text, add_special_tokens=False)[: request.max_tokens]
        shown = [*prompt_ids, *ids] if request.echo else ids
        return Completion(
            text=self._tokenizer.decode(shown),
            token_ids=tuple(shown),
            tokens=tuple(self._tokenizer.decode([one]) for one in shown),
            logprobs=tuple(0.0 if request.echo and place == 0 else -rng.random() for place in range(len(shown))),
            finish_reason=FinishReason.LENGTH if len(ids) == request.max_tokens else FinishReason.STOP,
            num_prompt_tokens=len(prompt_ids),
            num_generated_tokens=len(ids),
            elapsed_s=0.25,
        )
