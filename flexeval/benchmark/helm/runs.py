"""One HELM run in two halves: from a run spec to requests, and from their answers to HELM's run directory.

This is `helm.benchmark.runner.Runner.run_one` cut where it executes, so that all runs of a suite wait for one engine
call in between and no question is made twice. A test holds the written files against HELM's own runner. Must not know
who answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helm.benchmark.adaptation.adapters.adapter_factory import AdapterFactory
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.data_preprocessor import DataPreprocessor
from helm.benchmark.metrics.metric import PerInstanceStats
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import downsample_eval_instances
from helm.benchmark.scenarios.scenario import (
    EVAL_SPLITS,
    TRAIN_SPLIT,
    Instance,
    Scenario,
    create_scenario,
    get_scenario_cache_path,
    with_instance_ids,
)
from helm.benchmark.window_services.tokenizer_service import TokenizerService
from helm.common.general import asdict_without_nones
from helm.common.local_context import LocalContext

from flexeval.benchmark.helm.convert import Batch, from_helm, to_helm
from flexeval.benchmark.helm.metrics import Metrics
from flexeval.errors import ConfigError, RequestError, ResultsError
from flexeval.files import write_text
from flexeval.request import Completion, Request

_PARALLELISM = 1  # HELM's threads share one tokenizer behind a lock: more of them only wait


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedRun:
    """A run whose requests are known."""

    spec: RunSpec
    """HELM's specification of it."""
    scenario: Scenario
    """Where its questions come from."""
    state: ScenarioState
    """The questions, and the requests made of them, without results."""
    requests: tuple[Request, ...]
    """The same requests in flexeval's words, in the order of `state.request_states`."""


def without(run: AdaptedRun, failed: Collection[Request]) -> AdaptedRun:
    """The run without the questions that a failed request belongs to: they are neither right nor wrong.

    Raises `ResultsError` where no question is left.
    """
    pairs = list(zip(run.state.request_states, run.requests, strict=True))
    lost = {_question(state) for state, request in pairs if request in failed}
    if not lost:
        return run
    kept = [(state, request) for state, request in pairs if _question(state) not in lost]
    if not kept:
        raise ResultsError("every question has a request that failed", where=run.spec.name)
    states, requests = zip(*kept, strict=True)
    return replace(run, state=replace(run.state, request_states=list(states)), requests=requests)


def _question(state: RequestState) -> tuple[str | None, int]:
    return state.instance.id, state.train_trial_index


class RunRoom:
    """The place where runs are adapted and scored: HELM's folders and services.

    Args:
        data_of: Gives, for a scenario's name, the folder in which `scenarios/` holds what it downloads.
        runs: Folder for the run directories of a suite.
        local: HELM's folder of configuration files (`prod_env`).
        added_prefix: Text of the token that the engine puts before a prompt, if it does.
        is_chat: Whether prompts that are answered stand in the model's chat template.
    """

    def __init__(
        self, data_of: Callable[[str], Path], runs: Path, local: Path, added_prefix: str, *, is_chat: bool = False
    ):
        self._is_chat = is_chat
        self._data_of = data_of
        self._runs = runs
        self._added_prefix = added_prefix
        eval_cache = runs / "eval_cache"
        eval_cache.mkdir(parents=True, exist_ok=True)
        self._tokenizer_service = TokenizerService(LocalContext(base_path=str(local)))
        self.metrics = Metrics(local, eval_cache, parallelism=_PARALLELISM)
        """Compute what is said of the answers."""

    def adapt(self, spec: RunSpec) -> AdaptedRun:
        """Make the questions of a run and the requests that ask them. May download what the scenario needs.

        Raises:
            ConfigError: The scenario's questions cannot be asked, or not be told apart.
            RequestError: HELM asks for something that no engine can do.
            Exception: Whatever the scenario raises.
        """
        scenario = create_scenario(spec.scenario_spec)
        instances = scenario.get_instances(get_scenario_cache_path(str(self._data_of(scenario.name)), scenario.name))
        if any(instance.id is None for instance in instances):
            instances = with_instance_ids(instances)
        adapter_spec = spec.adapter_spec
        if adapter_spec.max_eval_instances is not None:
            splits = adapter_spec.eval_splits or EVAL_SPLITS
            instances = downsample_eval_instances(instances, adapter_spec.max_eval_instances, splits)
        _check(instances, spec.name)
        instances = DataPreprocessor(spec.data_augmenter_spec).preprocess(instances, _PARALLELISM)
        adapter = AdapterFactory.get_adapter(adapter_spec, self._tokenizer_service)
        request_states = adapter.adapt(instances, _PARALLELISM)
        if getattr(scenario, "prompts_are_whole", False):
            _refuse_shortened(request_states, spec.name)
        return AdaptedRun(
            spec=spec,
            scenario=scenario,
            state=ScenarioState(adapter_spec, request_states, spec.annotators),
            requests=tuple(from_helm(state.request, is_chat=self._is_chat) for state in request_states),
        )

    def score(self, run: AdaptedRun, answers: Sequence[Completion], batch: Batch) -> list[PerInstanceStats]:
        """Compute the metrics of a run, write its directory, and return the metrics on single questions.

        Args:
            run: What `adapt` returned.
            answers: The answer to each of `run.requests`, in their order.
            batch: The batch they were answered in.

        Raises:
            ResultsError: One of HELM's annotators or metrics failed; nothing is written.
        """
        request_states = [
            replace(state, result=to_helm(state.request, answer, batch=batch, added_prefix=self._added_prefix))
            for state, answer in zip(run.state.request_states, answers, strict=True)
        ]
        state, (stats, per_instance) = self.metrics.evaluate(
            run.spec, ScenarioState(run.spec.adapter_spec, request_states, run.spec.annotators)
        )
        directory = self._runs / run.spec.name
        _write(directory / "run_spec.json", asdict_without_nones(run.spec))
        _write(directory / "scenario.json", asdict_without_nones(run.scenario))
        _write(directory / "scenario_state.json", asdict_without_nones(state))
        _write(directory / "stats.json", [asdict_without_nones(stat) for stat in stats])
        _write(directory / "per_instance_stats.json", [asdict_without_nones(stat) for stat in per_instance])
        return per_instance


def _check(instances: Sequence[Instance], where: str) -> None:
    """Raise `ConfigError` for what HELM would find when all is answered, or never; examples may share an id."""
    seen: set[tuple[str | None, str | None]] = set()
    for instance in instances:
        texts = [instance.input.text, *(reference.output.text for reference in instance.references)]
        if odd := [text for text in (instance.id, *texts) if not isinstance(text, str)]:
            what = f"question {instance.id!r} has {odd[0]!r} where a text belongs"
            raise ConfigError(what, where=where, mend="Correct the task")
        if (name := (instance.id, instance.split)) in seen and instance.split != TRAIN_SPLIT:
            what = f"two questions have the id {instance.id!r}"
            raise ConfigError(what, where=where, mend="Give each of the task's questions an id of its own, or none")
        seen.add(name)


def _refuse_shortened(request_states: Sequence[RequestState], where: str) -> None:
    """Raise `RequestError` where HELM has cut a prompt of a scenario that wants them whole."""
    num_cut = sum(state.prompt_truncated for state in request_states)
    if num_cut:
        raise RequestError(
            f"{num_cut} of {len(request_states)} prompts are longer than the model's context",
            where=where,
            mend="Choose a model with a longer context, or ask with fewer examples",
        )


def _write(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2))
