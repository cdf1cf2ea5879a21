"""The report as a comment on a pull request. Knows Markdown's traps; computes no statistic."""

from __future__ import annotations

import re

from flexeval.report import format as show
from flexeval.report.render.environment import environment
from flexeval.report.statistics import SIGNIFICANT
from flexeval.report.tables import Comparison
from flexeval.report.verdict import answer, verdicts

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~@])")


def summary(comparison: Comparison) -> str:
    """The report as Markdown."""
    env = environment()
    env.filters["plain"] = plain
    per, unit = show.rate_unit([row.questions_per_s for row in comparison.settings if row.questions_per_s])
    return env.get_template("report.md").render(
        c=comparison,
        answer=answer(comparison),
        verdicts=verdicts(comparison),
        per=per,
        unit=unit,
        nothing=show.NOTHING,
        significant=SIGNIFICANT,
    )


def plain(text: str) -> str:
    """The text on one line, with nothing in it that Markdown or HTML would act on, mentions included."""
    return _SPECIAL.sub(r"\\\1", " ".join(show.visible(text).split())).replace("\\@", "@\N{ZERO WIDTH SPACE}")
