"""From a suite's run entries to HELM's run specs, and from those to names for people. Builds no questions."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

from helm.benchmark.adaptation.adapter_spec import AdapterSpec
from helm.benchmark.presentation.run_entry import RunEntry
from helm.benchmark.run import run_entries_to_run_specs
from helm.benchmark.run_spec import RunSpec

from flexeval.benchmark.suites import Suite
from flexeval.errors import ConfigError

_SILENT = frozenset(
    {
        "data_augmentation",
        "device",
        "eval_split",
        "follow_format_instructions",
        "k",
        "max_eval_instances",
        "max_tokens",
        "max_train_instances",
        "method",
        "model",
        "num_train_trials",
        "output_format_instructions",
        "stop",
        "temperature",
        "use_chain_of_thought",
        "use_official_examples",
        "valid_topk",
        "window_bytes",
    }
)
"""Arguments in the name of a run that people need not see, unless two tasks would have one name."""

_LEAST = {
    "max_eval_instances": 1,
    "max_train_instances": 0,
    "max_tokens": 0,
    "num_outputs": 1,
    "num_train_trials": 1,
    "num_trials": 1,
}
"""Counts in HELM's adapter specs; None where there is no limit."""
_LONGEST_NAME = 255
"""Bytes that file systems take."""


def build_run_specs(entry: str, suite: Suite, deployment: str, max_eval_instances: int | None) -> list[RunSpec]:
    """Return the runs that a suite's entry stands for.

    Args:
        entry: HELM's description of the entry.
        suite: The suite it belongs to, for its defaults.
        deployment: HELM's name of the model.
        max_eval_instances: Upper limit of questions per run, over what the entry and the suite say.

    Raises:
        ConfigError: The entry is for other models.
        Exception: Whatever HELM raises for an entry that it cannot build.
    """
    specs = run_entries_to_run_specs(
        [RunEntry(description=entry, priority=None, groups=list(suite.groups.get(entry, ())) or None)],
        max_eval_instances=suite.max_eval_instances,
        num_train_trials=suite.num_train_trials,
        models_to_run=[deployment],
    )
    if not specs:
        raise ConfigError(
            f"the run entry {entry!r} is for other models", where=str(suite.path), mend="Write model=text in it"
        )
    for spec in specs:
        if len(os.fsencode(spec.name)) > _LONGEST_NAME:
            raise ValueError(f"{spec.name!r} is too long for the name of the run's directory")
        _check(spec.adapter_spec)
    return [_limit(spec, max_eval_instances) for spec in specs]


def _check(adapter_spec: AdapterSpec) -> None:
    """Raise `ValueError` for counts and temperatures that are none: HELM takes what an entry says as it is."""
    for name, least in _LEAST.items():
        value = getattr(adapter_spec, name)
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"{name}={value!r} is not a whole number, at least {least}")
    temperature = adapter_spec.temperature
    if type(temperature) not in (int, float) or not math.isfinite(temperature):
        raise ValueError(f"temperature={temperature!r} is not a number")


def task_names(specs: Sequence[RunSpec]) -> list[str]:
    """Return a name for each run that is the same for every model: `mmlu: abstract_algebra`.

    Where the short names of two runs are equal, both get all their arguments.

    Raises:
        ConfigError: Two runs are the same.
    """
    short = [short_name(spec.name) for spec in specs]
    times = Counter(short)
    names = [
        name if times[name] == 1 else short_name(spec.name, hidden={"model"})
        for name, spec in zip(short, specs, strict=True)
    ]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"two entries make the same run {twice[0]!r}", where="the suite", mend="Remove one of them")
    return names


def short_name(text: str, *, hidden: Collection[str] = _SILENT) -> str:
    """Return the name of a run, or a run entry, without its `hidden` arguments: `mmlu: abstract_algebra`."""
    front, _, tail = text.partition(":")
    head, *more = front.split(",")  # HELM puts an argument before the colon now and then
    arguments = [argument.partition("=") for argument in (*more, *tail.split(",")) if argument]
    shown = [_in_words(key, value) for key, _, value in arguments if key not in hidden and value != "False"]
    return f"{head}: {', '.join(shown)}" if shown else head


def _in_words(key: str, value: str) -> str:
    if value == "True":
        return key
    return value if value and not value[0].isdigit() else f"{key}={value}"


def _limit(spec: RunSpec, max_eval_instances: int | None) -> RunSpec:
    limits = [limit for limit in (spec.adapter_spec.max_eval_instances, max_eval_instances) if limit is not None]
    return replace(spec, adapter_spec=replace(spec.adapter_spec, max_eval_instances=min(limits) if limits else None))
