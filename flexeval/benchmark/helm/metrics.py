"""HELM's annotators and metrics of a run, any of which may lack something or fail. Must not know who answers.

What they need is looked for before anything is answered; what fails afterwards is one line that says which of them it
was, and its traceback goes where HELM talks to.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.annotation_executor import AnnotationExecutionSpec, AnnotationExecutor, AnnotationExecutorError
from helm.benchmark.metrics.metric import PerInstanceStats, create_metric
from helm.benchmark.metrics.metric_service import MetricService
from helm.benchmark.metrics.statistic import Stat
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import remove_per_instance_stats_nans, remove_stats_nans
from helm.common.general import asdict_without_nones, get_credentials
from helm.common.local_context import LocalContext
from helm.common.object_spec import ObjectSpec

from flexeval.benchmark.helm.missing import MissingData, diagnose
from flexeval.benchmark.helm.punkt import missing_for_metrics
from flexeval.errors import ResultsError

_FAILURES = (Exception, SystemExit)
"""What may come out of them; spaCy leaves the process where it cannot download a model."""
_TOXICITY, _TOXICITY_KEY = "ToxicityMetric", "perspectiveApiKey"
_SHOWN = 300
"""Characters of a failure in a message."""
_KEPT = "then run again: what is answered is kept"


class Evaluated(NamedTuple):
    """What metrics say of a run."""

    stats: list[Stat]
    """Over all questions."""
    per_instance: list[PerInstanceStats]
    """On single questions."""


class Metrics:
    """Makes and runs them.

    Args:
        local: HELM's folder of configuration files, where credentials of its services lie.
        eval_cache: Where metrics keep what they download.
        parallelism: HELM's threads.
    """

    def __init__(self, local: Path, eval_cache: Path, *, parallelism: int):
        self._eval_cache = eval_cache
        self._parallelism = parallelism
        self._service = MetricService(LocalContext(base_path=str(local)))
        self._annotator = AnnotationExecutor(AnnotationExecutionSpec(local_path=str(local), parallelism=parallelism))
        self._local = local
        self._checked: dict[str, MissingData | None] = {}

    def missing(self, spec: RunSpec) -> list[MissingData]:
        """Return what the annotators and metrics of a run lack, as far as making them shows it."""
        makers: list[tuple[ObjectSpec, Callable[[Any], object]]] = [
            *((one, self._annotator.factory.get_annotator) for one in spec.annotators or ()),
            *((one, create_metric) for one in spec.metric_specs),
        ]
        found = [missing_for_metrics(spec), self._missing_key(spec)]
        for one, make in makers:
            key = json.dumps(asdict_without_nones(one), sort_keys=True, default=str)
            if key not in self._checked:
                try:
                    make(one)
                    self._checked[key] = None
                except _FAILURES as error:
                    self._checked[key] = _lack(one, error)
            found.append(self._checked[key])
        return [lack for lack in dict.fromkeys(found) if lack is not None]

    def _missing_key(self, spec: RunSpec) -> MissingData | None:
        """Say that HELM's measure of toxicity would leave all answers without a score, and of no key to say so."""
        if not any(_name(metric) == _TOXICITY for metric in spec.metric_specs):
            return None
        if get_credentials(str(self._local)).get(_TOXICITY_KEY, ""):
            return None
        where = f"HELM_CREDENTIALS or {self._local}/credentials.conf"
        reason = f"HELM's {_TOXICITY} asks the Perspective API, whose key HELM reads from {where}"
        return MissingData(path=_TOXICITY_KEY, reason=reason, kind="credential")

    def evaluate(self, spec: RunSpec, state: ScenarioState) -> tuple[ScenarioState, Evaluated]:
        """Annotate the answers of a run and compute its metrics; return the state with its annotations as well.

        Raises:
            ResultsError: One of them failed.
        """
        with _named(spec, " and ".join(map(_name, spec.annotators or ())) or "annotation"):
            state = self._annotator.execute(state)
        stats: list[Stat] = []
        per_instance: list[PerInstanceStats] = []
        for metric_spec in spec.metric_specs:
            with _named(spec, _name(metric_spec)):
                metric = create_metric(metric_spec)
                result = metric.evaluate(state, self._service, str(self._eval_cache), self._parallelism)
            stats.extend(result.aggregated_stats)
            per_instance.extend(result.per_instance_stats)
        return state, Evaluated(remove_stats_nans(stats), remove_per_instance_stats_nans(per_instance))


@contextmanager
def _named(spec: RunSpec, name: str) -> Iterator[None]:
    """Say of what fails within the block which run and part of HELM it is. Raises `ResultsError`."""
    try:
        yield
    except _FAILURES as failure:
        traceback.print_exc()
        # HELM's executor wraps what its annotators raise, and puts the whole request behind it.
        error = failure.__cause__ if isinstance(failure, AnnotationExecutorError) else None
        error = error or failure
        lack = diagnose(error)
        if lack is None:
            what, mend = f"failed: {_first_words(error)}", f"helm.log has the traceback; mend that, {_KEPT}"
        elif lack.is_package:
            what, mend = f"needs {lack.place}: {_first_words(error)}", f"Install it, {_KEPT}"
        else:
            what, mend = f"needs {lack.place}: {_first_words(error)}", f"Place it there, {_KEPT}"
        raise ResultsError(
            f"HELM's {name} {what}", where=spec.name, mend=f"{mend}; or leave the entry out"
        ) from failure


def _lack(spec: ObjectSpec, error: BaseException) -> MissingData:
    """What kept an annotator or a metric from being made."""
    found = diagnose(error)
    if found is None:
        traceback.print_exc()
        return MissingData(path=_name(spec), reason=_first_words(error), kind="working")
    return found._replace(reason=f"HELM's {_name(spec)}: {found.reason}")


def _name(spec: ObjectSpec) -> str:
    return spec.class_name.rpartition(".")[2]


def _first_words(error: BaseException) -> str:
    """Name and message of an error, in a line."""
    return shorten(f"{type(error).__name__}: {error}", _SHOWN, placeholder=" ...")
