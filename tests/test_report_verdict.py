"""What the report says in words, and how it writes numbers."""

import re
from dataclasses import replace

import pytest
from synthetic_results import TASKS, synthetic

from flexeval.report import format as show
from flexeval.report.compare import compare
from flexeval.report.merge import merge
from flexeval.report.statistics import Estimate
from flexeval.report.verdict import Kind, answer, verdicts


@pytest.fixture(scope="module")
def four():
    return compare(synthetic())


def words(settings, num_questions, **arguments):
    return answer(compare(synthetic(settings=settings, num_questions=num_questions, **arguments)))


def test_the_answer_names_the_fastest_setting_without_a_detected_loss(four):
    kinds = {verdict.setting: verdict.kind for verdict in verdicts(four)}
    assert kinds == {"none": Kind.BASELINE, "w4": Kind.SAME, "w4-g32": Kind.WORSE, "w4-g128": Kind.WORSE}
    first, second, third = answer(four)
    assert first.startswith("Use w4: ") and show.ratio(four.settings[1].speedup) in first
    assert show.interval(four.settings[1].difference.estimate, in_points=True, signed=True) in second
    assert "would often go unseen" in third


def test_no_detectable_difference_is_never_said_without_the_interval(four):
    for verdict, row in zip(verdicts(four), four.settings, strict=True):
        if verdict.kind == Kind.SAME:
            assert show.interval(row.difference.estimate, in_points=True, signed=True) in verdict.sentence
            assert f"n = {row.difference.estimate.num}" in verdict.sentence


def test_a_setting_that_changes_nothing_is_not_called_faster():
    first, *_ = answer(compare(merge([synthetic(settings=["none"], name="a"), synthetic(settings=["none"], name="b")])))
    assert first == "For speed, stay with a/none: nothing is faster without a detectable loss of quality."


def test_few_questions_recommend_nothing():
    first, second = words(["none", "w4"], 4)
    assert first == "24 questions are too few to say which setting keeps its quality."
    assert re.match(r"A true drop of [\d.]+ points would often go unseen\.", second)
    one = synthetic(settings=["none", "w4"], num_questions=1, tasks=TASKS[:1])
    one = replace(one, instances=[one.instances[0], replace(one.instances[1], score=0.123)])
    assert answer(compare(one))[1] == "Even a large drop would go unseen."


def test_where_everything_loses_the_least_loss_is_named():
    first, second = words(["none", "w4-g128"], 100)
    assert first == "Every other setting loses quality against none."
    assert second.startswith("w4-g128 loses least: \N{MINUS SIGN}")


def test_a_gain_is_called_a_gain():
    results = synthetic(settings=["none", "w4-g128"], num_questions=100)
    swap = {"none": "w4-g128", "w4-g128": "none"}
    instances = [replace(one, setting=swap[one.setting]) for one in results.instances]
    assert verdicts(compare(replace(results, instances=instances)))[1].kind == Kind.BETTER


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
