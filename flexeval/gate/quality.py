"""Whether answers got worse: a run's scores held against a baseline's, question by question.

**What fails.** A drop that is shown to be beyond the tolerance: non-inferiority turned round. For each setting, each
of its tasks and all of them together, the hypothesis is "the drop is at most the tolerance", and it takes its one-sided
rejection (`beyond_margin_p`) to fail. So a drop that is tolerated, and a run whose answers changed by chance alone,
fail at most one check in twenty, however many tasks there are: half of the 5 % is for the overall comparisons, half for
the tasks, and in each half p values are corrected by Holm's method. A drop that is seen but may be chance stays open:
it does not fail, and the finding says which drop so many questions would have shown (`detectable.py`).

**What passes.** Scores that are all the same, and an interval of the drop (95 %, two-sided) within the tolerance, as in
Piaggio et al. 2012, "Reporting of noninferiority and equivalence randomized trials", JAMA 308.

**What cannot be decided.** Changes among questions so few that losing all of them would show nothing; and, where the
user is strict, an overall comparison that stays open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flexeval.gate.baseline import Baseline, KeptTask
from flexeval.gate.detectable import detectable_drop
from flexeval.gate.findings import Finding, Kind, Status
from flexeval.report import format as show
from flexeval.report.averaging import averaged_tasks, task_weights
from flexeval.report.pairing import over_trials
from flexeval.report.statistics import SIGNIFICANT, beyond_margin_p, holm, paired_difference
from flexeval.results import TaskInfo

OVERALL = "overall"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTask:
    """One task's questions under one setting, before and now."""

    task: TaskInfo
    """What it is."""
    ids: tuple[str, ...]
    """Of the questions."""
    before: np.ndarray
    """Scores in the baseline."""
    now: np.ndarray
    """Scores of the run, in the same order."""

    @property
    def in_points(self) -> bool:
        """Whether scores lie in [0, 1] and more is better, so that they read as points of 100."""
        scores = np.concatenate([self.before, self.now])
        return self.task.higher_is_better and bool(((scores >= 0) & (scores <= 1)).all())

    @property
    def losses(self) -> list[float]:
        """How much worse each question is answered now, by trial where it has several."""
        return list(self.before - self.now if self.task.higher_is_better else self.now - self.before)

    @property
    def samples(self) -> list[float]:
        """How much worse each question is answered now, all its trials together."""
        return over_trials(self.ids, self.losses)


class _Comparison(NamedTuple):
    setting: str
    subject: str
    tasks: Sequence[PairedTask]
    weights: Sequence[float]
    margin: float
    p_value: float


def judge_quality(
    baseline: Baseline, run: Baseline, settings: Sequence[str], *, tolerance: float, is_strict: bool = False
) -> list[Finding]:
    """A finding for each setting overall and for each of its tasks.

    Args:
        baseline: What to hold the run against.
        run: The run; its questions that the baseline has are compared.
        settings: Which settings; both have them.
        tolerance: The drop that is accepted, as a share of 1; where scores are no points, as a share of the baseline's.
        is_strict: Whether an overall comparison that is not settled leaves the check without an answer.
    """
    alone: list[_Comparison] = []
    together: list[_Comparison] = []
    for setting in settings:
        tasks = paired_tasks(baseline, run, setting)
        alone += [_compared(setting, one.task.name, [one], tolerance) for one in tasks]
        if len(tasks) > 1 and (averaged := averaged_tasks(tasks)):
            together.append(_compared(setting, OVERALL, averaged, tolerance))
    num_families = bool(alone) + bool(together)
    findings = []
    for family in (together, alone):
        decides = family is together or not together
        alpha = SIGNIFICANT / num_families / max(1, len(family))
        for one, corrected in zip(family, holm([one.p_value for one in family]), strict=True):
            p_value = min(1.0, corrected * num_families)
            findings.append(_finding(one, p_value, alpha, decides=decides, is_strict=is_strict))
    order = {setting: rank for rank, setting in enumerate(settings)}
    return sorted(findings, key=lambda finding: order[finding.setting])


def paired_tasks(baseline: Baseline, run: Baseline, setting: str) -> list[PairedTask]:
    """The questions that both have, by task, with their scores under a setting."""
    ours, theirs = run.settings.index(setting), baseline.settings.index(setting)
    before: dict[str, KeptTask] = {kept.task.name: kept for kept in baseline.tasks}
    tasks = []
    for kept in run.tasks:
        known = before[kept.task.name].questions if kept.task.name in before else {}
        if ids := [name for name in kept.questions if name in known]:
            tasks.append(
                PairedTask(
                    task=kept.task,
                    ids=tuple(ids),
                    before=np.array([known[name].scores[theirs] for name in ids], dtype=float),
                    now=np.array([kept.questions[name].scores[ours] for name in ids], dtype=float),
                )
            )
    return tasks


def _compared(setting: str, subject: str, tasks: Sequence[PairedTask], tolerance: float) -> _Comparison:
    weights = task_weights(tasks)
    in_points = all(one.in_points for one in tasks)
    margin = tolerance if in_points else tolerance * abs(_mean([one.before for one in tasks], weights))
    p_value = beyond_margin_p([one.samples for one in tasks], weights, margin=margin, in_unit=in_points)
    return _Comparison(setting, subject, tasks, weights, margin, p_value)


def _finding(one: _Comparison, p_value: float, alpha: float, *, decides: bool, is_strict: bool) -> Finding:
    in_points = all(task.in_points for task in one.tasks)
    samples = [task.samples for task in one.tasks]
    flat = [loss for task in one.tasks for loss in task.losses]
    lost = tuple(
        name if one.subject != OVERALL else f"{task.task.name}/{name}"
        for task in one.tasks
        for name, loss in zip(task.ids, task.losses, strict=True)
        if loss > 0
    )
    num_gained = sum(loss < 0 for loss in flat)
    beyond = f"a drop of more than {_amount(one.margin, in_points)}"
    if not any(flat):
        status, why = Status.PASS, f"all {show.count(len(flat))} scores are the same"
    elif p_value < SIGNIFICANT:
        status, why = Status.REGRESSION, f"{beyond} is shown ({show.p_value(p_value)})"
    elif paired_difference(samples, one.weights, in_unit=in_points).high <= one.margin:
        status, why = Status.PASS, f"{beyond} is ruled out"
    else:
        status, why = Status.OPEN, f"{beyond} is not shown"
    least = math.nan
    if status is Status.OPEN or (status is Status.PASS and decides):
        least = detectable_drop(samples, one.weights, margin=one.margin, alpha=alpha, in_unit=in_points)
        why += f"; {_power_words(least, len(flat), in_points)}"
    before, now = (_mean([getattr(task, name) for task in one.tasks], one.weights) for name in ("before", "now"))
    change = "" if not any(flat) else f", {len(lost)} worse and {num_gained} better of {show.count(len(flat))}"
    return Finding(
        kind=Kind.QUALITY,
        setting=one.setting,
        subject=one.subject,
        status=status,
        now=f"{show.score(now, in_points=in_points)}, was {show.score(before, in_points=in_points)}{change}",
        why=why,
        lost=lost,
        must_settle=status is Status.OPEN and decides and (is_strict or math.isinf(least)),
    )


def _mean(scores: Sequence[np.ndarray], weights: Sequence[float]) -> float:
    return sum(weight * float(one.mean()) for one, weight in zip(scores, weights, strict=True))


def _amount(value: float, in_points: bool) -> str:
    if not in_points:
        return f"{value:.3g}"
    amount = f"{value * 100:.3g}"
    return f"{amount} point{'s' * (amount != '1')}"


def _power_words(least: float, num: int, in_points: bool) -> str:
    if math.isinf(least):
        return f"{show.count(num)} questions are too few to show any"
    if math.isnan(least):
        return "which drop would be shown is not known"
    return f"a drop of {_amount(least, in_points)} would be shown, four times out of five"
