"""Each setting in words, and how its loss of quality compares with what is tolerated. Knows no page.

That no loss was detected is no evidence of none. A setting passes only if its interval leaves no room for a loss beyond
a margin: non-inferiority, as in Piaggio et al. 2012, "Reporting of noninferiority and equivalence randomized trials",
JAMA 308.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from flexeval.config import format_size
from flexeval.report import format as show
from flexeval.report.statistics import SIGNIFICANT, Estimate, questions_to_settle, smallest_seen
from flexeval.report.tables import Comparison, SettingRow

_MARGIN = 0.05
"""The loss tolerated: five points of a hundred, or on another scale this share of the baseline's score."""


class Kind(StrEnum):
    """How a setting's quality compares with the baseline's."""

    BASELINE = "baseline"
    SAME = "no detectable difference in quality"
    UNSETTLED = "difference not settled"
    WORSE = "loses quality"
    BETTER = "gains quality"
    UNKNOWN = "quality has no common scale"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One setting in words."""

    setting: str
    """Its name."""
    kind: Kind
    """What became of quality."""
    cost: str
    """Speed and memory: `1.31x as fast, 3.10x less memory`."""
    quality: str
    """The score or difference, with its interval, p value and number of questions."""

    unseen: str = ""
    """Where no difference was detected: which one would not have been, and how many questions that takes."""

    @property
    def sentence(self) -> str:
        """All of it in one sentence, or two."""
        return f"{self.setting}: {self.cost}; {self.kind}: {self.quality}." + (f" {self.unseen}" if self.unseen else "")


def verdicts(comparison: Comparison) -> list[Verdict]:
    """One verdict per setting, in order."""
    return [verdict(comparison, row) for row in comparison.settings]


def verdict(comparison: Comparison, row: SettingRow) -> Verdict:
    """One setting in words."""
    is_baseline = row is comparison.settings[comparison.baseline]
    kind = _kind(comparison, row)
    return Verdict(
        setting=row.result.setting,
        kind=kind,
        cost=_absolute_cost(row) if is_baseline else _relative_cost(row),
        quality=_quality(comparison, row),
        unseen=_unseen(comparison, row) if kind in (Kind.SAME, Kind.UNSETTLED) else "",
    )


def margin(comparison: Comparison) -> float:
    """The loss of quality tolerated; at least 0."""
    base = comparison.settings[comparison.baseline].quality
    assert base is not None, "no common scale"
    return _MARGIN if comparison.in_points else _MARGIN * abs(base.value)


def loss(comparison: Comparison, row: SettingRow) -> Estimate:
    """How much quality a setting loses against the baseline: a difference with the sign of harm."""
    assert row.difference is not None, row.result.setting
    estimate = row.difference.estimate
    return -estimate if comparison.higher_is_better else estimate


def is_within_margin(comparison: Comparison, row: SettingRow) -> bool:
    """Whether the whole interval of the loss stays within the margin; an unknown interval does not."""
    return loss(comparison, row).high <= margin(comparison)


def tolerated(comparison: Comparison) -> str:
    """The margin in words: `5 points`."""
    value = margin(comparison)
    return f"{value * 100 if comparison.in_points else value:.3g} {_unit(comparison)}"


def scale(comparison: Comparison) -> str:
    """What quality is measured in, and which way is up: `points of 100`, `bits_per_byte, lower is better`."""
    name = "points of 100" if comparison.in_points else _unit(comparison)
    return name if comparison.higher_is_better else f"{name}, lower is better"


def _kind(comparison: Comparison, row: SettingRow) -> Kind:
    if row.quality is None:
        return Kind.UNKNOWN
    if row.difference is None:
        return Kind.BASELINE
    if row.difference.corrected_p < SIGNIFICANT:
        return Kind.WORSE if loss(comparison, row).value > 0 else Kind.BETTER
    return Kind.SAME if is_within_margin(comparison, row) else Kind.UNSETTLED


def _quality(comparison: Comparison, row: SettingRow) -> str:
    if row.quality is None:
        return "see the tasks"
    if row.difference is None:
        bounds = show.interval(row.quality, in_points=comparison.in_points)
        return f"{_amount(comparison, row.quality.value)} (95% interval {bounds}, n = {show.count(row.quality.num)})"
    estimate = row.difference.estimate
    return (
        f"{_amount(comparison, estimate.value, signed=True)} "
        f"(95% interval {show.interval(estimate, in_points=comparison.in_points, signed=True)}, "
        f"{show.p_value(row.difference.corrected_p)}, n = {show.count(estimate.num)})"
    )


def _unseen(comparison: Comparison, row: SettingRow) -> str:
    """What no detected difference leaves possible, in plain words."""
    lost = loss(comparison, row)
    smallest, needed = smallest_seen(lost, len(comparison.settings) - 1), show.count(lost.num)
    if math.isnan(smallest):
        return f"No detectable difference; with n = {needed} it is not known which one would be seen."
    change = "drop" if comparison.higher_is_better else "rise"
    words = (
        f"{_undetected(comparison, row)}; with n = {needed} a {change} of less than {_amount(comparison, smallest)} "
        "would not be seen"
    )
    num = questions_to_settle(lost, margin(comparison))
    if num > lost.num:
        words += f"; about {show.rough_count(num)} questions would settle whether it loses {tolerated(comparison)}"
    return f"{words}."


def _undetected(comparison: Comparison, row: SettingRow) -> str:
    """What to say of a difference that is not detected, though its own interval may leave zero out."""
    assert row.difference is not None, row.result.setting
    num = len(comparison.settings) - 1
    if row.difference.p_value < SIGNIFICANT < row.difference.corrected_p and num > 1:
        alone = show.p_value(row.difference.p_value)
        return f"Alone it would count as detected ({alone}), among {num} comparisons it may be chance"
    return "No detectable difference"


def _amount(comparison: Comparison, value: float, *, signed: bool = False) -> str:
    number = (show.change if signed else show.score)(value, in_points=comparison.in_points)
    return f"{number} {_unit(comparison)}"


def _unit(comparison: Comparison) -> str:
    return "points" if comparison.in_points else comparison.tasks[0].task.metric


def _absolute_cost(row: SettingRow) -> str:
    parts = []
    if row.questions_per_s:
        per, time_unit = show.rate_unit([row.questions_per_s])
        parts.append(f"{show.digits(row.questions_per_s * per)} questions/{time_unit}")
    if row.memory_bytes:
        parts.append(f"{format_size(row.memory_bytes)} of memory at peak")
    return ", ".join(parts) or "speed not measured"


def _relative_cost(row: SettingRow) -> str:
    parts = [f"{show.ratio(row.speedup)} as fast" if row.speedup else "of unknown speed"]
    if row.memory_ratio:
        less = row.memory_ratio >= 1
        times = show.ratio(row.memory_ratio if less else 1 / row.memory_ratio)
        parts.append("the same memory" if times == show.ratio(1) else f"{times} {'less' if less else 'more'} memory")
    return ", ".join(parts)
