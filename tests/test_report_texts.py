"""The table, the comment and the terminal: a row for everything, and nothing in it breaks the format."""

import csv
import io
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from synthetic_results import TASKS, changed, synthetic
from test_report_fidelity import run_with_rows

from flexeval.report import format as show
from flexeval.report.answer import answer
from flexeval.report.compare import compare
from flexeval.report.fidelity import perplexity_ratio
from flexeval.report.render import markdown
from flexeval.report.render.html import page
from flexeval.report.render.markdown import plain, summary
from flexeval.report.render.table import table
from flexeval.report.render.terminal import print_table
from flexeval.report.scored_through import scored_through


@pytest.fixture(scope="module")
def four():
    return compare(synthetic())


def test_the_table_reads_back_with_raw_numbers(four):
    frame = pd.read_csv(io.StringIO(table(four)), float_precision="round_trip")
    assert len(frame) == 24
    assert not frame.duplicated(["task", "setting"]).any()
    cell = four.tasks[5].cells[3]
    row = frame[(frame.task == "gsm") & (frame.setting == "w4-g128")].iloc[0]
    assert row.score == cell.score.value and row.score_low == cell.score.low
    assert row.difference == cell.difference.estimate.value
    assert row.corrected_p_value == cell.difference.corrected_p
    assert (row.num_better, row.num_worse) == (cell.difference.num_better, cell.difference.num_worse)
    assert row.questions_per_s == pytest.approx(60 / cell.elapsed_s)
    assert frame[frame.setting == "none"].difference.isna().all()


def test_the_table_quotes_what_would_break_it():
    results = synthetic(num_questions=2, tasks=TASKS[:1], name='a "name", with\nnewline')
    rows = list(csv.DictReader(io.StringIO(table(compare(results)))))
    assert len(rows) == 4 and {row["run"] for row in rows} == {'a "name", with\nnewline'}


def test_the_comment_has_a_row_per_task_and_setting(four):
    lines = summary(four).splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    widths = {len(row) for row in rows}
    assert widths == {8, 7}
    wide = [tuple(cell.strip() for cell in row[:2]) for row in rows if len(row) == 7][2:]
    assert wide == [(plain(row.task.name), cell.setting) for row in four.tasks for cell in row.cells]
    for row in four.tasks:
        for cell in row.cells:
            assert show.interval(cell.score, in_points=True) in "\n".join(lines)


def test_a_comment_too_long_for_github_points_to_the_table(monkeypatch, four):
    monkeypatch.setattr(markdown, "_LONGEST_COMMENT", 2000)
    text = summary(four)
    assert "results.csv" in text and "gsm" not in text
    assert answer(four)[0] in text and "Example GPU" in text


def test_the_comment_escapes_what_markdown_would_act_on():
    assert plain("a|b\nc <b> `x` *y* [z](w)") == r"a\|b c \<b\> \`x\` \*y\* \[z\](w)"
    assert "@user" not in plain("ping @user")


def test_a_metric_that_a_good_model_makes_small_is_named_with_its_direction():
    task = replace(TASKS[0], name="text", metric="bits_per_byte", higher_is_better=False)
    results = synthetic(settings=["none", "w4"], tasks=[task])
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    print_table(results, console)
    head = console.file.getvalue().partition("none")[0]
    assert "bits per byte" in head and "lower is better" in head
    assert r"| setting | quality (bits\_per\_byte, lower is better) |" in summary(compare(results))


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        (
            ["rows of 1,024 tokens, not 2,048"],
            "once; work went on with rows of 1,024 tokens, not 2,048. ",
        ),
        (["groups of 8", "groups of 4"], "2 times; work went on with groups of 8; groups of 4. "),
    ],
)
def test_a_batch_that_was_split_is_a_caveat_everywhere(splits, says):
    results = synthetic(settings=["none", "w4"], num_questions=2)
    split = replace(results.settings[1], splits=splits, lost_s=12.0)
    results = replace(results, settings=[results.settings[0], split])
    console = Console(width=300, file=io.StringIO(), force_terminal=False)
    print_table(results, console)
    told = f"w4: memory ran out {says}{show.seconds(12.0)} of work were done again, which its engine time leaves out."
    for text in (console.file.getvalue(), summary(compare(results)), page(compare(results))):
        assert told in text and "none: memory" not in text


@pytest.fixture
def compared(tmp_path):
    random = np.random.default_rng(0)
    p = np.log(random.dirichlet(np.ones(40), size=20)).astype(np.float32)
    return run_with_rows(tmp_path, "close", {"none": p, "w4": p[:, ::-1]})


def test_closeness_is_in_the_terminal_the_table_and_the_comment(compared):
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    print_table(compared, console)
    overall, task = compared.fidelity
    text = console.file.getvalue()
    assert "…" not in text and "against none" in text
    for figure in (
        show.with_error(overall.kl, overall.kl_error),
        show.percent(overall.same_top, overall.same_top_error),
        show.with_error(*perplexity_ratio(overall)),
        show.percent(overall.probability_change, overall.probability_change_error),
    ):
        assert all(part in text for part in figure.split()) and figure in summary(compare(compared))
    none, w4 = list(csv.DictReader(io.StringIO(table(compare(compared)))))
    assert not none["kl"] and not none["num_flips_to_wrong"]
    assert float(w4["kl"]) == task.kl and float(w4["kl_p99"]) == task.kl_quantiles[10]
    assert float(w4["kl_at_least"]) == task.kl_at_least and float(w4["kl_error"]) == task.kl_error
    assert float(w4["probability_change_error"]) == task.probability_change_error
    assert float(w4["same_top_error"]) == task.same_top_error
    assert float(w4["perplexity_ratio"]) == pytest.approx(perplexity_ratio(task).value)
    flips = compare(compared).settings[1].flips
    assert (int(w4["num_flips_to_wrong"]), int(w4["num_flips_to_right"])) == (flips.num_to_wrong, flips.num_to_right)


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (["none", "w4"], ""),
        (["none", "kv4"], "With kv4, all scores"),
        (["none", "w4kv4-g32", "w8", "kv2"], "With w4kv4-g32 and kv2, all scores"),
        (["a/kv8", "a/none", "b/kv4", "b/kv2"], "With a/kv8, b/kv4 and b/kv2, all scores"),
        (["none", "of-another-version"], ""),
    ],
)
def test_it_is_said_where_scores_went_through_a_compressed_cache(labels, named):
    assert scored_through(labels).partition(" went")[0] == named


def test_it_is_said_where_scores_saw_some_of_the_keys():
    sparse = "With topk10 and w4kv4-quest5, every token attended to the chosen part of its keys alone, also in prompts"
    assert scored_through(["none", "topk10", "w4"]).startswith("With topk10, every token attended")
    both = scored_through(["none", "topk10", "w4kv4-quest5"])
    assert both.startswith("With w4kv4-quest5, all scores went through") and sparse in both


def test_all_forms_say_that_scores_went_through_the_cache():
    plain = synthetic(settings=["none", "w4"])
    renamed = [replace(one, setting=one.setting.replace("w4", "kv4")) for one in plain.settings]
    answers = [replace(one, setting=one.setting.replace("w4", "kv4")) for one in plain.instances]
    results = replace(plain, settings=renamed, instances=answers)
    sentence = scored_through(["none", "kv4"])
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    print_table(results, console)
    assert sentence in " ".join(console.file.getvalue().split())
    assert sentence in summary(compare(results)) and sentence in page(compare(results))
    assert "went through" not in page(compare(synthetic(settings=["none", "w4"])))


def test_without_distributions_nothing_is_said_of_closeness(four):
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    print_table(synthetic(), console)
    assert "KL" not in console.file.getvalue() and "KL" not in summary(four)


def test_the_terminal_shows_the_answer_and_a_row_per_setting(four):
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    print_table(synthetic(), console)
    text = console.file.getvalue()
    for row in four.settings:
        assert row.result.setting in text
        assert show.interval(row.quality, in_points=True) in text
    assert answer(four)[0] in text
    assert "Caveat: Scores are random numbers" in text
    assert "Caveat: 1 of the suite's tasks not run" in text


def test_the_terminal_takes_names_as_they_are():
    results = changed(lambda one: {"setting": f"[red]{one.setting}"}, settings=["w4"], num_questions=2)
    results = replace(results, settings=[replace(results.settings[0], setting="[red]w4")])
    console = Console(width=100, file=io.StringIO())
    print_table(results, console)
    assert "[red]w4" in console.file.getvalue()
