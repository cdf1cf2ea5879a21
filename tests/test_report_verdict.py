"""What the report says in words, and how it writes numbers."""

import math
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from synthetic_results import TASKS, synthetic

from flexeval.report import format as show
from flexeval.report.answer import answer, choice
from flexeval.report.compare import compare
from flexeval.report.merge import merge
from flexeval.report.statistics import Estimate, paired_difference, sign_flip_p
from flexeval.report.verdict import Kind, verdicts

MINUS, X = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


@cache
def blank(num_settings):
    runs = [synthetic(settings=["none"], num_questions=2, name=str(number)) for number in range(num_settings)]
    return compare(merge(runs))


def judged(**settings):
    """A comparison of `none` with settings of a given (speedup, memory ratio, low, high, p value); points of 100."""
    base, *rows = blank(1 + len(settings)).settings
    made = [replace(base, result=replace(base.result, setting="none"))]
    for row, (name, (speedup, memory_ratio, low, high, p_value)) in zip(rows, settings.items(), strict=True):
        value = 0.0 if math.isnan(low) else (low + high) / 200
        estimate = Estimate(value=value, low=low / 100, high=high / 100, num=375)
        made.append(
            replace(
                row,
                result=replace(row.result, setting=name),
                speedup=speedup,
                memory_ratio=memory_ratio,
                difference=replace(row.difference, estimate=estimate, corrected_p=p_value),
            )
        )
    return replace(blank(1 + len(settings)), settings=tuple(made))


def kinds(comparison):
    return {verdict.setting: verdict.kind for verdict in verdicts(comparison)}


SAFE, UNSETTLED = (-1.0, 1.2, 0.9), (-10.8, 0.7, 0.08)
SLIGHT, WORSE, UNKNOWN = (-2.0, -0.4, 0.004), (-12.0, -4.0, 0.001), (math.nan, math.nan, 1.0)
NOT_ABOVE_FIVE = "a quality loss of more than 5 points is ruled out."


def test_a_setting_that_is_safe_and_faster_is_recommended_with_its_interval():
    assert answer(judged(w4=(3.0, 1.5, *SAFE))) == [
        f"Use w4 (3.00{X} as fast, 1.50{X} less memory): {NOT_ABOVE_FIVE}",
        f"Its quality against none: +0.1 points (95% interval {MINUS}1.0 to +1.2, p = 0.90, n = 375).",
    ]


def test_a_loss_that_is_not_ruled_out_is_a_reason_to_stay():
    comparison = judged(w4=(1.03, 1.53, *UNSETTLED))
    assert kinds(comparison) == {"none": Kind.BASELINE, "w4": Kind.UNSETTLED}
    assert answer(comparison) == [
        "Stay with none for now: w4 may lose more than 5 points, up to 10.8.",
        f"Its quality against none: {MINUS}5.1 points (95% interval {MINUS}10.8 to +0.7, p = 0.080, n = 375).",
        f"It uses 1.53{X} less memory but is not clearly faster (1.03{X}); "
        "about 1,100 questions would settle whether it loses 5 points.",
    ]


@pytest.mark.parametrize(
    ("settings", "first", "last"),
    [
        # nothing to gain
        ({"w4": (1.03, 1.05, *SAFE)}, "Stay with none: no other setting was measured to be clearly", "A switch should"),
        ({"w4": (1.03, 1.05, *UNSETTLED)}, "Stay with none: no other setting was measured", "A switch should bring"),
        ({"w4": (None, None, *SAFE)}, "Stay with none: no other setting was measured", "A switch should bring"),
        ({"w8": (0.9, 1.0, 1.0, 5.0, 0.01)}, "Stay with none: no other", "w8 gains quality, though: +3.0 points"),
        # memory alone
        (
            {"w4": (0.5, 1.5, *SAFE)},
            f"Use w4 if memory is short (0.50{X} as fast, 1.50{X} less memory): {NOT_ABOVE_FIVE}",
            "Otherwise stay with none: nothing as safe is clearly faster.",
        ),
        (
            {"w4": (1.0, 1.5, *SAFE), "kv4": (2.0, 1.0, *UNSETTLED)},
            f"Use w4 if memory is short (1.00{X} as fast, 1.50{X} less memory)",
            f"kv4 is faster (2.00{X}), but may lose more than 5 points, up to 10.8.",
        ),
        # several settings
        ({"w8": (1.5, 1.2, *SAFE), "w4": (3.0, 2.0, *SAFE)}, f"Use w4 (3.00{X}", "Its quality against none"),
        (
            {"w8": (1.5, 2.5, *SAFE), "w4": (3.0, 2.0, *SAFE)},
            "Use w4",
            f"If memory is short, w8 is as safe: 2.50{X} less",
        ),
        ({"w8": (1.5, 1.2, *SAFE), "w4": (3.0, 2.0, *WORSE)}, f"Use w8 (1.50{X}", "Its quality against none"),
        ({"w8": (1.5, 1.2, *SAFE), "w4": (3.0, 2.0, *UNSETTLED)}, f"Use w8 (1.50{X}", f"w4 is faster (3.00{X}), but"),
        ({"w8": (1.5, 1.2, *SAFE), "w4": (1.6, 2.0, *UNSETTLED)}, f"Use w8 (1.50{X}", "Its quality against none"),
        (
            {"w8": (1.5, 1.2, -6.0, 2.0, 0.3), "w4": (3.0, 2.0, *UNSETTLED), "kv4": (1.2, 1.0, *WORSE)},
            "Stay with none for now: for every faster or smaller setting, a loss of more than 5 points is possible.",
            f"It is 1.50{X} as fast and uses 1.20{X} less memory; about",
        ),
        (
            {"w8": (1.0, 1.0, *SAFE), "w4": (3.0, 2.0, *UNSETTLED)},
            "Stay with none for now: w4 may lose",
            f"It is 3.00{X}",
        ),
        # losses
        (
            {"w4": (3.0, 0.5, *WORSE)},
            "Stay with none: w4 loses quality.",
            f"In return it is 3.00{X} as fast but uses 2.00{X} more",
        ),
        (
            {"w4": (3.0, 2.0, *WORSE), "w3": (4.0, 3.0, *WORSE)},
            "Stay with none: every other setting loses",
            f"In return it is 3.00{X}",
        ),
        (
            {"w8": (1.0, 1.0, *SAFE), "w4": (3.0, 2.0, *WORSE), "w3": (4.0, 3.0, -30, -20, 0.001)},
            "Stay with none: every faster or smaller setting loses quality.",
            f"In return it is 3.00{X} as fast and uses 2.00{X} less memory.",
        ),
        (
            {"w4": (3.0, 1.0, *SLIGHT), "w3": (4.0, 1.0, *UNSETTLED)},
            f"Stay with none, or accept a small loss with w4 (3.00{X} as fast, the same memory): {NOT_ABOVE_FIVE}",
            f"Its quality against none: {MINUS}1.2 points (95% interval {MINUS}2.0 to {MINUS}0.4, p = 0.004, n = 375).",
        ),
        ({"w8": (1.2, 1.0, *SAFE), "w4": (3.0, 1.0, *SLIGHT)}, f"Use w8 (1.20{X}", "Its quality against none"),
        # no interval
        (
            {"w4": (0.5, 2.0, *UNKNOWN)},
            "Stay with none for now: w4 may lose more than these questions can show.",
            f"It uses 2.00{X} less memory but is slower (0.50{X}).",
        ),
    ],
)
def test_the_answer_weighs_quality_speed_and_memory(settings, first, last):
    sentences = answer(judged(**settings))
    assert sentences[0].startswith(first) and sentences[-1].startswith(last), sentences
    assert len(sentences) <= 3 and not any("nan" in sentence for sentence in sentences)


def test_a_whole_run_is_judged():
    comparison = compare(synthetic())
    assert kinds(comparison) == {"none": Kind.BASELINE, "w4": Kind.SAME, "w4-g32": Kind.WORSE, "w4-g128": Kind.WORSE}
    row = comparison.settings[1]
    first, second = answer(comparison)
    assert first == f"Use w4 ({show.ratio(row.speedup)} as fast, {show.ratio(61 / 20)} less memory): {NOT_ABOVE_FIVE}"
    assert show.interval(row.difference.estimate, in_points=True, signed=True) in second


def test_no_detectable_difference_is_said_only_inside_the_margin_and_with_the_interval():
    for low, kind in ((-4.9, Kind.SAME), (-5.1, Kind.UNSETTLED)):
        comparison = judged(w4=(2.0, 2.0, low, 4.0, 0.8))
        verdict = verdicts(comparison)[1]
        assert verdict.kind == kind and str(kind) in verdict.sentence
        assert (
            show.interval(comparison.settings[1].difference.estimate, in_points=True, signed=True) in verdict.sentence
        )
        assert "n = 375" in verdict.sentence


def test_on_another_scale_the_margin_is_a_share_of_the_baselines_score():
    comparison = judged(w4=(2.0, 2.0, -4.0, 4.0, 0.8), w3=(3.0, 3.0, -4.0, 60.0, 0.8))
    tasks = tuple(replace(row, task=replace(row.task, metric="perplexity")) for row in comparison.tasks)
    quality = replace(comparison.settings[0].quality, value=10.0, low=9.0, high=11.0)
    base = replace(comparison.settings[0], quality=quality)
    rows = (base, *comparison.settings[1:])
    comparison = replace(comparison, settings=rows, tasks=tasks, in_points=False, higher_is_better=False)
    assert kinds(comparison) == {"none": Kind.BASELINE, "w4": Kind.SAME, "w3": Kind.UNSETTLED}
    first, _, third = answer(comparison)
    assert first.endswith("a quality loss of more than 0.5 perplexity is ruled out.")
    assert third == f"w3 is faster (3.00{X}), but may lose more than 0.5 perplexity, up to 0.6."


def test_a_setting_that_changes_nothing_is_not_called_faster():
    first, *_ = answer(compare(merge([synthetic(settings=["none"], name="a"), synthetic(settings=["none"], name="b")])))
    assert first == "Stay with a/none: no other setting was measured to be clearly faster or smaller."


def test_a_few_questions_recommend_nothing():
    first, second, third = answer(compare(synthetic(settings=["none", "w4"], num_questions=4)))
    assert first.startswith("Stay with none for now: w4 may lose more than 5 points, up to ") and "n = 24" in second
    assert re.search(r"; about \d{2}0 questions would settle whether it loses 5 points\.$", third)
    one = synthetic(settings=["none", "w4"], num_questions=1, tasks=TASKS[:1])
    one = replace(one, instances=[one.instances[0], replace(one.instances[1], score=0.123)])
    assert answer(compare(one))[0] == "Stay with none for now: w4 may lose more than these questions can show."


def test_a_gain_is_called_a_gain():
    results = synthetic(settings=["none", "w4-g128"], num_questions=100)
    swap = {"none": "w4-g128", "w4-g128": "none"}
    instances = [replace(one, setting=swap[one.setting]) for one in results.instances]
    assert verdicts(compare(replace(results, instances=instances)))[1].kind == Kind.BETTER


def share_recommended(true_loss, num_questions, num_tasks, num_runs=400):
    """How often a setting twice as fast is recommended that mends 4 of 100 answers and spoils as many and the loss."""
    template = judged(w4=(2.0, 2.0, *SAFE))
    odds = [0.04 + true_loss, 0.92 - true_loss, 0.04]
    draws = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], p=odds, size=(num_runs, num_tasks, num_questions))
    num_recommended = 0
    for draw in draws:
        difference = replace(
            template.settings[1].difference,
            estimate=paired_difference(list(draw), [1 / num_tasks] * num_tasks, in_unit=True),
            p_value=sign_flip_p(list(draw.ravel())),
        )
        rows = (template.settings[0], replace(template.settings[1], difference=difference))
        num_recommended += answer(replace(template, settings=rows))[0].startswith("Use w4")
    return num_recommended / num_runs


@pytest.mark.parametrize(("num_questions", "num_tasks"), [(600, 1), (100, 6), (40, 20)])
def test_equal_settings_are_recommended_if_the_questions_are_many(num_questions, num_tasks):
    assert share_recommended(0.0, num_questions, num_tasks) > 0.9


@pytest.mark.parametrize(("num_questions", "num_tasks"), [(20, 1), (60, 1), (150, 1), (400, 1), (1200, 1), (40, 9)])
def test_a_true_loss_of_six_points_is_hardly_ever_recommended(num_questions, num_tasks):
    assert share_recommended(0.06, num_questions, num_tasks) <= 0.025


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (show.score(0.6134, in_points=True), "61.3"),
        (show.score(12.3456, in_points=False), "12.3"),
        (show.change(-0.004, in_points=True), "\N{MINUS SIGN}0.4"),
        (show.change(0.0001, in_points=True), "0.0"),
        (show.change(-0.0001, in_points=True), "0.0"),
        (
            show.interval(Estimate(value=0.1, low=-0.02, high=0.2, num=9), in_points=True, signed=True),
            "\N{MINUS SIGN}2.0 to +20.0",
        ),
        (show.p_value(0.0004), "p < 0.001"),
        (show.p_value(0.0312), "p = 0.031"),
        (show.rough_count(1_010.2), "1,100"),
        (show.rough_count(1_100), "1,100"),
        (show.rough_count(99.2), "100"),
        (show.rough_count(7.5), "8"),
        (show.rough_count(12_345_678), "13,000,000"),
        (show.digits(1234.6), "1,235"),
        (show.digits(0.0123), "0.0123"),
        (show.digits(9.999), "10.00"),
        (show.digits(0), "0"),
        (show.seconds(185), "3 min 05 s"),
        (show.seconds(7800), "2 h 10 min"),
        (show.seconds(0.42), "0.420 s"),
        (show.visible("a\tb\nc\x00\u202e\u200d"), "a\tb\nc\\u0000\\u202e\u200d"),
        (show.rate_unit([0.2, 0.01]), (60, "min")),
        (show.rate_unit([3.0, 0.01]), (1, "s")),
        (show.rate_unit([0.00001]), (3600, "h")),
        (show.rate_unit([]), (1, "s")),
    ],
)
def test_numbers_are_shown_as_people_read_them(text, expected):
    assert text == expected


def test_the_setting_that_the_answer_names_is_the_chosen_one():
    def chosen(**settings):
        found = choice(judged(**settings))
        return found and (found.row.result.setting, found.words)

    assert chosen(w4=(3.0, 1.5, *SAFE), w8=(1.5, 2.0, *SAFE)) == ("w4", "use this")
    assert chosen(w4=(0.5, 1.5, *SAFE)) == ("w4", "if memory is short")
    assert chosen(w4=(3.0, 1.5, *UNSETTLED)) == chosen(w4=(3.0, 1.5, *WORSE)) == ("none", "stay with this")
    assert chosen(w4=(3.0, 1.5, *SLIGHT)) is None, "whether to accept a small loss is for the reader to say"
    assert choice(blank(1)) is None


def test_a_task_at_which_the_recommended_setting_loses_is_named():
    """Though it is on another scale, and so no part of the overall quality."""
    comparison = judged(w4=(3.0, 1.5, *SAFE))
    row = comparison.tasks[0]
    base, cell = row.cells[:2]

    def told(change, p_value, **info):
        estimate = Estimate(value=change, low=change - 0.01, high=change + 0.01, num=40)
        difference = replace(cell.difference, estimate=estimate, corrected_p=p_value)
        task = replace(
            row, task=replace(row.task, **info), in_points=False, cells=(base, replace(cell, difference=difference))
        )
        return answer(replace(comparison, tasks=(*comparison.tasks[1:], task)))[2:]

    prose = {"name": "prose", "metric": "bits_per_byte", "higher_is_better": False}
    assert told(0.0309, 0.001, **prose) == [
        "But a loss is detected at prose (+0.0309 bits_per_byte): see whether that matters to you."
    ]
    assert told(-0.0309, 0.001, **prose) == told(0.0309, 0.2, **prose) == []
    assert told(-0.1, 0.001, name="qa", metric="f1")[0].startswith(f"But a loss is detected at qa ({MINUS}0.1 f1)")


def test_a_difference_that_is_lost_among_many_comparisons_is_not_called_none():
    comparison = judged(w4=(1, 1, *UNSETTLED), w8=(1, 1, *SAFE))
    rows = [
        replace(row, difference=replace(row.difference, p_value=p_value)) if row.difference else row
        for row, p_value in zip(comparison.settings, (1, 0.04, 0.9), strict=True)
    ]
    found = {one.setting: one.unseen for one in verdicts(replace(comparison, settings=tuple(rows)))}
    assert found["w4"].startswith("Alone it would count as detected (p = 0.040), among 2 comparisons it may be chance;")
    assert found["w8"].startswith("No detectable difference;")


def test_what_was_not_detected_says_what_would_not_have_been_seen_and_what_it_takes():
    of_kind = {
        one.setting: one.unseen for one in verdicts(judged(w4=(1, 1, *UNSETTLED), w8=(1, 1, *SAFE), w3=(1, 1, *WORSE)))
    }
    # The interval is 11.5 points wide: (2.394 + 0.842) standard errors of 11.5 / 3.920, at one
    # level of 2.5 % for three settings.
    assert of_kind["w4"] == (
        "No detectable difference; with n = 375 a drop of less than 9.5 points would not be seen; "
        "about 1,100 questions would settle whether it loses 5 points."
    )
    assert of_kind["w8"] == "No detectable difference; with n = 375 a drop of less than 1.8 points would not be seen."
    assert of_kind["w3"] == of_kind["none"] == ""
    unknown = {one.setting: one.unseen for one in verdicts(judged(w4=(1, 1, *UNKNOWN)))}
    assert unknown["w4"] == "No detectable difference; with n = 375 it is not known which one would be seen."
