"""What chance alone does to paired differences: signs tossed anew, questions drawn anew. Knows plain numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
_NUM_RESAMPLES = 9_999
_FEWEST_RESAMPLES = 999
_BATCH_NUMBERS = 4_000_000
_MOST_NUMBERS = 20_000_000
_SEED = 0


class Bounds(NamedTuple):
    """Both ends of an interval."""

    low: float
    high: float


def sign_flip_p(differences: Sequence[float], alternative: Literal["two-sided", "greater"] = "two-sided") -> float:
    """P value of "the sign of every difference is a coin toss"; `greater`: against a sum above 0 alone.

    The randomization test for paired data (Fisher 1935, "The Design of Experiments", section 21). Where all changes are
    of one size it is McNemar's exact test (McNemar 1947, Psychometrika 12), a binomial. Otherwise all sign patterns are
    tried if there are few, and 9,999 random ones, always the same, if there are many. So many cannot tell p values of
    less than 1 in 10,000 apart, which corrections for many comparisons ask for: there it is never more than

        exp(-(sum of d)^2 / (2 sum of d^2)) for each side,

    which bounds the exact one (Hoeffding 1963, "Probability inequalities for sums of bounded random variables", JASA
    58, theorem 2).
    """
    changes = np.asarray(differences, dtype=float)
    changes = changes[changes != 0]
    if not changes.size:
        return 1.0
    if np.allclose(np.abs(changes), abs(changes[0]), rtol=1e-9, atol=0):
        return float(stats.binomtest(int((changes > 0).sum()), changes.size, alternative=alternative).pvalue)
    test = stats.permutation_test(
        (changes,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        alternative=alternative,
        n_resamples=_NUM_RESAMPLES,
        batch=max(1, _BATCH_NUMBERS // changes.size),
        rng=np.random.default_rng(_SEED),
    )
    scaled = changes / np.abs(changes).max()
    total = float(scaled.sum())
    sides = 2 if alternative == "two-sided" else 1
    bound = sides * math.exp(-(total**2) / (2 * float((scaled**2).sum()))) if sides == 2 or total > 0 else 1.0
    return min(float(test.pvalue), bound)


def bootstrap(strata: Sequence[Sequence[float]], weights: Sequence[float]) -> Bounds:
    """95 % interval of a weighted sum of means, from questions drawn again with replacement within each stratum.

    Percentiles of 9,999 draws, always the same ones (fewer, but at least 999, of very many different values): Efron
    1979, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7. NaN for a single question.

    Args:
        strata: Paired differences of each stratum (task).
        weights: Weight of each stratum's mean.
    """
    arrays = [np.asarray(differences, dtype=float) for differences in strata]
    if max(array.size for array in arrays) < 2:
        return Bounds(math.nan, math.nan)
    found = [np.unique(array, return_counts=True) for array in arrays]
    num_numbers = sum(values.size for values, _ in found)
    num_draws = min(_NUM_RESAMPLES, max(_FEWEST_RESAMPLES, _MOST_NUMBERS // num_numbers))
    rng = np.random.default_rng(_SEED)
    sums = np.zeros(num_draws)
    for (values, counts), weight in zip(found, weights, strict=True):
        batch = max(1, _BATCH_NUMBERS // values.size)
        for first in range(0, num_draws, batch):
            part = sums[first : first + batch]
            draws = rng.multinomial(counts.sum(), counts / counts.sum(), size=part.size)
            part += weight * (draws @ values) / counts.sum()
    low, high = np.quantile(sums, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Bounds(float(low), float(high))
