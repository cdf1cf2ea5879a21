"""Several runs as one. Knows which fields belong to a run and which to a setting; compares nothing.

A merged run is a `RunResults` like any other, so that pages and tables have one way in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from flexeval.errors import ResultsError
from flexeval.files import is_plain_name
from flexeval.results import RunResults, SettingResult, TaskInfo

BASELINE = "none"


def baseline_index(settings: Sequence[str]) -> int:
    """Which of the settings the others are compared with: `none`, or else the first."""
    return settings.index(BASELINE) if BASELINE in settings else 0


def distribution_path(directory: Path, setting: str) -> Path:
    """Where a run's directory has the distributions of a setting. Raises `ResultsError` for one that names no file."""
    if not is_plain_name(setting):
        raise ResultsError(f"{setting!r} is no name of a setting", where=str(directory), mend="Run the suite again")
    return directory / "distributions" / f"{setting}.parquet"


def distribution_files(runs: Sequence[RunResults], directories: Sequence[Path]) -> dict[str, Path]:
    """Where each setting of merged runs has its distributions, by its label; those that are there.

    Args:
        runs: The runs, in the order in which they are merged.
        directories: Each one's directory, or a file in it.
    """
    labels = [f"{label}/" for label in _labels([run.name for run in runs])] if len(runs) > 1 else [""]
    files = {
        f"{label}{setting.setting}": distribution_path(
            directory if directory.is_dir() else directory.parent, setting.setting
        )
        for label, run, directory in zip(labels, runs, directories, strict=True)
        for setting in run.settings
    }
    return {label: path for label, path in files.items() if path.is_file()}


def merge(runs: Sequence[RunResults]) -> RunResults:
    """Put the settings of several runs side by side, labelled `<run>/<setting>`; one run stays as it is.

    The first run's `none` (or else its first setting) comes first, which makes it the baseline. Runs of one name are
    told apart by a number: `demo#2/w4`.

    Raises:
        ResultsError: No runs, or runs that measured a task of the same name in different ways.
    """
    if not runs:
        raise ResultsError("nothing to compare", mend="Name at least one directory that `flexeval run` wrote")
    if len(runs) == 1:
        return runs[0]
    labels = _labels([run.name for run in runs])
    labelled = list(zip(labels, runs, strict=True))
    return RunResults(
        name=" vs ".join(labels),
        suite=_joined(run.suite for run in runs),
        model=_joined(run.model for run in runs),
        model_note=_joined(run.model_note for run in runs if run.model_note),
        command="\n".join(run.command for run in runs),
        created=max(run.created for run in runs),
        machine=_side_by_side(labelled, lambda run: run.machine),
        versions=_side_by_side(labelled, lambda run: run.versions),
        fingerprint=_joined(run.fingerprint for run in runs if run.fingerprint),
        tasks=_tasks(labelled),
        settings=[
            replace(setting, setting=f"{label}/{setting.setting}")
            for label, run in labelled
            for setting in (_baseline_first(run.settings) if run is runs[0] else run.settings)
        ],
        instances=[
            replace(instance, setting=f"{label}/{instance.setting}")
            for label, run in labelled
            for instance in run.instances
        ],
        fidelity=[
            replace(one, setting=f"{label}/{one.setting}", baseline=f"{label}/{one.baseline}")
            for label, run in labelled
            for one in run.fidelity
        ],
        skipped={f"{label}/{task}": reason for label, run in labelled for task, reason in run.skipped.items()},
        notes=[*_differences(runs), *(f"{label}: {note}" for label, run in labelled for note in run.notes)],
    )


def _labels(names: Sequence[str]) -> list[str]:
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return labels


def _joined(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))


def _side_by_side(
    labelled: Sequence[tuple[str, RunResults]], facts: Callable[[RunResults], dict[str, str]]
) -> dict[str, str]:
    """One line a fact where all runs agree, one line a run and fact where they do not."""
    merged: dict[str, str] = {}
    for key in dict.fromkeys(key for _, run in labelled for key in facts(run)):
        values = {label: facts(run)[key] for label, run in labelled if key in facts(run)}
        if len(values) == len(labelled) and len(set(values.values())) == 1:
            merged[key] = next(iter(values.values()))
        else:
            merged |= {f"{key} ({label})": value for label, value in values.items()}
    return merged


def _tasks(labelled: Sequence[tuple[str, RunResults]]) -> list[TaskInfo]:
    tasks: dict[str, tuple[str, TaskInfo]] = {}
    for label, run in labelled:
        for task in run.tasks:
            first_label, first = tasks.setdefault(task.name, (label, task))
            ours, theirs = ((info.metric, info.split, info.group, info.higher_is_better) for info in (first, task))
            if ours != theirs:
                raise ResultsError(
                    f"task {task.name!r} is measured by {ours} in {first_label} and by {theirs} in {label}",
                    mend="Compare runs of the same suite",
                )
    return [task for _, task in tasks.values()]


def _baseline_first(settings: Sequence[SettingResult]) -> list[SettingResult]:
    return sorted(settings, key=lambda setting: setting.setting != BASELINE)


def _differences(runs: Sequence[RunResults]) -> list[str]:
    notes = []
    if any(run.machine != runs[0].machine for run in runs):
        notes.append("The runs were made on different machines: their speeds and memory do not compare directly.")
    if any((run.model, run.model_note) != (runs[0].model, runs[0].model_note) for run in runs):
        notes.append("The runs are of different models.")
    elif len({run.fingerprint for run in runs if run.fingerprint}) > 1:
        notes.append("The runs name the same model, but its files were not the same.")
    if any(run.versions != runs[0].versions for run in runs):
        notes.append("The runs were made with different versions of the software.")
    return notes
