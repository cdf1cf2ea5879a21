"""The smallest drop that so many questions show four times out of five. Knows counts and rates; no task.

A check that passes says little if it could not have failed; this is what it could have seen. Answers are taken to
change as they were seen to: as many are mended by chance as this time, and as many more are lost as the drop says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from scipy import optimize, stats

POWER = 0.8
"""How often a drop of the size stated is shown."""
_MOST_EXACT = 500
"""Questions up to which all outcomes are counted; beyond, the normal distribution is as good."""


def detectable_drop(
    losses: Sequence[Sequence[float]], weights: Sequence[float], *, margin: float, alpha: float, in_unit: bool
) -> float:
    """The drop of the weighted sum of mean scores that `beyond_margin_p` finds below `alpha`.

    Exact for one task of right-or-wrong scores: all outcomes are counted. Otherwise normal: the drop, the same at every
    task, exceeds `margin` by (z_(1 - alpha) + z_0.8) standard errors (Julious 2004, "Sample sizes for clinical trials
    with Normal data", Statistics in Medicine 23). The spread of graded scores is known from a sample alone: Student's
    quantiles stand for normal ones, and the upper end of an 80 % interval for the variance (Browne 1995, "On the use of
    a pilot sample for sample size determination", Statistics in Medicine 14).

    Args:
        losses: Scores before minus scores now, question by question, of each task.
        weights: Positive weight of each task's mean; they add up to 1.
        margin: Tolerated drop, at least 0.
        alpha: Level of the test.
        in_unit: Whether scores lie in [0, 1]. Otherwise nothing is known of them but how much they changed this time.

    Returns:
        The drop; infinity where not even losing all would be shown, NaN where nothing is known.
    """
    arrays = [np.asarray(one, dtype=float) for one in losses]
    num = sum(array.size for array in arrays)
    gains = [float((array < 0).mean()) for array in arrays]
    if 2.0**-num >= alpha:
        return math.inf
    whole = [in_unit and bool(np.isin(array, (-1, 0, 1)).all()) for array in arrays]
    if len(arrays) == 1 and whole[0] and num <= _MOST_EXACT:
        least = _least_losses(num, margin, alpha)
        return _smallest(lambda drop: _power(least, num, gains[0], drop) - POWER, margin, 1 - gains[0])
    terms = [
        (weight**2 * float(array.var(ddof=1)) / array.size, array.size - 1)
        for array, weight, is_whole in zip(arrays, weights, whole, strict=True)
        if array.size > 1 and not is_whole
    ]
    spread = sum(term for term, _ in terms)
    doubt = sum(term**2 / freedom for term, freedom in terms)
    freedom = spread**2 / doubt if doubt else math.inf
    if doubt:
        spread *= freedom / float(stats.chi2.ppf(1 - POWER, freedom))
    distance = float(stats.t.isf(alpha, freedom) + stats.t.ppf(POWER, freedom))
    if not in_unit:
        return margin + distance * math.sqrt(spread) if spread else math.nan

    def excess(drop: float) -> float:
        """How far the drop lies beyond what is shown, if it comes as answers that are lost."""
        variance = spread + sum(
            weight**2 * _variance(array.size, 1 / len(arrays), gain, gain + drop)
            for array, weight, gain in zip(arrays, weights, gains, strict=True)
        )
        return drop - margin - distance * math.sqrt(variance)

    return _smallest(excess, margin, 1 - max(gains))


def _smallest(excess: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that grows passes 0; infinity where it does not."""
    if high <= low or excess(high) < 0:
        return math.inf
    return float(optimize.brentq(excess, low, high, xtol=1e-4)) if excess(low) < 0 else low


def _variance(num: int, num_added: float, gained: float, lost: float) -> float:
    """Of a mean change where answers change at these rates, with as many added as in `paired_difference`."""
    total = num + 2 * num_added
    gained, lost = (gained * num + num_added) / total, (lost * num + num_added) / total
    return max(0.0, gained + lost - (lost - gained) ** 2) / total


@cache
def _least_losses(num: int, margin: float, alpha: float) -> np.ndarray:
    """For each number of gains, the least number of losses that is shown; more than there are where none is."""
    least = np.full(num + 1, num + 1)
    for gained in range(num + 1):
        lost = np.arange(num - gained + 1)
        chance = stats.binom.sf(lost - 1, lost + gained, 0.5)
        total = num + 2
        center = (lost - gained) / total
        variance = ((lost + gained + 2) / total - center**2) / total
        shown = (chance < alpha) & (stats.norm.sf((center - margin) / np.sqrt(variance)) < alpha)
        if not shown.any():
            break  # with more gains less is shown
        least[gained] = int(shown.argmax())
    return least


def _power(least: np.ndarray, num: int, gain: float, drop: float) -> float:
    """Chance that enough questions are lost, for the number that happens to be gained."""
    gained = np.arange(num + 1)
    enough = stats.binom.sf(least - 1, num - gained, min(1.0, (gain + drop) / (1 - gain)))
    return float((stats.binom.pmf(gained, num, gain) * enough).sum())
