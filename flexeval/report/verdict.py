"""What the figures say, in plain words: one verdict per setting and one answer for the run. Computes no figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from flexeval.config import format_size
from flexeval.report import format as show
from flexeval.report.statistics import SIGNIFICANT, smallest_visible
from flexeval.report.tables import Comparison, Difference, SettingRow

_FASTER = 1.02
"""Speeds are measured once: a smaller speedup than this is not called one."""
_TOO_COARSE = 0.1
"""A comparison that would miss a drop of ten points of a hundred recommends nothing."""


class Kind(StrEnum):
    """How a setting's quality compares with the baseline's."""

    BASELINE = "baseline"
    SAME = "no detectable difference in quality"
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

    @property
    def sentence(self) -> str:
        """All of it in one sentence."""
        return f"{self.setting}: {self.cost}; {self.kind}: {self.quality}."


def verdicts(comparison: Comparison) -> list[Verdict]:
    """One verdict per setting, in order."""
    return [_verdict(comparison, row) for row in comparison.settings]


def answer(comparison: Comparison) -> list[str]:
    """Which setting to use, as one to three sentences; the first is the answer."""
    rows = comparison.settings
    base = rows[comparison.baseline]
    if len(rows) == 1:
        only = _verdict(comparison, base)
        return [f"{only.setting} scores {only.quality} at {only.cost}."] if base.quality else [only.sentence]
    if base.quality is None:
        return ["The tasks have no common scale: choose by the table per task."]
    kept = [row for row in rows if row.difference and _kind(comparison, row.difference) != Kind.WORSE]
    if not kept:
        return [f"Every other setting loses quality against {_name(base)}.", *_least_loss(comparison)]
    num = f"{show.count(base.quality.num)} questions"
    drop = _smallest_visible(kept)
    if math.isnan(drop):
        return [f"{num} are too few to say which setting keeps its quality.", "Even a large drop would go unseen."]
    if comparison.in_points and drop > _TOO_COARSE:
        return [
            f"{num} are too few to say which setting keeps its quality.",
            f"A true drop of {_amount(comparison, drop)} would often go unseen.",
        ]
    return [
        *_recommendations(comparison, kept, base),
        f"With {num}, a true drop below about {_amount(comparison, drop)} would often go unseen.",
    ]


def _recommendations(comparison: Comparison, kept: Sequence[SettingRow], base: SettingRow) -> list[str]:
    faster = [(row.speedup, row) for row in kept if row.speedup and row.speedup > _FASTER]
    smaller = [(row.memory_ratio, row) for row in kept if row.memory_ratio and row.memory_ratio > 1]
    speedup, fastest = max(faster, key=lambda pair: pair[0], default=(1.0, base))
    shrinkage, smallest = max(smaller, key=lambda pair: pair[0], default=(1.0, base))
    sentences = []
    if fastest is base:
        sentences.append(f"For speed, stay with {_name(base)}: nothing is faster without a detectable loss of quality.")
    else:
        sentences.append(
            f"Use {_name(fastest)}: the fastest setting without a detectable loss of quality "
            f"({show.ratio(speedup)} as fast as {_name(base)})."
        )
        if fastest.difference:
            sentences.append(f"Its quality against {_name(base)}: {_change(comparison, fastest.difference)}.")
    if smallest is not base and smallest is not fastest:
        sentences.append(
            f"If memory is short, {_name(smallest)} uses the least without a detectable loss "
            f"({show.ratio(shrinkage)} less than {_name(base)})."
        )
    return sentences


def _least_loss(comparison: Comparison) -> list[str]:
    sign = 1 if comparison.higher_is_better else -1
    losses = [(sign * row.difference.estimate.value, row) for row in comparison.settings if row.difference]
    best = _verdict(comparison, max(losses, key=lambda pair: pair[0])[1])
    return [f"{best.setting} loses least: {best.quality}; {best.cost}."]


def _smallest_visible(rows: Sequence[SettingRow]) -> float:
    """The drop that the least precise of these comparisons would find four times out of five; NaN if one is unknown."""
    drops = [smallest_visible(row.difference.estimate) for row in rows if row.difference]
    return math.nan if any(math.isnan(drop) for drop in drops) else max(drops)


def _verdict(comparison: Comparison, row: SettingRow) -> Verdict:
    is_baseline = row is comparison.settings[comparison.baseline]
    if row.quality is None:
        kind, quality = Kind.UNKNOWN, "see the tasks"
    elif row.difference is None:
        bounds = show.interval(row.quality, in_points=comparison.in_points)
        kind = Kind.BASELINE
        quality = f"{_amount(comparison, row.quality.value)} (95% interval {bounds}, n = {show.count(row.quality.num)})"
    else:
        kind, quality = _kind(comparison, row.difference), _change(comparison, row.difference)
    cost = _absolute_cost(row) if is_baseline else _relative_cost(row)
    return Verdict(setting=_name(row), kind=kind, cost=cost, quality=quality)


def _kind(comparison: Comparison, difference: Difference) -> Kind:
    if difference.p_value >= SIGNIFICANT:
        return Kind.SAME
    return Kind.BETTER if (difference.estimate.value > 0) == comparison.higher_is_better else Kind.WORSE


def _change(comparison: Comparison, difference: Difference) -> str:
    estimate = difference.estimate
    return (
        f"{_amount(comparison, estimate.value, signed=True)} "
        f"(95% interval {show.interval(estimate, in_points=comparison.in_points, signed=True)}, "
        f"{show.p_value(difference.p_value)}, n = {show.count(estimate.num)})"
    )


def _amount(comparison: Comparison, value: float, *, signed: bool = False) -> str:
    number = (show.change if signed else show.score)(value, in_points=comparison.in_points)
    return f"{number} {'points' if comparison.in_points else comparison.tasks[0].task.metric}"


def _absolute_cost(row: SettingRow) -> str:
    parts = []
    if row.questions_per_s:
        per, unit = show.rate_unit([row.questions_per_s])
        parts.append(f"{show.digits(row.questions_per_s * per)} questions/{unit}")
    if row.memory_bytes:
        parts.append(f"{format_size(row.memory_bytes)} of memory at peak")
    return ", ".join(parts) or "speed not measured"


def _relative_cost(row: SettingRow) -> str:
    parts = [f"{show.ratio(row.speedup)} as fast" if row.speedup else "of unknown speed"]
    if row.memory_ratio:
        less = row.memory_ratio >= 1
        times = show.ratio(row.memory_ratio if less else 1 / row.memory_ratio)
        parts.append(f"{times} {'less' if less else 'more'} memory")
    return ", ".join(parts)


def _name(row: SettingRow) -> str:
    return row.result.setting
