"""Whether a run can be held against a baseline at all: the same model, tasks, metrics and questions.

A difference here would make a change of scores mean nothing, so it is refused with its reason, not reported as a drop.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexeval.errors import ResultsError
from flexeval.gate.baseline import Baseline, KeptTask
from flexeval.results import TaskInfo

_UPDATE = "If that is meant, write the baseline again with --update"


def settings_to_check(baseline: Baseline, run: Baseline, wanted: Sequence[str]) -> list[str]:
    """The settings to hold against the baseline: those that are wanted, or all of the baseline's.

    Raises:
        ResultsError: One of them is missing on either side.
    """
    chosen = list(dict.fromkeys(wanted)) or baseline.settings
    for where, have in {"the baseline": baseline.settings, "the run": run.settings}.items():
        if missing := [name for name in chosen if name not in have]:
            raise ResultsError(
                f"{where} has no setting {missing[0]!r}, but {', '.join(map(repr, have))}",
                mend="Run the same settings, or choose with --setting",
            )
    return chosen


def check_match(baseline: Baseline, run: Baseline, *, any_model: bool = False, shared_only: bool = False) -> list[str]:
    """What to know beside the findings.

    Args:
        baseline: What the run is to be held against.
        run: The run.
        any_model: Whether it may be of another model.
        shared_only: Whether questions that one of the two lacks are left out, not refused.

    Raises:
        ResultsError: The two cannot be compared.
    """
    notes = []
    ours, theirs = (f"{one.model} {one.model_note}".strip() for one in (run, baseline))
    if _model(run) != _model(baseline):
        if not any_model:
            raise ResultsError(
                f"the run is of {ours!r}, the baseline of {theirs!r}",
                mend="Name the same model, or pass --any-model to compare models",
            )
        notes.append(f"The run is of {ours}, the baseline of {theirs}.")
    elif run.fingerprint and baseline.fingerprint and run.fingerprint != baseline.fingerprint:
        notes.append("The model has the baseline's name, but its files are not those of then.")
    if run.suite != baseline.suite:
        notes.append(f"The run is of the suite {run.suite}, the baseline of {baseline.suite}.")
    notes += _shared(baseline, run, shared_only=shared_only)
    changed = [
        f"{name} {baseline.versions.get(name, 'none')} then, {run.versions.get(name, 'none')} now"
        for name in dict.fromkeys([*baseline.versions, *run.versions])
        if baseline.versions.get(name) != run.versions.get(name)
    ]
    if changed:
        notes.append(f"Versions differ: {'; '.join(changed)}.")
    if not is_same_machine(baseline, run):
        notes.append(f"The baseline was made on another machine: {', '.join(baseline.machine.values())}.")
    return notes


def is_same_machine(baseline: Baseline, run: Baseline) -> bool:
    """Whether both have the same processor, cores and GPU."""
    return baseline.machine == run.machine


def _model(baseline: Baseline) -> tuple[str, str]:
    """A model's name without the folder or organization it comes from, and what is known of its weights."""
    return baseline.model.rstrip("/").rsplit("/", 1)[-1].lower(), baseline.model_note


def _shared(baseline: Baseline, run: Baseline, *, shared_only: bool) -> list[str]:
    before = {kept.task.name: kept for kept in baseline.tasks}
    now = {kept.task.name: kept for kept in run.tasks}
    num_shared, left_out = 0, []
    for name in dict.fromkeys([*before, *now]):
        if name in before and name in now:
            _check_task(before[name], now[name])
            num_shared += len(before[name].questions.keys() & now[name].questions.keys())
        old, new = (one[name].questions.keys() if name in one else set() for one in (before, now))
        for where, lacking in {"the run": old - new, "the baseline": new - old}.items():
            if lacking:
                left_out.append(f"{where} lacks {len(lacking)} of {len(old | new)} questions of {name!r}")
    if not num_shared:
        raise ResultsError("the run and the baseline have no question in common", mend=_UPDATE)
    if left_out and not shared_only:
        raise ResultsError(
            left_out[0] + (f", and {len(left_out) - 1} more tasks differ" if len(left_out) > 1 else ""),
            mend="Ask the same questions, pass --shared-only to compare those that both have, or --update",
        )
    return [f"Left out: {one}." for one in left_out]


def _check_task(before: KeptTask, now: KeptTask) -> None:
    measured = [_measured(kept.task) for kept in (before, now)]
    if measured[0] != measured[1]:
        raise ResultsError(
            f"task {now.task.name!r} was measured by {measured[0]}, and is now by {measured[1]}", mend=_UPDATE
        )
    shared = before.questions.keys() & now.questions.keys()
    if other := [name for name in now.questions if name in shared and _differ(before, now, name)]:
        raise ResultsError(
            f"{len(other)} of {len(shared)} questions are other questions than then, or were put in other prompts "
            f"(the first: {other[0]!r})",
            where=f"task {now.task.name!r}",
            mend=_UPDATE,
        )


def _measured(task: TaskInfo) -> str:
    return f"{task.metric} on {task.split} ({'higher' if task.higher_is_better else 'lower'} is better)"


def _differ(before: KeptTask, now: KeptTask, name: str) -> bool:
    return before.questions[name].asked != now.questions[name].asked
