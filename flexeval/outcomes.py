"""What became of each setting, made into one result. Knows results; not how anything was asked or answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from flexeval.benchmark.helm import Scored
from flexeval.errors import ResultsError
from flexeval.models import ModelSource
from flexeval.report.fidelity import measure
from flexeval.report.merge import distribution_files
from flexeval.results import RunResults, SettingResult

CHAT_NOTE = "prompts in the model's chat template"
"""What reports say of the model then."""

DETERMINISTIC_NOTE = "Each request was computed apart, so that no answer depends on another (--deterministic)."


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One setting's part of the results."""

    scored: Scored
    """What HELM made of the answers."""
    cost: SettingResult
    """What they have cost."""
    skipped: dict[str, str]
    """Tasks without data, and why."""
    failed: dict[str, str]
    """Tasks that were answered but not scored, and why."""
    failed_requests: dict[str, str]
    """Requests without an answer, by their hash, and why."""


def failed_tasks(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Tasks that were not scored under one of the settings, and why."""
    return {task: reason for outcome in outcomes for task, reason in outcome.failed.items()}


def failed_requests(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each setting under which requests failed."""
    return [_failed_note(outcome) for outcome in outcomes if outcome.failed_requests]


def _failed_note(outcome: Outcome) -> str:
    request, reason = next(iter(outcome.failed_requests.items()))
    num_failed, num_asked = len(outcome.failed_requests), len(outcome.failed_requests) + outcome.cost.num_requests
    return (
        f"{outcome.cost.setting}: {num_failed} of {num_asked} requests failed, and the questions that they belong to "
        f"are not scored. The first, {request[:16]}: {reason}."
    )


def _apart_note(apart: Sequence[str], settings: Sequence[str]) -> list[str]:
    if set(apart) == set(settings):
        return [DETERMINISTIC_NOTE]
    return [f"Under {', '.join(apart)} alone: {DETERMINISTIC_NOTE}"] if apart else []


def collect(
    suite: str,
    source: ModelSource,
    out: Path,
    outcomes: Sequence[Outcome],
    *,
    is_chat: bool,
    apart: Sequence[str] = (),
    command: str,
    machine: dict[str, str],
    versions: dict[str, str],
    fingerprint: str,
) -> RunResults:
    """All settings' parts as one result; HELM asks every setting the same.

    A task that was not scored under one of them is left out: settings are compared on the same questions.
    `apart` names the settings under which each request was computed apart.
    """
    first, failed = outcomes[0], failed_tasks(outcomes)
    tasks = [task for task in first.scored.tasks if task.name not in failed]
    if not tasks:
        raise ResultsError(f"no task was scored under every setting. {next(iter(failed.values()))}")
    results = RunResults(
        name=out.resolve().name,
        suite=suite,
        model=source.ref,
        model_note="; ".join(filter(None, (source.note, CHAT_NOTE if is_chat else ""))),
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine,
        versions=versions,
        fingerprint=fingerprint,
        tasks=tasks,
        settings=[outcome.cost for outcome in outcomes],
        instances=[one for outcome in outcomes for one in outcome.scored.instances if one.task not in failed],
        skipped=first.skipped | failed,
        notes=[*failed_requests(outcomes), *_apart_note(apart, [outcome.cost.setting for outcome in outcomes])],
    )
    return replace(results, fidelity=measure(results, distribution_files([results], [out])))
