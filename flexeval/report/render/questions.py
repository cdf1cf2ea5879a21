"""The questions and answers that a page carries, cut to a size a browser likes. Knows texts; draws nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from flexeval.report.format import count, visible
from flexeval.report.pairing import Question
from flexeval.report.tables import Comparison

_PAGE_CHARACTERS = 6_000_000
"""Room for all texts together."""
_LONGEST_TEXT = 4_000
"""No single text is longer than this, however few there are."""


def drill_down(comparison: Comparison) -> dict[str, Any]:
    """Everything the page's script needs, as JSON values.

    A task's prompts share a beginning (instructions and examples), which is carried once. A prompt that is still too
    long keeps its end, where the question stands, an answer its beginning. An answer equal to the baseline's is null.
    """
    by_task: dict[str, list[Question]] = defaultdict(list)
    for question in comparison.questions:
        by_task[question.task].append(question)
    headers = {task: _shared_beginning([_prompt(q, comparison) for q in asked]) for task, asked in by_task.items()}
    numbers = {task: number for number, task in enumerate(by_task)}
    limit = _limit(
        [
            len(text)
            for question in comparison.questions
            for text in (
                _prompt(question, comparison)[len(headers[question.task]) :],
                question.answers[comparison.baseline].reference,
                *{answer.output for answer in question.answers},
            )
        ]
    )
    directions = {row.task.name: row.task.higher_is_better for row in comparison.tasks}
    return {
        "settings": [visible(row.result.setting) for row in comparison.settings],
        "baseline": comparison.baseline,
        "tasks": [
            {
                "name": visible(name),
                "header": _keep_end(headers[name], _LONGEST_TEXT),
                "sign": 1 if directions[name] else -1,
            }
            for name in by_task
        ],
        "questions": [
            _question(question, comparison, numbers[question.task], len(headers[question.task]), limit)
            for question in comparison.questions
        ],
    }


def _question(question: Question, comparison: Comparison, task: int, num_shared: int, limit: int) -> list[Any]:
    base = question.answers[comparison.baseline]
    return [
        task,
        visible(question.instance_id),
        _keep_end(base.prompt[num_shared:], limit),
        _keep_start(base.reference, limit),
        [answer.score for answer in question.answers],
        [
            None if answer is not base and answer.output == base.output else _keep_start(answer.output, limit)
            for answer in question.answers
        ],
    ]


def _prompt(question: Question, comparison: Comparison) -> str:
    return question.answers[comparison.baseline].prompt


def _shared_beginning(prompts: Sequence[str]) -> str:
    """What all prompts begin with, up to the end of a line; nothing for a single prompt."""
    if len(prompts) < 2:
        return ""
    first, last = min(prompts), max(prompts)
    num_shared = next(
        (place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first)
    )
    return first[: first.rfind("\n", 0, num_shared) + 1]


def _limit(lengths: Sequence[int]) -> int:
    """The largest cut with which texts of these lengths fit on the page."""
    room = _PAGE_CHARACTERS
    for rank, length in enumerate(sorted(lengths)):
        share = room // (len(lengths) - rank)
        if length > share:
            return min(share, _LONGEST_TEXT)
        room -= length
    return _LONGEST_TEXT


def _keep_start(text: str, limit: int) -> str:
    if len(text) <= limit:
        return visible(text)
    return f"{visible(text[:limit])} [{count(len(text) - limit)} more characters]"


def _keep_end(text: str, limit: int) -> str:
    if len(text) <= limit:
        return visible(text)
    return f"[{count(len(text) - limit)} characters before] {visible(text[-limit:])}"
