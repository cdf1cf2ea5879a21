"""Which questions were asked under every setting. Lines answers up, refuses what cannot be; computes no figure."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from flexeval.errors import ResultsError
from flexeval.results import InstanceResult, RunResults

_TRIAL = re.compile(r"-trial\d+$")
"""What tells a question's train trials apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question with its answers under all settings."""

    task: str
    """Name of its task."""
    instance_id: str
    """Its id within the task."""
    answers: tuple[InstanceResult, ...]
    """One per setting, in the order of `RunResults.settings`."""


class Pairing(NamedTuple):
    """The questions that can be compared, and what had to be left out."""

    questions: list[Question]
    notes: list[str]


def over_trials(instance_ids: Iterable[str], values: Iterable[float]) -> list[float]:
    """One value a question: the mean over its train trials, in the order of the questions.

    A question that is asked again behind other examples is answered much alike: its trials are one sample, not several.
    """
    by_question: dict[str, list[float]] = defaultdict(list)
    for instance_id, value in zip(instance_ids, values, strict=True):
        by_question[_TRIAL.sub("", instance_id)].append(value)
    return [sum(trials) / len(trials) for trials in by_question.values()]


def pair(results: RunResults) -> Pairing:
    """Line up the answers to the questions that every setting was asked, in the order of the tasks.

    Raises:
        ResultsError: A question answered twice, a score that is no number, the same id for different questions, or no
            question in common.
    """
    settings = [setting.setting for setting in results.settings]
    by_task: dict[str, dict[str, dict[str, InstanceResult]]] = {task.name: defaultdict(dict) for task in results.tasks}
    for instance in results.instances:
        _check(instance, by_task, settings)
        by_task[instance.task][instance.instance_id][instance.setting] = instance

    questions: list[Question] = []
    notes: list[str] = []
    for task, by_id in by_task.items():
        shared = {key: answers for key, answers in by_id.items() if len(answers) == len(settings)}
        if len(shared) < len(by_id) or not by_id:
            notes.append(_left_out(task, len(by_id), len(shared)))
        if other_prompts := sum(
            len({answer.prompt for answer in by_setting.values()}) > 1 for by_setting in shared.values()
        ):
            notes.append(f"{task}: {other_prompts} of {len(shared)} questions were put in different prompts.")
        for instance_id, by_setting in shared.items():
            answers = tuple(by_setting[setting] for setting in settings)
            _check_same_question(answers)
            questions.append(Question(task=task, instance_id=instance_id, answers=answers))
    if not questions:
        raise ResultsError(
            f"no question was asked under all of: {', '.join(settings) or 'no setting'}",
            where=results.name,
            mend="Compare runs of the same suite, with the same tasks and the same number of questions",
        )
    return Pairing(questions, notes)


def check_same_questions(results: RunResults) -> None:
    """Raise `ResultsError` unless every setting was asked the same questions of the same tasks."""
    names = [setting.setting for setting in results.settings]
    asked: dict[str, set[tuple[str, str]]] = {name: set() for name in names}
    for instance in results.instances:
        asked.setdefault(instance.setting, set()).add((instance.task, instance.instance_id))
    first, *others = names
    for other in others:
        for here, there in ((first, other), (other, first)):
            if lacking := asked[here] - asked[there]:
                task, instance_id = min(lacking)
                raise ResultsError(
                    f"{len(lacking):,} of {len(asked[here]):,} questions of {here!r} were not asked under {there!r}: "
                    f"{instance_id!r} of {task!r}, for one",
                    mend="Compare runs of the same suite with as many questions, or add --shared-only",
                )


def _check(
    instance: InstanceResult, by_task: dict[str, dict[str, dict[str, InstanceResult]]], settings: list[str]
) -> None:
    where = f"task {instance.task!r}, question {instance.instance_id!r}, setting {instance.setting!r}"
    mend = "Run the suite again"
    if instance.task not in by_task or instance.setting not in settings:
        raise ResultsError("an answer to an unknown task or setting", where=where, mend=mend)
    if instance.setting in by_task[instance.task][instance.instance_id]:
        raise ResultsError("a question answered twice", where=where, mend=mend)
    if not math.isfinite(instance.score):
        raise ResultsError(f"score {instance.score} is no number", where=where, mend=mend)


def _check_same_question(answers: tuple[InstanceResult, ...]) -> None:
    first = answers[0]
    for answer in answers[1:]:
        if answer.reference != first.reference:
            raise ResultsError(
                f"question {first.instance_id!r} has the correct answer {first.reference[:60]!r} under "
                f"{first.setting!r} and {answer.reference[:60]!r} under {answer.setting!r}: not the same question",
                where=f"task {first.task!r}",
                mend="Compare runs of the same suite and the same data",
            )


def _left_out(task: str, num_asked: int, num_shared: int) -> str:
    if not num_asked:
        return f"{task}: no question was asked; left out."
    if not num_shared:
        return f"{task}: none of {num_asked} questions was asked under all settings; left out."
    return f"{task}: {num_asked - num_shared} of {num_asked} questions were not asked under all settings; left out."
