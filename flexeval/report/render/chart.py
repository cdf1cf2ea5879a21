"""Geometry of the picture of quality against speed: where its marks and labels go. Knows no SVG; a template draws it.

A handful of marks does not need plotly, whose script alone is 4 MB and which neither prints nor follows the page's
colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flexeval.report import format as show
from flexeval.report.render.labels import LINE_HEIGHT, Box, leader, place_labels
from flexeval.report.statistics import Estimate
from flexeval.report.tables import Comparison
from flexeval.report.verdict import scale

WIDTH, HEIGHT = 520, 340
LEFT, TOP, RIGHT, BOTTOM = 64, 12, WIDTH - 34, HEIGHT - 46
_UNITS = {"s": "second", "min": "minute", "h": "hour"}
_ROOM = Box(LEFT, TOP - LINE_HEIGHT / 2, WIDTH, BOTTOM)
"""Where labels may stand."""
_LONGEST_LABEL = 24


class Tick(NamedTuple):
    """A labelled place on an axis."""

    position: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One setting on the canvas."""

    series: int
    """Index of the setting: its colour and shape."""
    x: float
    y: float
    ends: tuple[float, float] | None
    """Where its interval's bar ends; None where the interval is unknown."""
    label: str
    """The setting's name, cut if long."""
    box: Box
    """Where the label goes."""
    anchor: str
    """The edge of the box that the label starts from, in SVG's words: `start` or `end`."""
    title: str
    """The mark in words."""

    @property
    def leader(self) -> tuple[float, float] | None:
        """Where a line from the mark to its label ends; None where the label stands beside the mark."""
        line = leader((self.x, self.y), self.box)
        return None if line is None else (line.x2, line.y2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """The picture, ready to draw."""

    marks: tuple[Mark, ...]
    front: tuple[tuple[float, float], ...]
    """Marks that no other beats in both quality and speed, left to right."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_label: str
    y_label: str


class _Axis:
    """Values to canvas units along one direction, with round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, scale: float = 1.0):
        scaled = [value * scale for value in values]
        low, high = min(scaled), max(scaled)
        spread = (high - low) or abs(high) or 1.0
        rough = spread / 5
        magnitude = 10.0 ** math.floor(math.log10(rough))
        self._step: float = next(step * magnitude for step in (1, 2, 5, 10) if step * magnitude >= rough)
        self._low = math.floor(low / self._step) * self._step
        self._high = max(math.ceil(high / self._step) * self._step, self._low + self._step)
        self._start, self._end, self._scale = start, end, scale

    def __call__(self, value: float) -> float:
        """Canvas position of a value."""
        share = (value * self._scale - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 2)

    def ticks(self) -> tuple[Tick, ...]:
        """Round values from end to end."""
        decimals = max(0, -math.floor(math.log10(self._step)))
        num = round((self._high - self._low) / self._step) + 1
        values = [self._low + number * self._step for number in range(num)]
        return tuple(Tick(self(value / self._scale), f"{value:,.{decimals}f}") for value in values)


def trade_off(comparison: Comparison) -> Chart | None:
    """Quality against speed, a mark per setting; None where fewer than two settings have both."""
    rows = [
        (index, row, row.quality, row.questions_per_s)
        for index, row in enumerate(comparison.settings)
        if row.quality and row.questions_per_s
    ]
    if len(rows) < 2:
        return None
    per, unit = show.rate_unit([speed for _, _, _, speed in rows])
    x_axis = _Axis([0, *(speed for _, _, _, speed in rows)], LEFT, RIGHT, per)
    ends = [end for _, _, quality, _ in rows for end in (quality.value, *(_bounds(quality) or ()))]
    y_axis = _Axis(ends, BOTTOM, TOP, 100 if comparison.in_points else 1)
    places = [(x_axis(speed), y_axis(quality.value)) for _, _, quality, speed in rows]
    names = [_cut(row.result.setting) for _, row, _, _ in rows]
    bars = [
        Box(x - 5, y_axis(bounds[1]), x + 5, y_axis(bounds[0]))
        for (_, _, quality, _), (x, _) in zip(rows, places, strict=True)
        if (bounds := _bounds(quality))
    ]
    marks = [
        Mark(
            series=index,
            x=x,
            y=y,
            ends=(y_axis(bounds[0]), y_axis(bounds[1])) if (bounds := _bounds(quality)) else None,
            label=name,
            box=box,
            anchor="start" if box.left > x else "end",
            title=f"{row.result.setting}: {show.score(quality.value, in_points=comparison.in_points)} "
            f"({show.interval(quality, in_points=comparison.in_points)}), {show.digits(speed * per)} questions/{unit}",
        )
        for (index, row, quality, speed), (x, y), name, box in zip(
            rows, places, names, place_labels(places, names, bars, _ROOM), strict=True
        )
    ]
    front = sorted((mark.x, mark.y) for mark, (_, row, _, _) in zip(marks, rows, strict=True) if row.is_best_trade)
    return Chart(
        marks=tuple(marks),
        front=tuple(front) if len(front) > 1 else (),
        x_ticks=x_axis.ticks(),
        y_ticks=y_axis.ticks(),
        x_label=f"questions per {_UNITS[unit]}",
        y_label=f"quality, {scale(comparison)}",
    )


def _bounds(estimate: Estimate) -> tuple[float, float] | None:
    return None if math.isnan(estimate.low) else (estimate.low, estimate.high)


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}\N{HORIZONTAL ELLIPSIS}"
