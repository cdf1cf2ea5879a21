"""The gate's decisions against independent calculations, exact enumeration and thousands of simulated runs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from flexeval.gate.baseline import Baseline, KeptQuestion, KeptTask
from flexeval.gate.detectable import detectable_drop
from flexeval.gate.findings import Finding, Status
from flexeval.gate.quality import OVERALL, judge_quality
from flexeval.report.statistics import beyond_margin_p
from flexeval.results import TaskInfo

SIGNIFICANT = 0.05


def brute_force_p(changes):
    """All patterns of signs."""
    sums = np.array([np.dot(signs, changes) for signs in itertools.product((-1, 1), repeat=len(changes))])
    return (sums >= sum(changes) - 1e-12).mean()


def wald(lost, gained, num, margin):
    """Bonett and Price 2012 written out: one question more lost and one more gained; vectorised."""
    p_lost, p_gained = (lost + 1) / (num + 2), (gained + 1) / (num + 2)
    error = np.sqrt((p_lost + p_gained - (p_lost - p_gained) ** 2) / (num + 2))
    return stats.norm.sf((p_lost - p_gained - margin) / error)


@pytest.mark.parametrize(("lost", "gained", "num"), [(9, 1, 40), (30, 12, 100), (8, 0, 20), (160, 90, 1000)])
@pytest.mark.parametrize("margin", [0.0, 0.01, 0.05])
def test_right_or_wrong_answers_have_the_larger_of_two_p_values(lost, gained, num, margin):
    losses = [1.0] * lost + [-1.0] * gained + [0.0] * (num - lost - gained)
    exact = stats.binomtest(lost, lost + gained, alternative="greater").pvalue
    expected = max(exact, wald(lost, gained, num, margin))
    assert beyond_margin_p([losses], [1.0], margin=margin, in_unit=True) == pytest.approx(expected)


def test_graded_answers_have_the_larger_of_two_p_values():
    losses = np.random.default_rng(1).normal(0.1, 0.1, 12)
    students = stats.ttest_1samp(losses, 0.02, alternative="greater").pvalue
    expected = max(brute_force_p(losses), students)
    assert beyond_margin_p([list(losses)], [1.0], margin=0.02, in_unit=False) == pytest.approx(expected)


def test_several_tasks_have_the_larger_of_two_p_values():
    strata, weights = [[1.0] * 6 + [-1.0] + [0.0] * 13, [1.0] * 5 + [0.0] * 25], [0.75, 0.25]
    changes = [w * x / len(s) for s, w in zip(strata, weights, strict=True) for x in s if x]
    center = variance = 0.0
    for losses, weight in zip(strata, weights, strict=True):  # half a pair is added to each of two tasks
        total = len(losses) + 1
        lost, gained = (losses.count(1.0) + 0.5) / total, (losses.count(-1.0) + 0.5) / total
        center += weight * (lost - gained)
        variance += weight**2 * (lost + gained - (lost - gained) ** 2) / total
    expected = max(brute_force_p(changes), stats.norm.sf((center - 0.01) / math.sqrt(variance)))
    assert beyond_margin_p(strata, weights, margin=0.01, in_unit=True) == pytest.approx(expected)


@pytest.mark.parametrize("losses", [[0.0] * 50, [1.0, -1.0], [-1.0] * 30, [0.5]])
def test_no_drop_is_no_evidence(losses):
    assert beyond_margin_p([losses], [1.0], margin=0.0, in_unit=True) >= 0.5


def test_a_drop_of_the_same_size_everywhere_is_shown():
    assert beyond_margin_p([[0.1] * 20], [1.0], margin=0.01, in_unit=False) == pytest.approx(2**-20)
    assert beyond_margin_p([[0.1] * 20], [1.0], margin=0.2, in_unit=False) == 1


@pytest.mark.parametrize("num", [12, 40, 100])
@pytest.mark.parametrize("margin", [0.0, 0.01, 0.05])
def test_one_task_raises_false_alarms_as_seldom_as_stated(num, margin):
    """Every outcome counted, with its chance; up to six of ten answers change, and the drop is just tolerated."""
    lost, gained = np.meshgrid(np.arange(num + 1), np.arange(num + 1))
    p_value = np.maximum(stats.binom.sf(lost - 1, lost + gained, 0.5), wald(lost, gained, num, margin))
    fails = (p_value < SIGNIFICANT) & (lost + gained <= num)
    for gain in (0.0, 0.01, 0.05, 0.1, 0.2, 0.3):
        chance = stats.binom.pmf(gained, num, gain) * stats.binom.pmf(
            lost, np.maximum(num - gained, 0), (gain + margin) / (1 - gain)
        )
        assert (chance * fails).sum() <= SIGNIFICANT * 1.05  # the normal distribution stands for an exact one


# The gate on simulated runs: tasks of equal size and weight, so that all changes count alike.


def simulate(rng, num_runs, num_tasks, num_questions, *, gain, drop):
    """Losses and gains of each task in each run: [R, T]; `drop` may differ by task."""
    gained = rng.binomial(num_questions, gain, (num_runs, num_tasks))
    lost = rng.binomial(num_questions - gained, np.broadcast_to((gain + np.asarray(drop)) / (1 - gain), gained.shape))
    return lost, gained


def fails(lost, gained, num_questions, margin):
    """Which runs fail overall and at which tasks ([R], [R, T]): the rules of `quality.py` written out for arrays."""
    num_tasks = lost.shape[1]
    task_p = np.maximum(stats.binom.sf(lost - 1, lost + gained, 0.5), wald(lost, gained, num_questions, margin))
    order = np.sort(task_p, axis=1)
    holm = np.minimum(1, 2 * np.maximum.accumulate(order * (num_tasks - np.arange(num_tasks)), axis=1))
    fails_task = task_p <= np.where(holm < SIGNIFICANT, order, -1).max(axis=1, keepdims=True)

    all_lost, all_gained = lost.sum(axis=1), gained.sum(axis=1)
    total = num_questions + 2 / num_tasks
    p_lost, p_gained = (lost + 1 / num_tasks) / total, (gained + 1 / num_tasks) / total
    variance = ((p_lost + p_gained - (p_lost - p_gained) ** 2) / total).sum(axis=1) / num_tasks**2
    center = (p_lost - p_gained).mean(axis=1)
    wald_p = stats.norm.sf((center - margin) / np.sqrt(variance))
    overall_p = np.maximum(stats.binom.sf(all_lost - 1, all_lost + all_gained, 0.5), wald_p)
    fails_overall = (2 * overall_p < SIGNIFICANT) & ((all_lost - all_gained) / num_questions / num_tasks > margin)
    return fails_overall, fails_task & ((lost - gained) / num_questions > margin)


def gate(lost, gained, num_questions, margin) -> list[Finding]:
    """What the gate itself finds in one of these runs."""

    def kept(now: bool) -> Baseline:
        tasks = []
        for number, (num_lost, num_gained) in enumerate(zip(lost, gained, strict=True)):
            before = [1] * num_lost + [0] * (num_questions - num_lost)
            after = [0] * num_lost + [1] * num_gained + [0] * (num_questions - num_lost - num_gained)
            questions = {
                f"id{index}": KeptQuestion(asked="x", scores=[score])
                for index, score in enumerate(after if now else before)
            }
            info = TaskInfo(name=f"task {number}", metric="exact_match", split="test", group=f"group {number}")
            tasks.append(KeptTask(task=info, questions=questions))
        nothing = {"suite": "s", "model": "m", "model_note": "", "created": "", "machine": {}, "versions": {}}
        return Baseline(**nothing, settings=["none"], tasks=tasks)

    return judge_quality(kept(False), kept(True), ["none"], tolerance=margin)


def test_the_gate_decides_as_the_rules_written_out_for_arrays():
    rng = np.random.default_rng(0)
    for drop in (0.0, 0.05, 0.15, 0.3):
        lost, gained = simulate(rng, 8, 4, 30, gain=0.05, drop=[drop, 0.0, drop, 0.02])
        fails_overall, fails_task = fails(lost, gained, 30, 0.01)
        for run in range(len(lost)):
            findings = {one.subject: one.status is Status.REGRESSION for one in gate(lost[run], gained[run], 30, 0.01)}
            expected = {OVERALL: fails_overall[run]} | {f"task {i}": fails_task[run, i] for i in range(4)}
            assert findings == expected


@pytest.mark.parametrize(("num_tasks", "num_questions"), [(9, 5), (9, 40), (40, 100), (2, 500)])
@pytest.mark.parametrize("gain", [0.0, 0.02, 0.1, 0.25])
@pytest.mark.parametrize("drop", [0.0, 0.01])
def test_false_alarms_of_a_whole_check_are_at_most_five_percent(num_tasks, num_questions, gain, drop):
    """Answers that flip by chance, and drops that are just tolerated: every comparison of a run counts."""
    num_runs = 4_000
    lost, gained = simulate(np.random.default_rng(1), num_runs, num_tasks, num_questions, gain=gain, drop=drop)
    fails_overall, fails_task = fails(lost, gained, num_questions, 0.01)
    alarms = (fails_overall | fails_task.any(axis=1)).mean()
    assert alarms <= SIGNIFICANT + 2.6 * math.sqrt(SIGNIFICANT * (1 - SIGNIFICANT) / num_runs)


@pytest.mark.parametrize(("num_tasks", "num_questions"), [(9, 20), (9, 40), (40, 100), (2, 500)])
@pytest.mark.parametrize("gain", [0.0, 0.02, 0.1])
def test_a_drop_of_the_stated_size_is_caught_four_times_out_of_five(num_tasks, num_questions, gain):
    """At all tasks by the overall comparison, at one of them by that task's."""
    rng, margin, num_runs = np.random.default_rng(2), 0.01, 4_000
    error = 2.6 * math.sqrt(0.8 * 0.2 / num_runs)
    chance = [-1.0] * round(gain * num_questions)
    losses = chance + [1.0] * len(chance) + [0.0] * (num_questions - 2 * len(chance))
    gain = len(chance) / num_questions

    half = SIGNIFICANT / 2
    weights = [1 / num_tasks] * num_tasks
    drop = detectable_drop([losses] * num_tasks, weights, margin=margin, alpha=half, in_unit=True)
    lost, gained = simulate(rng, num_runs, num_tasks, num_questions, gain=gain, drop=drop)
    assert fails(lost, gained, num_questions, margin)[0].mean() >= 0.8 - error

    drop = detectable_drop([losses], [1.0], margin=margin, alpha=half / num_tasks, in_unit=True)
    lost, gained = simulate(rng, num_runs, num_tasks, num_questions, gain=gain, drop=[drop] + [0] * (num_tasks - 1))
    assert fails(lost, gained, num_questions, margin)[1][:, 0].mean() >= 0.8 - error


def test_so_few_questions_show_nothing():
    assert detectable_drop([[0.0] * 4], [1.0], margin=0.01, alpha=0.05, in_unit=True) == math.inf
    assert 0.5 < detectable_drop([[0.0] * 8], [1.0], margin=0.01, alpha=0.05, in_unit=True) < 1


def test_nothing_is_stated_of_scores_without_a_range_that_did_not_change():
    assert math.isnan(detectable_drop([[0.0] * 40], [1.0], margin=0.01, alpha=0.05, in_unit=False))
    tiny = [[1e-100, 2e-100, 3e-100] * 5]  # their variances multiply to nothing
    assert detectable_drop(tiny, [1.0], margin=0.01, alpha=0.05, in_unit=False) == pytest.approx(0.01)


def test_the_drop_stated_for_graded_scores_is_caught():
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 0.2, 200)
    drop = detectable_drop([list(noise - noise.mean())], [1.0], margin=0.01, alpha=0.05, in_unit=False)
    runs = drop + rng.normal(0, 0.2, (2_000, 200))
    p_values = stats.ttest_1samp(runs, 0.01, axis=1, alternative="greater").pvalue
    assert 0.8 <= (p_values < 0.05).mean() <= 0.9


def test_a_drop_of_the_size_stated_for_graded_scores_is_caught_four_times_out_of_five():
    """The spread is known from twelve questions alone, in each run from other ones."""
    rng, margin, caught = np.random.default_rng(3), 0.008, []
    for _ in range(100):
        pilot, noise = rng.normal(0, 0.01, (2, 12))
        drop = detectable_drop([list(pilot)], [1.0], margin=margin, alpha=SIGNIFICANT, in_unit=False)
        caught.append(beyond_margin_p([list(noise + drop)], [1.0], margin=margin, in_unit=False) < SIGNIFICANT)
    assert np.mean(caught) >= 0.8
