"""A suite under one setting: all requests of all its runs at once, and all their answers back into HELM.

Others call the engine, once, between `collect` and `score`. Must not know who answers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import set_benchmark_output_path

from flexeval.benchmark.data import lay_out, packaged_source
from flexeval.benchmark.helm.convert import Batch
from flexeval.benchmark.helm.downloads import careful_downloads
from flexeval.benchmark.helm.entries import build_run_specs, short_name, task_names
from flexeval.benchmark.helm.headline import (
    LOWER_IS_BETTER,
    Headline,
    choose_headline,
    instance_results,
    question_stats,
)
from flexeval.benchmark.helm.log import helm_talks_to
from flexeval.benchmark.helm.missing import MissingData, diagnose, missing_data_error
from flexeval.benchmark.helm.models import ModelCard, register
from flexeval.benchmark.helm.perturbations import perturbations_below
from flexeval.benchmark.helm.runs import AdaptedRun, RunRoom, without
from flexeval.benchmark.helm.schema import write_schema
from flexeval.benchmark.network import impatient_downloads
from flexeval.benchmark.resources import import_tasks
from flexeval.benchmark.suites import Suite
from flexeval.cache import cache_root
from flexeval.errors import ConfigError, FlexevalError, RequestError, ResultsError
from flexeval.request import Completion, Request
from flexeval.results import InstanceResult, TaskInfo

OnTask = Callable[[int, int], None]
"""Told (tasks done, tasks in all)."""


class Scored(NamedTuple):
    """What HELM made of the answers."""

    tasks: list[TaskInfo]
    """The tasks that were run, in the suite's order."""
    instances: list[InstanceResult]
    """Their questions, task by task."""


class HelmSuite:
    """A suite as HELM runs it for one model under one setting.

    Args:
        suite: What to run.
        card: The model under a setting.
        output: HELM's output folder: `runs/`, its configuration files in `prod_env/`, its log in `helm.log`.
        data: Folder of input data, shared by all runs: `scenarios/` holds what HELM's scenarios download,
            `packaged/scenarios/` what packages carry. None is `helm` in flexeval's cache.
        max_eval_instances: At most so many questions per run, whatever the suite says; None leaves it to the suite.
        skip_missing: Run without the entries whose data cannot be had, instead of raising.
    """

    def __init__(
        self,
        suite: Suite,
        card: ModelCard,
        *,
        output: Path,
        data: Path | None = None,
        max_eval_instances: int | None = None,
        skip_missing: bool = False,
    ):
        self.skipped: dict[str, str] = {}
        """Tasks that are not run because their data cannot be had, and why; known after `collect`."""
        self.failed: dict[str, str] = {}
        """Tasks that were answered but not scored, and why; known after `score`."""
        self._suite = suite
        self._card = card
        self._output = output.resolve()
        self._data = (data or cache_root() / "helm").resolve()
        self._max_eval_instances = max_eval_instances
        self._skip_missing = skip_missing
        self._log = self._output / "helm.log"
        self._runs: dict[str, AdaptedRun] = {}
        self._room: RunRoom | None = None

    def collect(self, *, on_task: OnTask = lambda num_done, num_tasks: None) -> list[Request]:
        """Build all runs, and return every different request of them in the order of first use.

        Raises:
            DataError: Data of some runs cannot be had; it names all of them and the paths they are expected at.
            ConfigError: A run entry cannot be built, or a task fails.
            RequestError: HELM asks for something that no engine can do.
        """
        import_tasks()
        with helm_talks_to(self._log):
            local = self._output / "prod_env"
            special = register(self._card, local)
            runs = self._output / "runs" / self._suite.name
            is_chat = self._card.num_template_tokens > 0
            self._room = RunRoom(self._provide, runs, local, special.added_prefix, is_chat=is_chat)
            set_benchmark_output_path(str(self._data))  # where run specs that read data look for `scenarios/`
        missing: dict[str, list[MissingData]] = defaultdict(list)
        with impatient_downloads(), careful_downloads(), perturbations_below(self._data):
            specs = self._build_specs(missing)
            self._runs = self._adapt(self._room, specs, missing, on_task)
        if missing and not (self._skip_missing and self._runs):
            raise missing_data_error(missing, len(missing) + len(self._runs))
        self.skipped = {
            task: "; ".join(f"no {lack.place}: {lack.reason}" for lack in found) for task, found in missing.items()
        }
        return list(dict.fromkeys(request for run in self._runs.values() for request in run.requests))

    @property
    def requests_of_tasks(self) -> dict[str, Sequence[Request]]:
        """By task, all that it asks; known after `collect`."""
        return {task: run.requests for task, run in self._runs.items()}

    def score(
        self, completions: Sequence[Completion | None], *, on_task: OnTask = lambda num_done, num_tasks: None
    ) -> Scored:
        """Compute HELM's metrics and write its run directories.

        Args:
            completions: The answer to each request that `collect` returned, in its order. None for one that failed:
                what it belongs to is not scored.
            on_task: Told the progress.

        Raises:
            ResultsError: No run could be scored: what is wrong with the first. Where some could, `failed` has the rest.
        """
        assert self._room is not None, "score comes after collect"
        uses = Counter(request for run in self._runs.values() for request in run.requests)
        asked = dict(zip(uses, completions, strict=True))  # a Counter keeps the order of first use
        answers = {request: answer for request, answer in asked.items() if answer is not None}
        batch, failed = Batch.of(list(answers.values())), asked.keys() - answers.keys()
        # Questions that share a request share its time.
        shares = {
            request: replace(answer, elapsed_s=answer.elapsed_s / uses[request]) for request, answer in answers.items()
        }
        scored = Scored(tasks=[], instances=[])
        failures: list[ResultsError] = []
        for num_done, (task, whole) in enumerate(self._runs.items()):
            on_task(num_done, len(self._runs))
            try:
                run = without(whole, failed)
                with helm_talks_to(self._log), impatient_downloads():
                    stats = question_stats(self._room.score(run, [answers[request] for request in run.requests], batch))
                headline = choose_headline(run, stats)
                own = [shares[request] for request in run.requests]
                results = instance_results(run, own, stats, headline, task=task, setting=self._card.setting)
            except ResultsError as error:
                self.failed[task] = str(error)
                failures.append(error)
                continue
            scored.instances.extend(results)
            scored.tasks.append(self._info(task, run, headline))
        on_task(len(self._runs), len(self._runs))
        if not scored.tasks:
            raise failures[0]
        write_schema(self._output / "schema.yaml", self._suite, scored.tasks)
        return scored

    def _info(self, task: str, run: AdaptedRun, headline: Headline) -> TaskInfo:
        return TaskInfo(
            name=task,
            metric=headline.metric,
            split=headline.split,
            group=run.spec.groups[0] if run.spec.groups else run.scenario.name,
            higher_is_better=headline.metric not in LOWER_IS_BETTER,
            source=self._source(run),
        )

    def _build_specs(self, missing: dict[str, list[MissingData]]) -> dict[str, RunSpec]:
        specs: list[RunSpec] = []
        for entry in self._suite.entries:
            try:
                with helm_talks_to(self._log):
                    specs += build_run_specs(entry, self._suite, self._card.deployment, self._max_eval_instances)
            except ConfigError:
                raise
            except (Exception, SystemExit) as error:
                found = diagnose(error)
                if found is None:
                    raise ConfigError(
                        f"HELM cannot build the run entry {entry!r}: {error}",
                        where=str(self._suite.path),
                        mend="Correct its name and arguments",
                    ) from error
                missing[short_name(entry)].append(found)
        return dict(zip(task_names(specs), specs, strict=True))

    def _adapt(
        self,
        room: RunRoom,
        specs: Mapping[str, RunSpec],
        missing: dict[str, list[MissingData]],
        on_task: OnTask,
    ) -> dict[str, AdaptedRun]:
        runs: dict[str, AdaptedRun] = {}
        for num_done, (task, spec) in enumerate(specs.items()):
            on_task(num_done, len(specs))
            self._check_length(task, spec)
            try:
                with helm_talks_to(self._log):
                    if lacks := room.metrics.missing(spec):
                        missing[task] += lacks
                    run = room.adapt(spec)
            except (Exception, SystemExit) as error:
                found = diagnose(error)
                if found is None:
                    raise error if isinstance(error, FlexevalError) else _broken(spec, error) from error
                missing[task].append(found)
                continue
            if not run.requests:
                folder = self._data_of(run.scenario.name) / "scenarios" / run.scenario.name
                missing[task].append(MissingData(path=str(folder), reason="they hold no questions for this task"))
            if task not in missing:
                runs[task] = run
        on_task(len(specs), len(specs))
        return runs

    def _check_length(self, task: str, spec: RunSpec) -> None:
        """Raise `RequestError` where no prompt would fit: HELM would shorten an empty one forever."""
        num_tokens, length = spec.adapter_spec.max_tokens, self._card.max_sequence_length
        if num_tokens >= length:
            raise RequestError(
                f"{task} asks for max_tokens={num_tokens}, the model's context holds {length}",
                where=str(self._suite.path),
                mend="Choose a model with a longer context, or write a smaller max_tokens= in the run entry",
            )

    def _provide(self, scenario: str) -> Path:
        """Return the folder of a scenario's input data, after laying out what the suite takes from packages."""
        data = self._data_of(scenario)
        if scenario in self._suite.packaged_data:
            lay_out(scenario, data / "scenarios")
        return data

    def _data_of(self, scenario: str) -> Path:
        """Keep packaged data apart, so that they never stand in for HELM's download in another suite."""
        return self._data / "packaged" if scenario in self._suite.packaged_data else self._data

    def _source(self, run: AdaptedRun) -> str:
        """Say where the questions come from when HELM did not fetch them: a task of ours describes itself."""
        if type(run.scenario).__module__.startswith("helm."):
            return packaged_source(run.scenario.name, self._data_of(run.scenario.name) / "scenarios")
        return run.scenario.description


def _broken(spec: RunSpec, error: BaseException) -> ConfigError:
    """Say that a task failed, which is its own fault, or that of what its entry asks."""
    what = f"the task's questions cannot be made: {type(error).__name__}: {error}"
    mend = "Correct the task, or its entry's arguments; flexeval --debug shows where it failed"
    return ConfigError(what, where=spec.name, mend=mend)
