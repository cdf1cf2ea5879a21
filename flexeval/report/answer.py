"""Which setting to use, in a few sentences of plain words. Decides; computes no figure and knows no page.

A setting is worth a switch if it is clearly faster or smaller, and safe if a loss of quality beyond the margin is ruled
out. One that is shown to lose is never recommended outright, however small the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from flexeval.report import format as show
from flexeval.report.statistics import SIGNIFICANT, questions_to_settle
from flexeval.report.tables import Comparison, SettingRow
from flexeval.report.verdict import Kind, is_within_margin, loss, margin, tolerated, verdict

CLEARLY = 1.1
"""Speed and memory are measured once: a smaller ratio than this is no reason to switch."""
_NAMED_TASKS = 3
"""Tasks that lose which a sentence names."""


def answer(comparison: Comparison) -> list[str]:
    """Which setting to use, in a few sentences; the first is the answer."""
    base = comparison.settings[comparison.baseline]
    if len(comparison.settings) == 1:
        only = verdict(comparison, base)
        return [f"{only.setting} scores {only.quality} at {only.cost}."] if base.quality else [only.sentence]
    if base.quality is None:
        return ["The tasks have no common scale: choose by the table per task."]
    found = _sorted(comparison)
    if found.safe:
        return _switch(comparison, found.safe, found.unsettled)
    if found.slight:
        return _leave_open(comparison, found.slight)
    if found.unsettled:
        return _wait(comparison, found.unsettled)
    return _refuse(comparison, found.losing) if found.losing else _stay(comparison)


class Choice(NamedTuple):
    """The setting that the answer names."""

    row: SettingRow
    words: str
    """Why, in a few words."""


def choice(comparison: Comparison) -> Choice | None:
    """The setting that the answer names: a safe one that is worth a switch, or else the baseline.

    None where there is nothing to choose, or where only a reader can say whether a small loss is acceptable.
    """
    if len(comparison.settings) == 1 or comparison.settings[comparison.baseline].quality is None:
        return None
    found = _sorted(comparison)
    if found.safe:
        best = _best(found.safe)
        return Choice(best, "use this" if _is_faster(best) else "if memory is short")
    return None if found.slight else Choice(comparison.settings[comparison.baseline], "stay with this")


class _Sorted(NamedTuple):
    """Settings that are clearly faster or smaller than the baseline."""

    safe: list[SettingRow]
    """A loss beyond the margin is ruled out, and none is detected."""
    slight: list[SettingRow]
    """A loss is detected, and one beyond the margin is ruled out."""
    losing: list[SettingRow]
    """A loss is detected: `slight` and larger ones."""
    unsettled: list[SettingRow]
    """Neither is known."""


def _sorted(comparison: Comparison) -> _Sorted:
    worth = [row for row in comparison.settings if _is_faster(row) or _is_smaller(row)]
    losing = [row for row in worth if verdict(comparison, row).kind == Kind.WORSE]
    safe = [row for row in worth if row not in losing and is_within_margin(comparison, row)]
    return _Sorted(
        safe=safe,
        slight=[row for row in losing if is_within_margin(comparison, row)],
        losing=losing,
        unsettled=[row for row in worth if row not in losing and row not in safe],
    )


def _best(safe: Sequence[SettingRow]) -> SettingRow:
    """The fastest, or the smallest where none is clearly faster than the baseline."""
    fastest = max(safe, key=_speedup)
    return fastest if _is_faster(fastest) else max(safe, key=_memory_ratio)


def _switch(comparison: Comparison, safe: Sequence[SettingRow], unsettled: Sequence[SettingRow]) -> list[str]:
    """The fastest that is safe, or else the smallest."""
    best, smallest = _best(safe), max(safe, key=_memory_ratio)
    condition = "" if _is_faster(best) else " if memory is short"
    tempting = max(unsettled, key=_speedup, default=best)
    sentences = [
        f"Use {_name(best)}{condition} ({verdict(comparison, best).cost}): {_ruled_out(comparison)}.",
        _evidence(comparison, best),
        *_single_tasks(comparison, best),
    ]
    if _memory_ratio(smallest) >= CLEARLY * _memory_ratio(best):
        less = show.ratio(_memory_ratio(smallest))
        sentences.append(f"If memory is short, {_name(smallest)} is as safe: {less} less than {_base(comparison)}.")
    elif _speedup(tempting) >= CLEARLY * max(1.0, _speedup(best)):
        sentences.append(
            f"{_name(tempting)} is faster ({show.ratio(_speedup(tempting))}), but {_risk(comparison, tempting)}."
        )
    elif condition:
        sentences.append(f"Otherwise stay with {_base(comparison)}: nothing as safe is clearly faster.")
    return sentences


def _leave_open(comparison: Comparison, slight: Sequence[SettingRow]) -> list[str]:
    """A loss that is shown, and shown to be small: whether to accept it is for the reader to say."""
    best = max(slight, key=lambda row: (_speedup(row) if _is_faster(row) else 0.0, _memory_ratio(row)))
    return [
        f"Stay with {_base(comparison)}, or accept a small loss with {_name(best)} "
        f"({verdict(comparison, best).cost}): {_ruled_out(comparison)}.",
        _evidence(comparison, best),
        *_single_tasks(comparison, best),
    ]


def _wait(comparison: Comparison, unsettled: Sequence[SettingRow]) -> list[str]:
    """No setting is known to be safe: name the nearest to it, and how many questions would do."""
    best = min(unsettled, key=lambda row: _or_infinity(loss(comparison, row).high))
    num = questions_to_settle(loss(comparison, best), margin(comparison))
    settled = (
        ""
        if math.isnan(num)
        else f"; about {show.rough_count(num)} questions would settle whether it loses {tolerated(comparison)}"
    )
    stay = f"Stay with {_base(comparison)} for now"
    if len(unsettled) == 1:
        first = [f"{stay}: {_name(best)} {_risk(comparison, best)}.", _evidence(comparison, best)]
    else:
        first = [
            f"{stay}: for every faster or smaller setting, a loss of more than {tolerated(comparison)} is possible.",
            f"{_name(best)} comes nearest: {verdict(comparison, best).quality}.",
        ]
    return [*first, f"It {_promise(best)}{settled}."]


def _refuse(comparison: Comparison, losing: Sequence[SettingRow]) -> list[str]:
    best = min(losing, key=lambda row: loss(comparison, row).value)
    if len(losing) == 1:
        reason, evidence = f"{_name(best)} loses quality", _evidence(comparison, best)
    else:
        others = "other" if len(losing) == len(comparison.settings) - 1 else "faster or smaller"
        reason = f"every {others} setting loses quality"
        evidence = f"{_name(best)} loses least: {verdict(comparison, best).quality}."
    return [f"Stay with {_base(comparison)}: {reason}.", evidence, f"In return it {_promise(best)}."]


def _stay(comparison: Comparison) -> list[str]:
    clearly = f"{CLEARLY:g}\N{MULTIPLICATION SIGN}"
    gains = [one for row in comparison.settings if (one := verdict(comparison, row)).kind == Kind.BETTER]
    return [
        f"Stay with {_base(comparison)}: no other setting was measured to be clearly faster or smaller.",
        f"A switch should bring at least {clearly} the speed or {clearly} less memory.",
        *(f"{one.setting} gains quality, though: {one.quality}." for one in gains[:1]),
    ]


def _ruled_out(comparison: Comparison) -> str:
    return f"a quality loss of more than {tolerated(comparison)} is ruled out"


def _evidence(comparison: Comparison, row: SettingRow) -> str:
    return f"Its quality against {_base(comparison)}: {verdict(comparison, row).quality}."


def _single_tasks(comparison: Comparison, row: SettingRow) -> list[str]:
    """Tasks at which a loss is detected, whether or not they are part of the overall quality."""
    index = comparison.settings.index(row)
    lost = []
    for task in comparison.tasks:
        difference = task.cells[index].difference
        if difference is None or difference.corrected_p >= SIGNIFICANT:
            continue
        change = difference.estimate.value
        if change < 0 if task.task.higher_is_better else change > 0:
            unit = "points" if task.in_points else task.task.metric
            lost.append(f"{task.task.name} ({show.change(change, in_points=task.in_points)} {unit})")
    if not lost:
        return []
    num_more = len(lost) - _NAMED_TASKS
    more = f" and {num_more} more task{'s' * (num_more > 1)}" if num_more > 0 else ""
    return [f"But a loss is detected at {', '.join(lost[:_NAMED_TASKS])}{more}: see whether that matters to you."]


def _risk(comparison: Comparison, row: SettingRow) -> str:
    most = loss(comparison, row).high
    if math.isnan(most):
        return "may lose more than these questions can show"
    upper = show.score(most, in_points=comparison.in_points)
    return f"may lose more than {tolerated(comparison)}, up to {upper}"


def _promise(row: SettingRow) -> str:
    """What a setting that is clearly faster or smaller brings, and at what price."""
    faster = f"is {show.ratio(_speedup(row))} as fast"
    smaller = f"uses {show.ratio(_memory_ratio(row))} less memory"
    if not _is_faster(row):
        slower = "slower" if _speedup(row) * CLEARLY < 1 else "not clearly faster"
        return f"{smaller} but is {slower} ({show.ratio(row.speedup)})" if row.speedup else smaller
    if _is_smaller(row):
        return f"{faster} and {smaller}"
    if row.memory_ratio and row.memory_ratio * CLEARLY < 1:
        return f"{faster} but uses {show.ratio(1 / row.memory_ratio)} more memory"
    return faster


def _is_faster(row: SettingRow) -> bool:
    return _speedup(row) >= CLEARLY


def _is_smaller(row: SettingRow) -> bool:
    return _memory_ratio(row) >= CLEARLY


def _speedup(row: SettingRow) -> float:
    return row.speedup or 0.0


def _memory_ratio(row: SettingRow) -> float:
    return row.memory_ratio or 0.0


def _or_infinity(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _base(comparison: Comparison) -> str:
    return _name(comparison.settings[comparison.baseline])


def _name(row: SettingRow) -> str:
    return row.result.setting
