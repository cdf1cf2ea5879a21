"""Intervals and tests against independent calculations: brute force, other formulas, scipy's own tests, simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from flexeval.report.resampling import bootstrap, sign_flip_p
from flexeval.report.statistics import (
    Estimate,
    Z,
    clustered_mean,
    holm,
    mean,
    paired_difference,
    questions_to_settle,
    smallest_seen,
    weighted_sum,
)


def brute_force_p(differences):
    observed = abs(sum(differences))
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    return np.mean(np.array(sums) >= observed - 1e-12)


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", Stat. Med. 17, table I, method 3.
@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_right_or_wrong_scores_have_wilsons_interval(right, total, low, high):
    estimate = mean([1.0] * right + [0.0] * (total - right), in_unit=True)
    assert (estimate.value, estimate.num) == (right / total, total)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)


def test_graded_scores_have_students_interval():
    scores = np.random.default_rng(1).normal(3, 2, 25)
    expected = stats.ttest_1samp(scores, 0).confidence_interval(0.95)
    estimate = mean(list(scores), in_unit=False)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(expected))


def test_an_interval_of_scores_in_the_unit_range_stays_there():
    assert mean([1.0, 1.0, 0.9], in_unit=True).high == 1.0
    assert mean([1.0, 1.0, 0.9], in_unit=False).high > 1.0


@pytest.mark.parametrize("scores", [[0.3], [0.1, 0.1, 0.1]])
def test_scores_without_spread_have_no_interval(scores):
    estimate = mean(scores, in_unit=True)
    assert math.isnan(estimate.low) and math.isnan(estimate.high)


def test_paired_difference_of_graded_scores_is_students_paired_interval():
    random = np.random.default_rng(2)
    ours, theirs = random.uniform(size=30), random.uniform(size=30)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    estimate = paired_difference([list(ours - theirs)], [1.0], in_unit=True)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(expected))


def test_paired_difference_of_right_or_wrong_scores_is_bonett_and_prices():
    # 3 gained, 9 lost of 50: (4 - 10) / 52 -+ 1.96 sqrt((14/52 - (6/52)^2) / 52), by hand.
    differences = [1.0] * 3 + [-1.0] * 9 + [0.0] * 38
    estimate = paired_difference([differences], [1.0], in_unit=True)
    assert estimate.value == pytest.approx(-6 / 50)
    assert (estimate.low, estimate.high) == pytest.approx((-0.25288, 0.02211), abs=1e-5)


def test_no_change_still_leaves_room_for_one():
    few, many = (paired_difference([[0.0] * num], [1.0], in_unit=True) for num in (10, 1000))
    assert few.value == 0
    assert few.low == -few.high < -0.2
    assert many.low == -many.high > -0.005
    unbounded = paired_difference([[0.0] * 10], [1.0], in_unit=False)
    assert math.isnan(unbounded.low)


def test_one_stratum_without_spread_leaves_the_sum_without_interval():
    estimate = paired_difference([[0.25], [1.0, 0.0, -1.0]], [0.5, 0.5], in_unit=True)
    assert estimate.value == pytest.approx(0.125) and math.isnan(estimate.low)


def test_welchs_interval_is_the_case_of_two_graded_strata():
    random = np.random.default_rng(3)
    one, two = random.normal(0, 1, 12), random.normal(0.5, 3, 20)
    expected = stats.ttest_ind(one, -two, equal_var=False).confidence_interval(0.95)
    estimate = paired_difference([list(one), list(two)], [1.0, 1.0], in_unit=False)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("seed", range(5))
def test_few_graded_changes_are_tested_exactly(seed):
    differences = list(np.random.default_rng(seed).normal(0.4, 1, 9).round(3))
    assert sign_flip_p([*differences, 0.0, 0.0]) == pytest.approx(brute_force_p(differences))


def test_many_graded_changes_are_tested_by_resampling():
    differences = list(np.random.default_rng(5).normal(0.35, 1, 16))
    assert sign_flip_p(differences) == pytest.approx(brute_force_p(differences), abs=0.01)
    assert sign_flip_p(differences) == sign_flip_p(differences)


@pytest.mark.parametrize(("gained", "lost"), [(0, 1), (1, 8), (5, 5), (30, 12), (0, 20)])
def test_changes_of_one_size_are_mcnemars_exact_test(gained, lost):
    num = gained + lost
    tail = sum(math.comb(num, k) for k in range(min(gained, lost) + 1)) / 2**num
    assert sign_flip_p([0.02] * gained + [-0.02] * lost + [0.0] * 7) == pytest.approx(min(1.0, 2 * tail))


def test_p_values_smaller_than_resampling_can_tell_are_bounded_by_hoeffding():
    """Of many comparisons one that is beyond doubt must stay so after a correction for all of them."""
    changes = list(np.random.default_rng(5).uniform(0.2, 0.9, 60))
    for alternative, exact in (("two-sided", 2.0**-59), ("greater", 2.0**-60)):
        p_value = sign_flip_p(changes, alternative)
        assert exact <= p_value < 1e-9
    assert sign_flip_p([-change for change in changes], "greater") == pytest.approx(1)
    for seed in range(20):  # a bound is never below what it bounds
        few = list(np.random.default_rng(seed).normal(0.8, 0.6, 12))
        assert sign_flip_p(few) >= brute_force_p(few) - 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_the_bootstrap_is_that_of_scipy(seed):
    differences = np.random.default_rng(seed).choice([-1.0, 0.0, 0.25, 1.0], size=80)
    theirs = stats.bootstrap((differences,), np.mean, method="percentile", rng=np.random.default_rng(1))
    low, high = bootstrap([list(differences)], [1.0])
    step = 1 / 80
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=1.1 * step)


def test_the_bootstrap_draws_each_task_apart_and_weighs_it():
    strata = [list(np.random.default_rng(6).normal(0.1, 0.3, size)) for size in (300, 40)]
    low, high = bootstrap(strata, [0.25, 0.75])
    error = math.hypot(0.25 * np.std(strata[0]) / math.sqrt(300), 0.75 * np.std(strata[1]) / math.sqrt(40))
    center = 0.25 * np.mean(strata[0]) + 0.75 * np.mean(strata[1])
    assert (low, high) == pytest.approx((center - Z * error, center + Z * error), rel=0.1)
    assert bootstrap(strata, [0.25, 0.75]) == (low, high)
    assert math.isnan(bootstrap([[1.0]], [1.0]).low)


def test_a_bootstrap_of_few_changes_is_too_short_and_the_interval_of_verdicts_is_not():
    random = np.random.default_rng(8)
    draws = random.choice([-1.0, 0.0, 1.0], p=[0.05, 0.93, 0.02], size=(300, 40))
    drawn = [bootstrap([list(draw)], [1.0]) for draw in draws]
    assert np.mean([low <= -0.03 <= high for low, high in drawn]) < 0.9
    assert coverage([paired_difference([list(draw)], [1.0], in_unit=True) for draw in draws], -0.03) >= 0.94


def test_no_change_is_no_evidence():
    assert sign_flip_p([0.0, 0.0]) == 1.0


def test_weighted_sum_adds_distances_in_squares():
    one = Estimate(value=0.5, low=0.2, high=0.6, num=10)
    two = Estimate(value=0.3, low=0.2, high=0.7, num=20)
    total = weighted_sum([one, two], [0.5, 0.25])
    assert total.value == pytest.approx(0.325)
    assert total.low == pytest.approx(0.325 - math.hypot(0.5 * 0.3, 0.25 * 0.1))
    assert total.high == pytest.approx(0.325 + math.hypot(0.5 * 0.1, 0.25 * 0.4))
    assert total.num == 30


def test_holm_on_his_worked_pattern():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("estimate", "true_loss"), [(0.0, 0.0), (-3.0, 0.0), (5.0, 5.0), (8.0, 5.0), (2.0, 2.0), (2.5, 2.5)]
)
def test_so_many_questions_settle_a_loss_four_times_out_of_five(estimate, true_loss):
    loss = Estimate(value=estimate, low=estimate - 9.8, high=estimate + 9.8, num=100)
    num = questions_to_settle(loss, 5.0)
    half = 9.8 * math.sqrt(100 / num)
    draws = np.random.default_rng(6).normal(true_loss, half / Z, 20_000)
    assert np.mean((draws - half > 0) | (draws + half <= 5)) >= 0.795


def test_no_more_questions_are_asked_for_than_it_takes():
    loss = Estimate(value=0.0, low=-9.8, high=9.8, num=100)
    half = 9.8 * math.sqrt(100 / questions_to_settle(loss, 5.0))
    draws = np.random.default_rng(6).normal(0, half / Z, 20_000)
    assert np.mean(draws + half <= 5) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("value", [-6.0, 0.0, 1.0, 2.5, 4.0, 9.0])
def test_what_is_not_settled_takes_more_questions(value):
    half = max(value, 5 - value) + 0.01  # reaches over both zero and the margin
    loss = Estimate(value=value, low=value - half, high=value + half, num=100)
    assert questions_to_settle(loss, 5.0) > 100


def test_an_unknown_spread_or_no_margin_gives_no_number_of_questions():
    assert math.isnan(questions_to_settle(Estimate(value=0, low=math.nan, high=math.nan, num=1), 0.05))
    assert math.isnan(questions_to_settle(Estimate(value=0, low=-1, high=1, num=9), 0.0))


def coverage(intervals, truth):
    return np.mean([interval.low <= truth <= interval.high for interval in intervals])


def test_intervals_of_means_hold_the_truth_95_times_of_100():
    random = np.random.default_rng(7)
    for truth in (0.1, 0.5, 0.85):
        draws = (random.random((400, 60)) < truth).astype(float)
        assert 0.92 <= coverage([mean(list(draw), in_unit=True) for draw in draws], truth) <= 0.99


@pytest.mark.parametrize(("num_tasks", "num_questions"), [(1, 40), (1, 200), (12, 20)])
def test_intervals_of_paired_differences_hold_the_truth_95_times_of_100(num_tasks, num_questions):
    random = np.random.default_rng(8)
    weights = [1 / num_tasks] * num_tasks
    draws = random.choice([-1.0, 0.0, 1.0], p=[0.09, 0.87, 0.04], size=(400, num_tasks, num_questions))
    intervals = [paired_difference(list(draw), weights, in_unit=True) for draw in draws]
    assert 0.93 <= coverage(intervals, 0.04 - 0.09) <= 0.985


def test_no_more_than_five_false_alarms_in_a_hundred():
    random = np.random.default_rng(9)
    graded = [sign_flip_p(list(draw)) for draw in random.normal(0, 1, (400, 10))]
    assert np.mean(np.array(graded) < 0.05) == pytest.approx(0.05, abs=0.025)
    flips = [sign_flip_p(list(draw)) for draw in random.choice([-1, 0, 1], p=[0.1, 0.8, 0.1], size=(400, 100))]
    assert 0 < np.mean(np.array(flips) < 0.05) <= 0.06


def test_positions_of_one_question_count_as_one_sample():
    random = np.random.default_rng(3)
    means = random.normal(size=40)
    values = np.repeat(means, 25) + random.normal(scale=0.01, size=1000)
    one = clustered_mean(values, np.repeat(np.arange(40), 25))
    assert one.value == pytest.approx(values.mean())
    assert one.error == pytest.approx(stats.sem(means), rel=0.02), "as of 40 questions, not of 1000 positions"
    assert clustered_mean(means, np.arange(40)).error == pytest.approx(stats.sem(means))
    assert clustered_mean(means, np.zeros(40)).error is None


def test_the_clustered_error_is_the_spread_of_means_over_samples_of_questions():
    random = np.random.default_rng(4)
    sizes = random.integers(1, 30, size=(2000, 60))
    means, errors = [], []
    for row in sizes:
        clusters = np.repeat(np.arange(60), row)
        values = random.normal(size=60)[clusters] + random.exponential(size=clusters.size)
        found = clustered_mean(values, clusters)
        means.append(found.value)
        errors.append(found.error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)


# --- by hand: nothing of scipy's ---


@pytest.mark.parametrize(("gained", "lost"), [(0, 1), (1, 9), (3, 14), (20, 20), (30, 55)])
def test_mcnemars_p_value_counts_the_tosses_that_are_as_lopsided(gained, lost):
    num = gained + lost
    ways = [math.comb(num, heads) for heads in range(num + 1)]
    expected = sum(way for way in ways if way <= ways[gained]) / 2**num
    assert sign_flip_p([1.0] * gained + [-1.0] * lost + [0.0] * 40) == pytest.approx(expected)


def test_an_interval_of_a_difference_is_about_that_of_a_bootstrap():
    """Efron 1979: questions are drawn again, with replacement; both of a task and of a mean over tasks."""
    random = np.random.default_rng(5)
    strata = [random.choice([-1.0, 0.0, 1.0], size=size, p=[0.15, 0.75, 0.1]) for size in (300, 150)]
    strata.append(random.normal(-0.05, 0.2, 200))
    for chosen, weights in (([strata[0]], [1.0]), (strata, [0.5, 0.3, 0.2])):
        draws = [
            sum(
                weight * stratum[random.integers(stratum.size, size=stratum.size)].mean()
                for stratum, weight in zip(chosen, weights, strict=True)
            )
            for _ in range(4000)
        ]
        low, high = np.percentile(draws, [2.5, 97.5])
        found = paired_difference([list(one) for one in chosen], weights, in_unit=len(chosen) == 1)
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_a_drop_of_the_smallest_size_that_is_seen_is_detected_four_times_out_of_five():
    random = np.random.default_rng(6)
    num, gain = 400, 0.08
    quiet = [0.0] * (num - 64) + [1.0] * 32 + [-1.0] * 32
    drop = smallest_seen(paired_difference([quiet], [1.0], in_unit=True))
    assert 0.04 < drop < 0.08
    outcomes = random.choice([1.0, -1.0, 0.0], size=(400, num), p=[gain - drop / 2, gain + drop / 2, 1 - 2 * gain])
    detected = np.mean([sign_flip_p(list(one)) < 0.05 for one in outcomes])
    assert 0.7 < detected < 0.86


def test_one_of_many_comparisons_is_detected_four_times_out_of_five_at_a_larger_drop():
    random = np.random.default_rng(6)
    num, gain, num_others = 400, 0.08, 9
    quiet = [0.0] * (num - 64) + [1.0] * 32 + [-1.0] * 32
    loss = paired_difference([quiet], [1.0], in_unit=True)
    drop = smallest_seen(loss, 1 + num_others)
    outcomes = random.choice([1.0, -1.0, 0.0], size=(400, num), p=[gain - drop / 2, gain + drop / 2, 1 - 2 * gain])
    detected = np.mean([holm([sign_flip_p(list(one)), *[0.5] * num_others])[0] < 0.05 for one in outcomes])
    assert drop > 1.2 * smallest_seen(loss)
    assert 0.7 < detected < 0.88


def test_of_an_unknown_spread_it_is_not_known_what_is_seen():
    assert math.isnan(smallest_seen(Estimate(value=0.0, low=math.nan, high=math.nan, num=1)))
