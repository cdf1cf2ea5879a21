"""From results to tables: computes every figure that a report shows. Knows no layout and no wording."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from flexeval.report import format as show
from flexeval.report.averaging import averaged_tasks, task_weights
from flexeval.report.merge import baseline_index
from flexeval.report.pairing import Question, over_trials, pair
from flexeval.report.resampling import bootstrap, sign_flip_p
from flexeval.report.statistics import holm, mean, paired_difference, weighted_sum
from flexeval.report.tables import Cell, Comparison, Difference, Flips, SettingRow, TaskRow
from flexeval.results import Fidelity, RunResults, SettingResult, TaskInfo


def compare(results: RunResults) -> Comparison:
    """Compute every figure of a report.

    The baseline is the setting `none`, or else the first. Overall quality is the mean over groups of the mean over the
    group's tasks (HELM's subjects of MMLU are one group), of those tasks whose scores are points.

    Raises:
        ResultsError: The settings cannot be compared question by question.
    """
    pairing = pair(results)
    names = [setting.setting for setting in results.settings]
    baseline = baseline_index(names)
    by_task: dict[str, list[Question]] = defaultdict(list)
    for question in pairing.questions:
        by_task[question.task].append(question)
    fidelity = {(one.task, one.setting): one for one in results.fidelity if one.baseline == names[baseline]}
    tasks = _correct(
        [_task_row(task, by_task[task.name], baseline, fidelity) for task in results.tasks if task.name in by_task]
    )
    averaged = averaged_tasks(tasks)
    settings = [
        replace(
            _setting_row(results, index, baseline, averaged, by_task),
            flips=_flips(pairing.questions, index, baseline),
            fidelity=fidelity.get(("", name)),
        )
        for index, name in enumerate(names)
    ]
    settings = _correct_overall(settings)
    higher_is_better = all(row.task.higher_is_better for row in averaged)
    return Comparison(
        results=results,
        baseline=baseline,
        tasks=tuple(tasks),
        settings=tuple(_best_trades(_ratios(settings, baseline), higher_is_better=higher_is_better)),
        averaged=tuple(row.task.name for row in averaged),
        in_points=all(row.in_points for row in averaged),
        higher_is_better=higher_is_better,
        questions=tuple(pairing.questions),
        notes=(*results.notes, *pairing.notes, *_caveats(results, tasks, averaged)),
    )


def _task_row(
    task: TaskInfo, questions: Sequence[Question], baseline: int, fidelity: Mapping[tuple[str, str], Fidelity]
) -> TaskRow:
    scores = [answer.score for question in questions for answer in question.answers]
    in_points = task.higher_is_better and all(0 <= score <= 1 for score in scores)
    cells = [_cell(task, questions, index, baseline, in_points=in_points) for index in range(len(questions[0].answers))]
    return TaskRow(
        task=task,
        num_questions=len(questions),
        in_points=in_points,
        cells=tuple(replace(cell, fidelity=fidelity.get((task.name, cell.setting))) for cell in cells),
    )


def _cell(task: TaskInfo, questions: Sequence[Question], index: int, baseline: int, *, in_points: bool) -> Cell:
    answers = [question.answers[index] for question in questions]
    return Cell(
        setting=answers[0].setting,
        score=mean(
            over_trials([question.instance_id for question in questions], [answer.score for answer in answers]),
            in_unit=in_points,
        ),
        difference=None if index == baseline else _difference(task, questions, index, baseline, in_points=in_points),
        num_prompt_tokens=sum(answer.num_prompt_tokens for answer in answers),
        num_generated_tokens=sum(answer.num_generated_tokens for answer in answers),
        elapsed_s=sum(answer.elapsed_s for answer in answers),
        flips=_flips(questions, index, baseline),
    )


def _flips(questions: Iterable[Question], index: int, baseline: int) -> Flips | None:
    """None for the baseline itself and where no question is answered right or wrong."""
    pairs = [(question.answers[baseline].score, question.answers[index].score) for question in questions]
    counts = Counter(pair for pair in pairs if set(pair) <= {0, 1})
    if index == baseline or not counts:
        return None
    return Flips(num_questions=counts.total(), num_to_wrong=counts[1, 0], num_to_right=counts[0, 1])


def _difference(
    task: TaskInfo, questions: Sequence[Question], index: int, baseline: int, *, in_points: bool
) -> Difference:
    pairs = [(question.answers[index], question.answers[baseline]) for question in questions]
    changes = _changes(questions, index, baseline)
    p_value = sign_flip_p(changes)
    num_up, num_down = (
        sum(ours.score > theirs.score for ours, theirs in pairs),
        sum(ours.score < theirs.score for ours, theirs in pairs),
    )
    return Difference(
        estimate=paired_difference([changes], [1.0], in_unit=in_points),
        bootstrap=bootstrap([changes], [1.0]),
        p_value=p_value,
        corrected_p=p_value,
        num_better=num_up if task.higher_is_better else num_down,
        num_worse=num_down if task.higher_is_better else num_up,
        num_same_output=sum(ours.output == theirs.output for ours, theirs in pairs),
    )


def _changes(questions: Iterable[Question], index: int, baseline: int) -> list[float]:
    """One a question, over its trials: setting minus baseline."""
    pairs = [
        (question.instance_id, question.answers[index].score - question.answers[baseline].score)
        for question in questions
    ]
    return over_trials(*zip(*pairs, strict=True))


def _correct(tasks: Sequence[TaskRow]) -> list[TaskRow]:
    """Holm's correction over every per-task comparison that the report shows."""
    corrected = iter(holm([cell.difference.p_value for row in tasks for cell in row.cells if cell.difference]))
    return [
        replace(
            row,
            cells=tuple(
                replace(cell, difference=replace(cell.difference, corrected_p=next(corrected)))
                if cell.difference
                else cell
                for cell in row.cells
            ),
        )
        for row in tasks
    ]


def _correct_overall(settings: Sequence[SettingRow]) -> list[SettingRow]:
    """Holm's correction over the settings that are held against the baseline."""
    corrected = iter(holm([row.difference.p_value for row in settings if row.difference]))
    return [
        replace(row, difference=replace(row.difference, corrected_p=next(corrected))) if row.difference else row
        for row in settings
    ]


def _setting_row(
    results: RunResults,
    index: int,
    baseline: int,
    averaged: Sequence[TaskRow],
    by_task: Mapping[str, Sequence[Question]],
) -> SettingRow:
    result = results.settings[index]
    answers = [instance for instance in results.instances if instance.setting == result.setting]
    weights = task_weights(averaged)
    return SettingRow(
        result=result,
        quality=weighted_sum([row.cells[index].score for row in averaged], weights) if averaged else None,
        difference=_overall(index, baseline, averaged, weights, by_task),
        num_questions=len(answers),
        # An earlier run's answers took their time there: only their shares know it.
        engine_s=sum(answer.elapsed_s for answer in answers) if result.num_resumed else result.elapsed_s,
    )


def _overall(
    index: int,
    baseline: int,
    averaged: Sequence[TaskRow],
    weights: Sequence[float],
    by_task: Mapping[str, Sequence[Question]],
) -> Difference | None:
    parts = [cell.difference for row in averaged if (cell := row.cells[index]).difference]
    if not parts:
        return None
    strata = [_changes(by_task[row.task.name], index, baseline) for row in averaged]
    p_value = sign_flip_p(
        [change * weight / len(stratum) for stratum, weight in zip(strata, weights, strict=True) for change in stratum]
    )
    return Difference(
        estimate=paired_difference(strata, weights, in_unit=all(row.in_points for row in averaged)),
        bootstrap=bootstrap(strata, weights),
        p_value=p_value,
        corrected_p=p_value,
        num_better=sum(part.num_better for part in parts),
        num_worse=sum(part.num_worse for part in parts),
        num_same_output=sum(part.num_same_output for part in parts),
    )


def _ratios(settings: Sequence[SettingRow], baseline: int) -> list[SettingRow]:
    base = settings[baseline]
    return [
        replace(
            row,
            speedup=row.questions_per_s / base.questions_per_s
            if row.questions_per_s and base.questions_per_s
            else None,
            memory_ratio=base.memory_bytes / row.memory_bytes if row.memory_bytes and base.memory_bytes else None,
        )
        for row in settings
    ]


def _best_trades(settings: Sequence[SettingRow], *, higher_is_better: bool) -> list[SettingRow]:
    """Mark the Pareto front of quality and speed."""
    sign = 1 if higher_is_better else -1
    points = [
        (sign * row.quality.value, row.questions_per_s) if row.quality and row.questions_per_s else None
        for row in settings
    ]

    def beaten(point: tuple[float, float]) -> bool:
        return any(other and other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)

    return [
        replace(row, is_best_trade=point is not None and not beaten(point))
        for row, point in zip(settings, points, strict=True)
    ]


def _caveats(results: RunResults, tasks: Sequence[TaskRow], averaged: Sequence[TaskRow]) -> list[str]:
    caveats = []
    if left_out := [row.task.name for row in tasks if row not in averaged]:
        caveats.append(f"Not part of the overall quality, for want of a common scale: {', '.join(left_out)}.")
    resumed: dict[tuple[int, int], list[str]] = defaultdict(list)
    for setting in results.settings:
        if setting.num_resumed:
            resumed[setting.num_resumed, setting.num_requests].append(setting.setting)
    for (num, num_requests), names in resumed.items():
        each = " each" if len(names) > 1 else ""
        caveats.append(
            f"{', '.join(names)}: {num} of {num_requests} requests{each} were answered from the journal of an earlier "
            "run; speed counts the engine seconds of the run that answered them."
        )
    for setting in results.settings:
        if setting.splits:
            caveats.append(f"{setting.setting}: {_splits(setting)}")
        if setting.moves:
            caveats.append(
                f"{setting.setting}: measured rates were other than planned with, and the rest was placed anew: "
                f"{'. Then: '.join(setting.moves)}."
            )
    return caveats


def _splits(setting: SettingResult) -> str:
    num = len(setting.splits)
    times = "once" if num == 1 else f"{num} times"
    return (
        f"memory ran out {times}; work went on with {'; '.join(setting.splits)}. "
        f"{show.seconds(setting.lost_s)} of work were done again, which its engine time leaves out."
    )
