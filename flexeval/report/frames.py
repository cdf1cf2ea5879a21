"""Results as tidy tables of pandas: a row an observation, a column a variable. Knows columns; decides nothing.

`docs/results.md` lists the columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from flexeval.report.compare import compare
from flexeval.report.render.table import rows
from flexeval.report.tables import Comparison
from flexeval.results import RunResults


class Frames(NamedTuple):
    """What a run found."""

    questions: pd.DataFrame
    """A row a question and setting: score, prompt, answer, tokens, seconds."""
    tasks: pd.DataFrame
    """A row a task and setting: mean with interval, difference to the baseline, closeness; the columns of
    `results.csv`."""
    settings: pd.DataFrame
    """A row a setting: overall quality, speed, memory by tier, what was planned."""
    lanes: pd.DataFrame
    """A row a setting and lane: bytes moved and busy seconds."""
    results: RunResults
    """All of it as it was written, with machine, versions and command."""


def load_results(directory: str | Path) -> Frames:
    """Read the results of a run as tables.

    Raises:
        ResultsError: There are none, or the settings cannot be compared question by question.
    """
    return frames(compare(RunResults.load(Path(directory))))


def frames(comparison: Comparison) -> Frames:
    """A comparison as tables."""
    results = comparison.results
    return Frames(
        questions=_questions(results),
        tasks=_table(rows(comparison)),
        settings=_table(_settings(comparison)),
        lanes=_table(
            {
                "setting": one.setting,
                "lane": lane,
                "num_bytes": figures.get("num_bytes"),
                "busy_s": figures.get("busy_s"),
            }
            for one in results.settings
            for lane, figures in one.lanes.items()
        ),
        results=results,
    )


def _table(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The rows; a column without any figure holds NaN, as one of numbers does where one is missing."""
    table = pd.DataFrame([{name: _storable(value) for name, value in row.items()} for row in rows])
    empty = [name for name in table if table[name].isna().all()]
    return table.astype(dict.fromkeys(empty, float))


def _questions(results: RunResults) -> pd.DataFrame:
    metrics = {task.name: (task.group, task.metric) for task in results.tasks}
    return _table(
        {"task": one.task, "group": metrics[one.task][0], "metric": metrics[one.task][1]}
        | _plain(asdict(one), leave_out={"requests"})
        for one in results.instances
    )


def _settings(comparison: Comparison) -> Iterable[dict[str, Any]]:
    tiers = {tier: None for row in comparison.settings for tier in (*row.result.peak_bytes, *row.result.planned_bytes)}
    for row in comparison.settings:
        result, quality, difference = row.result, row.quality, row.difference
        yield {
            **_plain(asdict(result), leave_out={"peak_bytes", "planned_bytes", "policy", "lanes", "splits", "moves"}),
            "num_splits": len(result.splits),
            "num_moves": len(result.moves),
            "quality": quality.value if quality else None,
            "quality_low": quality.low if quality else None,
            "quality_high": quality.high if quality else None,
            "difference": difference.estimate.value if difference else None,
            "difference_low": difference.estimate.low if difference else None,
            "difference_high": difference.estimate.high if difference else None,
            "bootstrap_low": difference.bootstrap.low if difference else None,
            "bootstrap_high": difference.bootstrap.high if difference else None,
            "p_value": difference.p_value if difference else None,
            "corrected_p_value": difference.corrected_p if difference else None,
            "num_questions": row.num_questions,
            "engine_s": row.engine_s,
            "questions_per_s": row.questions_per_s,
            "tokens_per_s": row.tokens_per_s,
            "energy_per_question_j": row.energy_per_question_j,
            "speedup": row.speedup,
            "memory_ratio": row.memory_ratio,
            "is_best_trade": row.is_best_trade,
            **{f"{tier}_peak_bytes": result.peak_bytes.get(tier) for tier in tiers},
            **{f"{tier}_planned_bytes": result.planned_bytes.get(tier) for tier in tiers},
        }


def _plain(data: Mapping[str, Any], leave_out: set[str]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name not in leave_out}


def _storable(value: Any) -> Any:
    """The value; halves of characters, which no file takes, written out, and whole numbers beyond 64 bits rounded."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return float(value) if isinstance(value, int) and abs(value) >= 2**63 else value
