"""Intervals and paired tests on plain numbers. Knows no task, no setting and no page.

Every interval is two-sided at 95 %. An interval that the data cannot give (one graded question says nothing about the
spread) has NaN bounds; NaN carries through every sum it takes part in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from flexeval.report.resampling import LEVEL, sign_flip_p

Z = float(stats.norm.ppf(0.5 + LEVEL / 2))
SIGNIFICANT = 0.05
"""Differences with a p value below this are called detected."""
POWER = 0.8
"""How often a difference of the size that is called seen is detected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    """The point estimate."""
    low: float
    """Lower bound, at most `value`; NaN where the data give none."""
    high: float
    """Upper bound, at least `value`; NaN where the data give none."""
    num: int
    """Questions it rests on."""

    def __post_init__(self) -> None:
        bounded = not math.isnan(self.low)
        assert not bounded or self.low <= self.value <= self.high, (self.low, self.value, self.high)

    def __neg__(self) -> Estimate:
        return Estimate(value=-self.value, low=-self.high, high=-self.low, num=self.num)


class MeanWithError(NamedTuple):
    """A mean and its standard error."""

    value: float
    error: float | None


def mean(scores: Sequence[float], *, in_unit: bool) -> Estimate:
    """Mean score: Wilson's interval for right-or-wrong scores, Student's for graded ones.

    `in_unit` says that the metric lies in [0, 1]: no bound leaves it.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22; Student 1908,
    "The probable error of a mean", Biometrika 6.
    """
    values = np.asarray(scores, dtype=float)
    assert values.size, "no scores"
    value = float(values.mean())
    if np.isin(values, (0, 1)).all():
        interval = stats.binomtest(int(values.sum()), values.size).proportion_ci(LEVEL, method="wilson")
        # Wilson's bounds at 0 and 1 are exact; rounding must not put them inside the value.
        return Estimate(
            value=value, low=min(float(interval.low), value), high=max(float(interval.high), value), num=values.size
        )
    moments = _sample_moments(values)
    if math.isnan(moments.variance):
        return Estimate(value=value, low=math.nan, high=math.nan, num=values.size)
    half = _student_quantile(moments.freedom) * math.sqrt(moments.variance)
    lowest, highest = (0.0, 1.0) if in_unit else (-math.inf, math.inf)
    return Estimate(value=value, low=max(lowest, value - half), high=min(highest, value + half), num=values.size)


def paired_difference(strata: Sequence[Sequence[float]], weights: Sequence[float], *, in_unit: bool) -> Estimate:
    """Weighted sum over strata (tasks) of the mean difference of paired scores.

    Right-or-wrong scores: Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data", J. Educ. Behav. Stat. 37. It adds one gained and one lost question, which keeps
    a width where nothing changed; several strata share that pair. Graded scores: Student's interval of the differences.
    Over strata the variances add up, with the degrees of freedom of Satterthwaite 1946, "An approximate distribution
    of estimates of variance components", Biometrics Bulletin 2.

    Args:
        strata: Differences of scores, question by question, of each stratum.
        weights: Positive weight of each stratum's mean.
        in_unit: Whether scores lie in [0, 1]: differences of -1, 0 and 1 are then those of right-or-wrong scores.
    """
    pooled = _pooled(strata, weights, in_unit=in_unit)
    num = sum(len(stratum) for stratum in strata)
    if math.isnan(pooled.variance):
        return Estimate(value=pooled.value, low=math.nan, high=math.nan, num=num)
    half = _student_quantile(pooled.freedom) * math.sqrt(pooled.variance)
    most = sum(weights) if in_unit else math.inf
    return Estimate(
        value=pooled.value,
        low=min(pooled.value, max(-most, pooled.center - half)),
        high=max(pooled.value, min(most, pooled.center + half)),
        num=num,
    )


def beyond_margin_p(
    strata: Sequence[Sequence[float]], weights: Sequence[float], *, margin: float, in_unit: bool
) -> float:
    """One-sided p value of "the weighted sum of mean differences is at most `margin`", which is at least 0.

    The larger of two p values, so that it is small only where the sum is both not chance and beyond the margin
    (an intersection-union test: Berger 1982, "Multiparameter hypothesis testing and acceptance sampling",
    Technometrics 24). The one is of `sign_flip_p`, exact for a sum of 0; the other inverts the lower bound of
    `paired_difference`, where differences without any spread count as known.
    """
    pooled = _pooled(strata, weights, in_unit=in_unit, without_spread=0.0)
    if pooled.value <= margin:  # half of either distribution lies above
        return 1.0
    chance = sign_flip_p(
        [weight * change / len(stratum) for stratum, weight in zip(strata, weights, strict=True) for change in stratum],
        alternative="greater",
    )
    if not pooled.variance:
        return chance
    return max(chance, float(stats.t.sf((pooled.center - margin) / math.sqrt(pooled.variance), pooled.freedom)))


def weighted_sum(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Sum of independent estimates times positive weights, such as a mean over tasks.

    MOVER: Zou and Donner 2008, "Construction of confidence limits about effect measures: a general approach",
    Statistics in Medicine 27. Each estimate's own distance to its bound stands for its standard error.
    """
    assert len(estimates) == len(weights) and all(weight > 0 for weight in weights), weights
    pairs = list(zip(estimates, weights, strict=True))
    value = sum(weight * estimate.value for estimate, weight in pairs)
    below = math.sqrt(sum((weight * (estimate.value - estimate.low)) ** 2 for estimate, weight in pairs))
    above = math.sqrt(sum((weight * (estimate.high - estimate.value)) ** 2 for estimate, weight in pairs))
    return Estimate(value=value, low=value - below, high=value + above, num=sum(estimate.num for estimate in estimates))


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for being many (Holm 1979, "A simple sequentially rejective multiple test procedure")."""
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        corrected[index] = min(1.0, largest)
    return corrected


def questions_to_settle(loss: Estimate, margin: float) -> float:
    """About how many questions show, four times out of five, that quality is lost or that no more than `margin` is.

    Julious 2004, "Sample sizes for clinical trials with Normal data", Statistics in Medicine 23, on non-inferiority:
    (z_0.975 + z_0.8)^2 variance / distance^2. The variance is the one behind the interval of `loss`. The distance is
    from the loss to zero or to the margin, whichever is farther and so is excluded first; at most the margin, since
    the true loss may lie nearer than its estimate. Never more than it takes for an interval as wide as the margin,
    which cannot hold both. NaN where the variance is unknown or no loss is tolerated.
    """
    if math.isnan(loss.low) or margin <= 0:
        return math.nan
    standard_error = (loss.high - loss.low) / (2 * Z)
    distance = min(margin, max(loss.value, margin - loss.value))
    shrinkage = standard_error * min((Z + float(stats.norm.ppf(POWER))) / distance, 2 * Z / margin)
    return loss.num * shrinkage**2


def smallest_seen(loss: Estimate, num_comparisons: int = 1) -> float:
    """The true loss that so many questions detect four times out of five; smaller ones mostly go unseen.

    (z_(1 - 0.025 / m) + z_0.8) standard errors (Lachin 1981, "Introduction to sample size determination and power
    analysis for clinical trials", Controlled Clinical Trials 2). The standard error is the one behind the interval of
    `loss`; m is the number of comparisons, for Holm's correction asks that much of the first one that is detected. NaN
    where the standard error is unknown.
    """
    detected = float(stats.norm.isf((1 - LEVEL) / 2 / num_comparisons))
    return (detected + float(stats.norm.ppf(POWER))) * (loss.high - loss.low) / (2 * Z)


def clustered_mean(values: np.ndarray, clusters: np.ndarray) -> MeanWithError:
    """Mean of values that are alike within clusters, with its standard error; None for a single cluster.

    Liang and Zeger 1986, "Longitudinal data analysis using generalized linear models", Biometrika 73, for a mean, as in
    Miller 2024, "Adding error bars to evals" (arXiv:2411.00640), section 2.2: sums of a cluster's residuals are
    squared, not single residuals. Times G / (G - 1) for G clusters, since their mean is estimated from them.
    """
    assert values.size, "no values"
    average = float(values.mean())
    _, index = np.unique(clusters, return_inverse=True)
    sums = np.bincount(index, weights=values - average)
    num = sums.size
    if num < 2:
        return MeanWithError(average, None)
    return MeanWithError(average, math.sqrt(num / (num - 1) * float((sums**2).sum())) / values.size)


class _Moments(NamedTuple):
    center: float
    variance: float
    """Of the mean; NaN where the data give none."""
    freedom: float


class _Pooled(NamedTuple):
    value: float
    center: float
    variance: float
    """Of the sum; NaN where a stratum gives none."""
    freedom: float


def _pooled(
    strata: Sequence[Sequence[float]], weights: Sequence[float], *, in_unit: bool, without_spread: float = math.nan
) -> _Pooled:
    """As `paired_difference` says; `without_spread` is the variance where data give none."""
    arrays = [np.asarray(differences, dtype=float) for differences in strata]
    assert len(arrays) == len(weights) and all(array.size for array in arrays), weights
    whole = [in_unit and bool(np.isin(array, (-1, 0, 1)).all()) for array in arrays]
    num_whole = sum(whole)
    moments = [
        _adjusted_moments(array, 1 / num_whole) if is_whole else _sample_moments(array, without_spread)
        for array, is_whole in zip(arrays, whole, strict=True)
    ]
    terms = [weight**2 * part.variance for part, weight in zip(moments, weights, strict=True)]
    doubt = sum(term**2 / part.freedom for term, part in zip(terms, moments, strict=True) if term > 0)
    variance = sum(terms)
    return _Pooled(
        value=sum(weight * float(array.mean()) for array, weight in zip(arrays, weights, strict=True)),
        center=sum(weight * part.center for part, weight in zip(moments, weights, strict=True)),
        variance=variance,
        freedom=variance**2 / doubt if doubt else math.inf,
    )


def _adjusted_moments(differences: np.ndarray, num_added: float) -> _Moments:
    """Bonett and Price's, with `num_added` gained and as many lost questions added."""
    total = differences.size + 2 * num_added
    gained = (int((differences > 0).sum()) + num_added) / total
    lost = (int((differences < 0).sum()) + num_added) / total
    center = gained - lost
    return _Moments(center, (gained + lost - center**2) / total, math.inf)


def _sample_moments(values: np.ndarray, without_spread: float = math.nan) -> _Moments:
    has_spread = np.ptp(values) > 0
    variance = float(values.var(ddof=1)) / values.size if has_spread else without_spread
    return _Moments(float(values.mean()), variance, values.size - 1.0)


def _student_quantile(freedom: float) -> float:
    return float(stats.t.ppf(0.5 + LEVEL / 2, freedom))
