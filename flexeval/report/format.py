"""Numbers and names as people read them. Knows no table and no page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # formatting needs no scipy
    from flexeval.report.statistics import Estimate

NOTHING = "\N{EN DASH}"
NARROW = (0, 1, 0, 0)
"""Padding of a table's cells that leaves a terminal of 80 characters room for every digit."""
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_RATES = ((1, "s"), (60, "min"), (3600, "h"))


def score(value: float, *, in_points: bool) -> str:
    """A score: points of 100 with one decimal, or the metric's own unit with three digits."""
    return _minus(f"{value * 100:.1f}" if in_points else f"{value:.3g}")


def change(value: float, *, in_points: bool) -> str:
    """A difference of scores, with its sign; no sign where it rounds to nothing."""
    text = f"{value * 100:+.1f}" if in_points else f"{value:+.3g}"
    return _minus(text) if float(text) else text.lstrip("+-")


def interval(estimate: Estimate, *, in_points: bool, signed: bool = False) -> str:
    """Both bounds of an interval: `55.0 to 67.2`."""
    if math.isnan(estimate.low):
        return "unknown"
    show = change if signed else score
    return f"{show(estimate.low, in_points=in_points)} to {show(estimate.high, in_points=in_points)}"


def p_value(value: float) -> str:
    """A p value with its relation: `p = 0.03`, `p < 0.001`."""
    if value < 0.001:
        return "p < 0.001"
    return f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def digits(value: float) -> str:
    """Three significant digits, thousands grouped, never in powers of ten."""
    if value >= 100:
        return f"{value:,.0f}"
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(decimals, 6)}f}"


def with_error(value: float, error: float | None) -> str:
    """A mean and its standard error, of which two digits are shown: `0.2341 ± 0.0050`."""
    if error is None:
        return f"{_minus('-' * (value < 0) + digits(abs(value)))} \N{PLUS-MINUS SIGN} unknown"
    decimals = 1 - math.floor(math.log10(error)) if error > 0 else 2
    decimals = min(max(decimals, 0), 6)
    return f"{_minus(f'{value:.{decimals}f}')} \N{PLUS-MINUS SIGN} {error:.{decimals}f}"


def percent(share: float, error: float | None) -> str:
    """A share and its standard error in percent, without the sign."""
    return with_error(100 * share, None if error is None else 100 * error)


def count(value: float) -> str:
    """A whole number, thousands grouped."""
    return f"{value:,.0f}"


def rough_count(value: float) -> str:
    """A whole number that is not known well: two digits, rounded up: `1,100`."""
    step = 10 ** max(0, len(str(math.ceil(value))) - 2)
    return count(math.ceil(value / step) * step)


def ratio(value: float) -> str:
    """How many times: `1.31x`."""
    return f"{value:.2f}\N{MULTIPLICATION SIGN}" if value < 10 else f"{value:.0f}\N{MULTIPLICATION SIGN}"


def seconds(value: float) -> str:
    """A duration: `0.42 s`, `3 min 05 s`, `2 h 10 min`."""
    if value < 60:
        return f"{digits(value)} s" if value else "0 s"
    if value < 3600:
        return f"{int(value) // 60} min {int(value) % 60:02d} s"
    return f"{int(value) // 3600} h {int(value) % 3600 // 60:02d} min"


def rate_unit(per_second: Iterable[float]) -> tuple[int, str]:
    """Seconds and name of the time unit in which the fastest of these rates is at least one."""
    fastest = max(per_second, default=1.0)
    return next((unit for unit in _RATES if fastest * unit[0] >= 1), _RATES[-1])


def visible(text: str) -> str:
    """The text with control, direction and broken characters written out, so that none can act on the page."""
    return _INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
