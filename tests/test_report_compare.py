"""Pairing, merging and the tables: what is compared with what, what is refused, where figures come from."""

from dataclasses import replace

import pytest
from synthetic_results import GIB, TASKS, synthetic

from flexeval.errors import ResultsError
from flexeval.report.compare import compare
from flexeval.report.merge import merge
from flexeval.report.pairing import check_same_questions, pair
from flexeval.results import InstanceResult, RunResults, SettingResult, TaskInfo


def run(scores, *, groups=None, metric="exact_match", higher_is_better=True, seconds=None, **changes):
    """A run from `{setting: {task: [score, ...]}}`."""
    tasks = list(dict.fromkeys(task for by_task in scores.values() for task in by_task))
    results = RunResults(
        name="run",
        suite="suite",
        model="model",
        model_note="",
        command="flexeval run",
        created="2026-01-01T00:00:00+00:00",
        machine={},
        versions={},
        tasks=[
            TaskInfo(
                name=task,
                metric=metric,
                split="test",
                group=(groups or {}).get(task, task),
                higher_is_better=higher_is_better,
            )
            for task in tasks
        ],
        settings=[
            SettingResult(
                setting=setting,
                backend="flexeval",
                elapsed_s=(seconds or {}).get(setting, 10.0),
                load_s=1.0,
                num_requests=2,
                num_prompt_tokens=30,
                num_computed_prompt_tokens=20,
                num_generated_tokens=10,
            )
            for setting in scores
        ],
        instances=[
            InstanceResult(
                task=task,
                setting=setting,
                instance_id=f"id{number}",
                score=score,
                prompt="prompt",
                output=str(score),
                reference="reference",
                num_prompt_tokens=3,
                num_generated_tokens=1,
                elapsed_s=0.5,
            )
            for setting, by_task in scores.items()
            for task, values in by_task.items()
            for number, score in enumerate(values)
        ],
    )
    return replace(results, **changes)


def test_a_cell_counts_flips_both_ways_on_the_same_questions():
    results = run({"none": {"t": [1, 1, 0, 0, 1]}, "w4": {"t": [0, 1, 1, 1, 1]}})
    shuffled = replace(results, instances=results.instances[::-1])
    for one in (results, shuffled):
        difference = compare(one).tasks[0].cells[1].difference
        assert (difference.num_better, difference.num_worse, difference.num_same_output) == (2, 1, 2)
        assert difference.estimate.value == pytest.approx(0.2)
        assert difference.p_value == 1.0


def test_where_lower_is_better_a_rise_is_worse():
    results = run({"none": {"t": [3.0, 2.0]}, "w4": {"t": [4.0, 1.9]}}, metric="perplexity", higher_is_better=False)
    comparison = compare(results)
    difference = comparison.settings[1].difference
    assert (difference.num_better, difference.num_worse) == (1, 1)
    assert difference.estimate.value == pytest.approx(0.45)
    assert not comparison.in_points and not comparison.higher_is_better


def test_tasks_of_one_group_count_as_one():
    scores = {"none": {"m1": [1, 1], "m2": [0, 0], "gsm": [1, 0]}, "w4": {"m1": [0, 1], "m2": [0, 0], "gsm": [1, 0]}}
    comparison = compare(run(scores, groups={"m1": "mmlu", "m2": "mmlu"}))
    assert comparison.settings[0].quality.value == pytest.approx((0.5 + 0.5) / 2)
    assert comparison.settings[1].difference.estimate.value == pytest.approx(-0.5 / 4)


def test_tasks_on_another_scale_stay_out_of_the_mean_and_this_is_said():
    scores = {"none": {"t": [1, 0], "perplexity": [7.0, 9.0]}}
    comparison = compare(run(scores))
    assert comparison.averaged == ("t",)
    assert comparison.settings[0].quality.value == 0.5
    assert any("perplexity" in note for note in comparison.notes)


def test_tasks_without_any_common_scale_have_no_overall_quality():
    results = run({"none": {"a": [7.0, 9.0], "b": [3.0, 4.0]}})
    tasks = [replace(results.tasks[0], metric="perplexity"), replace(results.tasks[1], metric="bits")]
    comparison = compare(replace(results, tasks=tasks))
    assert comparison.settings[0].quality is None
    assert not comparison.settings[0].is_best_trade


def test_per_task_p_values_are_corrected_together():
    comparison = compare(synthetic(num_questions=30))
    cells = [cell for row in comparison.tasks for cell in row.cells if cell.difference]
    assert len(cells) == len(TASKS) * 3
    smallest = min(cells, key=lambda cell: cell.difference.p_value).difference
    assert smallest.corrected_p == pytest.approx(smallest.p_value * len(cells))
    assert all(cell.difference.corrected_p >= cell.difference.p_value for cell in cells)


def test_trials_of_a_question_are_one_sample():
    """Three trials that all go alike say no more than one, of intervals, p values and numbers of questions."""
    once = run({"none": {"a": [1, 1, 1, 1, 0, 1], "b": [0, 1]}, "w4": {"a": [0, 0, 1, 1, 0, 1], "b": [1, 1]}})
    trials = [
        replace(one, instance_id=f"{one.instance_id}-trial{trial}") for one in once.instances for trial in range(3)
    ]
    thrice, single = compare(replace(once, instances=trials)), compare(once)
    for ours, theirs in zip(thrice.settings, single.settings, strict=True):
        assert ours.quality == theirs.quality
    ours, theirs = (one.settings[1].difference for one in (thrice, single))
    assert (ours.estimate, ours.p_value, ours.bootstrap) == (theirs.estimate, theirs.p_value, theirs.bootstrap)
    for row, other in zip(thrice.tasks, single.tasks, strict=True):
        ours, theirs = row.cells[1], other.cells[1]
        assert (ours.score, ours.difference.estimate) == (theirs.score, theirs.difference.estimate)
        assert ours.difference.p_value == theirs.difference.p_value
        assert ours.difference.num_worse == 3 * theirs.difference.num_worse


def test_trials_that_differ_are_a_mean():
    results = run({"none": {"a": [1, 0, 1, 1]}, "w4": {"a": [0, 0, 1, 0]}})
    names = ["q-trial0", "q-trial1", "r-trial0", "r-trial1"] * 2
    instances = [replace(one, instance_id=name) for one, name in zip(results.instances, names, strict=True)]
    cell = compare(replace(results, instances=instances)).tasks[0].cells[1]
    assert cell.difference.estimate.value == -0.5 and cell.difference.estimate.num == 2
    assert cell.difference.p_value == 0.5, "two questions got worse by as much"


def test_overall_p_values_are_corrected_for_the_number_of_settings():
    rows = [row.difference for row in compare(synthetic()).settings if row.difference]
    ranked = sorted(rows, key=lambda difference: difference.p_value)
    assert len(ranked) == 3
    for place, difference in enumerate(ranked):
        steps = [(3 - rank) * one.p_value for rank, one in enumerate(ranked[: place + 1])]
        assert difference.corrected_p == pytest.approx(min(1.0, max(steps)))


def test_the_overall_test_of_a_single_task_is_that_tasks_test():
    results = synthetic(settings=["none", "w4-g128"], tasks=TASKS[-1:])
    comparison = compare(results)
    cell, row = comparison.tasks[0].cells[1], comparison.settings[1]
    assert row.difference.p_value == cell.difference.p_value
    assert row.difference.estimate == cell.difference.estimate
    assert row.quality.value == pytest.approx(cell.score.value)


def test_speed_and_memory_are_ratios_to_the_baseline():
    comparison = compare(synthetic())
    none, w4 = comparison.settings[:2]
    assert none.speedup == none.memory_ratio == 1
    assert w4.questions_per_s == pytest.approx(360 / w4.result.elapsed_s)
    assert w4.speedup == pytest.approx(none.result.elapsed_s / w4.result.elapsed_s)
    assert w4.memory_bytes == 20 * GIB
    assert w4.memory_ratio == pytest.approx(61 / 20)


def test_no_time_gives_no_speed():
    comparison = compare(run({"none": {"t": [1]}, "w4": {"t": [1]}}, seconds={"w4": 0.0}))
    assert comparison.settings[1].questions_per_s is None
    assert comparison.settings[1].speedup is None
    assert comparison.settings[1].tokens_per_s is None


def test_answers_of_an_earlier_run_count_the_seconds_they_took_there():
    results = run({"none": {"t": [1, 1]}}, seconds={"none": 0.1})
    results = replace(results, settings=[replace(results.settings[0], num_resumed=1)])
    comparison = compare(results)
    assert comparison.settings[0].engine_s == pytest.approx(1.0)
    assert any("journal" in note for note in comparison.notes)


def test_the_front_holds_what_nothing_beats_in_both():
    scores = {"none": {"t": [1, 1]}, "fast": {"t": [1, 0]}, "slow": {"t": [0, 0]}}
    comparison = compare(run(scores, seconds={"none": 10.0, "fast": 5.0, "slow": 10.0}))
    assert [row.is_best_trade for row in comparison.settings] == [True, True, False]


def test_questions_not_asked_everywhere_are_left_out_and_counted():
    results = run({"none": {"t": [1, 0, 1], "u": [1]}, "w4": {"t": [0, 0]}})
    comparison = compare(results)
    assert comparison.tasks[0].num_questions == 2
    assert comparison.tasks[0].cells[0].score.value == 0.5
    assert [row.task.name for row in comparison.tasks] == ["t"]
    assert any("t: 1 of 3" in note for note in comparison.notes)
    assert any("u: none of 1" in note for note in comparison.notes)


def broken(**changes):
    results = run({"none": {"t": [1, 0]}, "w4": {"t": [1, 1]}})
    return replace(results, instances=[*results.instances[:-1], replace(results.instances[-1], **changes)])


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        (run({"none": {"t": [1]}, "w4": {"u": [1]}}), "no question was asked under all of: none, w4"),
        (run({}), "no question was asked"),
        (broken(reference="another"), "not the same question"),
        (broken(score=float("nan")), "is no number"),
        (broken(instance_id="id0"), "answered twice"),
        (broken(setting="w8"), "unknown task or setting"),
        (broken(task="v"), "unknown task or setting"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(results, reason):
    with pytest.raises(ResultsError, match=reason):
        compare(results)


def test_different_prompts_of_one_question_are_compared_and_told():
    assert pair(broken(prompt="shorter")).notes == ["t: 1 of 2 questions were put in different prompts."]


def test_one_run_merges_to_itself():
    results = synthetic()
    assert merge([results]) is results


def test_merged_runs_are_labelled_and_the_first_runs_none_is_the_baseline():
    merged = merge([synthetic(settings=["w4", "none"], name="new"), synthetic(settings=["none"], name="old")])
    assert [setting.setting for setting in merged.settings] == ["new/none", "new/w4", "old/none"]
    comparison = compare(merged)
    assert comparison.baseline == 0
    assert comparison.settings[2].difference.num_same_output == len(comparison.questions)
    assert comparison.settings[2].difference.estimate.value == 0
    assert merged.command.count("\n") == 1
    assert merged.machine == synthetic().machine


def test_a_first_run_without_none_offers_its_first_setting_as_baseline():
    merged = merge([synthetic(settings=["w4", "w4-g32"], name="new"), synthetic(settings=["none"], name="old")])
    assert merged.settings[compare(merged).baseline].setting == "new/w4"


def test_runs_of_one_name_are_numbered():
    merged = merge([synthetic(settings=["none"]), synthetic(settings=["none"])])
    assert [setting.setting for setting in merged.settings] == ["synthetic/none", "synthetic#2/none"]


def test_merged_results_survive_the_disk(tmp_path):
    merged = merge([synthetic(name="a"), synthetic(name="b", settings=["w4"])])
    merged.save(tmp_path)
    assert RunResults.load(tmp_path) == merged


def test_merging_tells_what_differs():
    here, there = synthetic(name="here"), synthetic(name="there")
    there = replace(there, machine={"gpu": "another"}, model="opt-13b", versions={"torch": "2.11"})
    merged = merge([here, there])
    assert merged.machine["gpu (here)"] != merged.machine["gpu (there)"] == "another"
    assert sum(word in note for note in merged.notes for word in ("machines", "models", "versions")) == 3


def test_one_model_of_other_files_is_told():
    runs = [replace(synthetic(num_questions=1, name=name), fingerprint=name) for name in ("a", "b")]
    merged = merge(runs)
    assert merged.fingerprint == "a, b" and any("files were not the same" in note for note in merged.notes)
    assert not any("files" in note for note in merge([runs[0], runs[0]]).notes)


def test_runs_that_were_asked_other_questions_are_refused_with_the_first_that_is_lacking():
    whole, part = synthetic(settings=["none"], num_questions=3, name="whole"), synthetic(settings=["none"], name="part")
    part = replace(part, instances=[one for one in whole.instances if one.task != "gsm"])
    check_same_questions(merge([whole, whole]))
    for runs in ([whole, part], [part, whole]):
        with pytest.raises(ResultsError, match=r"3 of 18 questions of 'whole/none' .* 'part/none': 'id0' of 'gsm'"):
            check_same_questions(merge(runs))


def test_merging_refuses_one_task_measured_in_two_ways():
    other = [replace(task, metric="f1_score") for task in TASKS]
    with pytest.raises(ResultsError, match=r"measured by .*exact_match.* and by .*f1_score"):
        merge([synthetic(), synthetic(tasks=other, name="other")])


def test_merging_nothing_is_refused():
    with pytest.raises(ResultsError, match="nothing to compare"):
        merge([])


def test_merging_runs_without_a_common_task_is_refused_by_the_comparison():
    merged = merge([synthetic(tasks=TASKS[:1], name="a"), synthetic(tasks=TASKS[1:2], name="b")])
    with pytest.raises(ResultsError, match="no question was asked under all of"):
        compare(merged)
