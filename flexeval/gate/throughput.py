"""Whether answering got slower, as a ratio to something measured in the same job: never a number of seconds.

Seconds are the machine's as much as the engine's: a neighbour that is busy, another processor. What is held against a
baseline is how many times as fast a setting was as another one of the same run, as the cost model foretold on the
machine, as a peer of the same benchmark, or as the machine's bound allows. Ratios are compared on a logarithmic scale,
with their spread over repeats: a fall fails where a one-sided test of Welch (1947, "The generalization of Student's
problem when several different population variances are involved", Biometrika 34) shows it to be beyond the tolerance,
corrected for all ratios by Holm's method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from flexeval.bench.figures import BenchResults, SystemFigures
from flexeval.gate.baseline import Speed
from flexeval.gate.findings import Finding, Kind, Status
from flexeval.report import format as show
from flexeval.report.merge import baseline_index
from flexeval.report.statistics import SIGNIFICANT, holm
from flexeval.results import RunResults, SettingResult

BOUND = "bound"
"""The least time that the machine's measured rates allow."""
PREDICTION = "prediction"
"""The time that the cost model foretold on this machine."""
LEAST_REPEATS = 3
"""Fewer say nothing about their spread that could be relied on."""
_ENGINE = "flexeval"


def speeds_of_runs(runs: Sequence[RunResults]) -> list[Speed]:
    """Questions a second of each setting over those of `none` (or else the first) and over those foretold, by run.

    Settings of which answers came from an earlier run were not measured in one job; they give no ratio.
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    for run in runs:
        rates = {one.setting: _rate(one) for one in run.settings if _rate(one)}
        names = [one.setting for one in run.settings]
        against = names[baseline_index(names)] if names else ""
        for setting in run.settings:
            if setting.setting not in rates:
                continue
            key = (setting.setting, f"suite {run.suite}")
            if setting.predicted_s:
                found.setdefault((*key, PREDICTION), []).append(setting.predicted_s / setting.elapsed_s)
            if against in rates and setting.setting != against:
                found.setdefault((*key, against), []).append(rates[setting.setting] / rates[against])
    return [Speed(setting=key[0], against=key[2], work=key[1], ratios=ratios) for key, ratios in found.items()]


def speeds_of_bench(bench: BenchResults) -> list[Speed]:
    """Of each of the engine's settings against `none` (or else the first), every peer, and the machine's bound."""
    ours = [system for system in bench.systems if system.system == _ENGINE]
    if not ours:
        return []
    peers = [system for system in bench.systems if system.system != _ENGINE]
    first = ours[baseline_index([system.setting for system in ours])]
    speeds = []
    for system in ours:
        others = {peer.system: peer for peer in peers} | ({} if system is first else {first.setting: first})
        for name, other in others.items():
            ratios = [mine / theirs for mine, theirs in zip(_rates(system), _rates(other), strict=False)]
            speeds.append(Speed(setting=system.setting, against=name, work=bench.work, ratios=ratios))
        if least := sum(_bound_s(system)):
            ratios = [least / seconds for seconds in system.all_elapsed_s]
            speeds.append(Speed(setting=system.setting, against=BOUND, work=bench.work, ratios=ratios))
    return speeds


def judge_throughput(
    before: Sequence[Speed],
    now: Sequence[Speed],
    *,
    tolerance: float,
    not_comparable: str = "",
    is_strict: bool = False,
) -> list[Finding]:
    """A finding for each ratio of the baseline.

    Args:
        before: The baseline's ratios.
        now: The run's.
        tolerance: Share of the baseline's ratio that may be lost, below 1.
        not_comparable: Why no ratio can be judged; empty where they can.
        is_strict: Whether a ratio that cannot be judged leaves the check without an answer.
    """
    measured = {(one.setting, one.against, one.work): one for one in now}
    pairs = [(one, measured.get((one.setting, one.against, one.work))) for one in before]
    p_values = [
        slower_p(old.ratios, new.ratios, tolerance) if new and not not_comparable else math.nan for old, new in pairs
    ]
    judged = iter(holm([p_value for p_value in p_values if not math.isnan(p_value)]))
    findings = []
    for (old, new), p_value in zip(pairs, p_values, strict=True):
        if not new:
            status, why = Status.OPEN, "not measured this time"
        elif math.isnan(p_value):
            status, why = Status.OPEN, not_comparable or f"it takes {LEAST_REPEATS} repeats to judge it"
        else:
            status, why = _verdict(old, new, tolerance, next(judged))
        findings.append(
            Finding(
                kind=Kind.THROUGHPUT,
                setting=old.setting,
                subject=f"against {old.against}",
                status=status,
                now=f"{_shown(new) if new else show.NOTHING}, was {_shown(old)} ({old.work})",
                why=why,
                must_settle=status is Status.OPEN and is_strict,
            )
        )
    return findings


def slower_p(before: Sequence[float], now: Sequence[float], tolerance: float) -> float:
    """One-sided p value of "the ratio fell by `tolerance` of it at most"; NaN where there are too few repeats."""
    if min(len(before), len(now)) < LEAST_REPEATS:
        return math.nan
    ours, theirs = np.log(now), np.log(before) + math.log1p(-tolerance)
    if np.ptp(ours) == 0 and np.ptp(theirs) == 0:
        return 0.0 if ours[0] < theirs[0] else 1.0
    return float(stats.ttest_ind(ours, theirs, equal_var=False, alternative="less").pvalue)


def _verdict(old: Speed, new: Speed, tolerance: float, p_value: float) -> tuple[Status, str]:
    fall = f"a fall of more than {tolerance:.0%}"
    if p_value < SIGNIFICANT:
        return Status.REGRESSION, f"{fall} is shown ({show.p_value(p_value)})"
    if _middle(new) >= _middle(old) * (1 - tolerance):
        return Status.PASS, f"{fall} is not seen"
    return Status.OPEN, f"{fall} is seen but may be chance ({show.p_value(p_value)})"


def _middle(speed: Speed) -> float:
    return float(np.exp(np.mean(np.log(speed.ratios))))


def _shown(speed: Speed) -> str:
    if speed.against in (BOUND, PREDICTION):
        return f"{_middle(speed):.0%}"
    return show.ratio(_middle(speed))


def _rate(setting: SettingResult) -> float:
    """Requests a second; 0 where none was answered now."""
    return setting.num_requests / setting.elapsed_s if setting.elapsed_s > 0 and not setting.num_resumed else 0.0


def _rates(system: SystemFigures) -> list[float]:
    """Requests a second in each repeat; the median one's is the system's own."""
    return [system.requests_per_s * system.elapsed_s / seconds for seconds in system.all_elapsed_s]


def _bound_s(system: SystemFigures) -> list[float]:
    return [phase.bounds[phase.bound].bound_s for phase in system.phases.values() if phase.bound]
