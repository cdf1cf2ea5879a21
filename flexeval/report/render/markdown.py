"""The report as a comment on a pull request. Knows Markdown's traps; computes no statistic."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flexeval.report import format as show
from flexeval.report.answer import answer
from flexeval.report.render.environment import environment
from flexeval.report.scored_through import scored_through
from flexeval.report.statistics import SIGNIFICANT
from flexeval.report.tables import Comparison, TaskRow
from flexeval.report.verdict import scale, verdicts

_LONGEST_COMMENT = 65_000
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~@])")


def summary(comparison: Comparison) -> str:
    """The report as Markdown; the table per task stays out where GitHub would refuse the comment for its length."""
    text = _render(comparison, comparison.tasks)
    return text if len(text) <= _LONGEST_COMMENT else _render(comparison, ())


def _render(comparison: Comparison, tasks: Sequence[TaskRow]) -> str:
    env = environment()
    env.filters["plain"] = plain
    per, unit = show.rate_unit([row.questions_per_s for row in comparison.settings if row.questions_per_s])
    return env.get_template("report.md").render(
        c=comparison,
        tasks=tasks,
        answer=answer(comparison),
        through_cache=scored_through(row.result.setting for row in comparison.settings),
        verdicts=verdicts(comparison),
        scale=scale(comparison) if comparison.averaged and not comparison.in_points else "",
        per=per,
        unit=unit,
        nothing=show.NOTHING,
        significant=SIGNIFICANT,
    )


def plain(text: str) -> str:
    """The text on one line, with nothing in it that Markdown or HTML would act on, mentions included."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split())).replace("\\@", "@\N{ZERO WIDTH SPACE}")
