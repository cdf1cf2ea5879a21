"""One HTML file that opens offline: what its template needs. Knows the page's parts; computes no statistic.

Model output is hostile. The template escapes every value, the questions travel as JSON without a `<`, the script makes
text nodes only, and a policy in the page lets nothing run but that script and nothing be fetched at all.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jinja2.utils import htmlsafe_json_dumps

from flexeval.report import format as show
from flexeval.report.answer import CLEARLY, answer, choice
from flexeval.report.render import chart
from flexeval.report.render.environment import environment, source
from flexeval.report.render.questions import drill_down
from flexeval.report.scored_through import scored_through
from flexeval.report.statistics import SIGNIFICANT, Estimate
from flexeval.report.tables import Comparison, TaskRow
from flexeval.report.verdict import scale, tolerated, verdicts
from flexeval.results import QUANTILES


def page(comparison: Comparison) -> str:
    """The whole page."""
    style, script = source("report.css"), source("report.js")
    data = drill_down(comparison)
    per, unit = show.rate_unit([row.questions_per_s for row in comparison.settings if row.questions_per_s])
    picture = chart.trade_off(comparison)
    template = environment().get_template("report.html")
    return template.render(
        c=comparison,
        verdicts=verdicts(comparison),
        answer=answer(comparison),
        chosen=choice(comparison),
        through_cache=scored_through(row.result.setting for row in comparison.settings),
        tolerated=tolerated(comparison) if comparison.averaged else "",
        clearly=CLEARLY,
        scale=scale(comparison) if comparison.averaged else "",
        chart=picture,
        canvas=chart,
        data=data,
        json=htmlsafe_json_dumps(data, ensure_ascii=False, separators=(",", ":")),
        style=style,
        script=script,
        policy=(
            f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
            "base-uri 'none'; form-action 'none'"
        ),
        per=per,
        unit=unit,
        nothing=show.NOTHING,
        quantiles=QUANTILES,
        significant=SIGNIFICANT,
        overall_scale=_scale(row.difference.estimate for row in comparison.settings if row.difference),
        task_scales=_task_scales(comparison),
        tiers=list(dict.fromkeys(tier for row in comparison.settings for tier in row.result.peak_bytes)),
        is_foretold=any(row.result.predicted_s for row in comparison.settings),
        is_text=any(row.fidelity and row.fidelity.num_text for row in comparison.settings),
        is_energy_known=any(row.energy_per_question_j is not None for row in comparison.settings),
        lanes=_lanes(comparison),
        most=_most(comparison),
        headline=_headline(comparison),
        sources=[row.task for row in comparison.tasks if row.task.source],
        left_out=[row.task.name for row in comparison.tasks if row.task.name not in comparison.averaged],
    )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _scale(estimates: Iterable[Estimate]) -> float:
    """The largest absolute value or bound: what a bar's end stands for."""
    ends = [
        abs(end)
        for estimate in estimates
        for end in (estimate.value, estimate.low, estimate.high)
        if not math.isnan(end)
    ]
    return max(ends, default=0.0) or 1.0


def _task_scales(comparison: Comparison) -> dict[str, float]:
    """What a bar's end stands for: one scale for all tasks in points, so that their bars compare."""

    def widest(rows: Sequence[TaskRow]) -> float:
        return _scale(cell.difference.estimate for row in rows for cell in row.cells if cell.difference)

    shared = widest([row for row in comparison.tasks if row.in_points]) if len(comparison.settings) > 1 else 1.0
    return {
        row.task.name: shared
        if row.in_points
        else widest([row])
        if len(comparison.settings) > 1
        else _scale(cell.score for cell in row.cells)
        for row in comparison.tasks
    }


class _Most(NamedTuple):
    """What a full bar stands for."""

    seconds: float
    tiers: dict[str, int]


def _most(comparison: Comparison) -> _Most:
    results = [row.result for row in comparison.settings]
    tiers: dict[str, int] = {}
    for tier, num_bytes in (item for one in results for item in (*one.peak_bytes.items(), *one.planned_bytes.items())):
        tiers[tier] = max(tiers.get(tier, 0), num_bytes)
    times = [time for row in comparison.settings for time in (row.engine_s, row.result.predicted_s or 0.0)]
    return _Most(max(times), tiers)


class _Group(NamedTuple):
    """A column of HELM's leaderboard."""

    name: str
    metrics: list[str]
    scores: list[float]
    """By setting."""


def _headline(comparison: Comparison) -> list[_Group]:
    """Means over the tasks of each group, as HELM's pages show them."""
    groups: dict[str, list[TaskRow]] = {}
    for row in comparison.tasks:
        groups.setdefault(row.task.group, []).append(row)
    return [
        _Group(
            name,
            list(dict.fromkeys(row.task.metric for row in rows)),
            [
                sum(cells) / len(cells)
                for cells in zip(*([cell.score.value for cell in row.cells] for row in rows), strict=True)
            ],
        )
        for name, rows in groups.items()
    ]


def _lanes(comparison: Comparison) -> dict[str, list[dict[str, float | None] | None]]:
    """Per lane a cell for each setting; None where the setting has no such lane."""
    names = dict.fromkeys(name for row in comparison.settings for name in row.result.lanes)
    return {
        name: [
            {
                "busy_s": lane.get("busy_s", 0.0),
                "num_bytes": lane.get("num_bytes", 0.0),
                "share": lane.get("busy_s", 0.0) / row.engine_s if row.engine_s > 0 else None,
            }
            if (lane := row.result.lanes.get(name)) is not None
            else None
            for row in comparison.settings
        ]
        for name in names
    }
