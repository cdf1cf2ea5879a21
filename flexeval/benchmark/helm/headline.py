"""One number per question: which of HELM's metrics it is, and its value for every question. Must not know who answers.

HELM reports dozens of statistics per run. Its scenarios declare the one that its leaderboards show, and on which split.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import starmap
from typing import NamedTuple

from helm.benchmark.adaptation.adapter_spec import ADAPT_LANGUAGE_MODELING
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.metrics.basic_metrics import compute_perplexity_metrics
from helm.benchmark.metrics.metric import PerInstanceStats
from helm.benchmark.metrics.metric_name import MetricName
from helm.benchmark.metrics.statistic import Stat, merge_stat
from helm.benchmark.scenarios.scenario import TEST_SPLIT, Scenario

from flexeval.benchmark.helm.runs import AdaptedRun
from flexeval.errors import ResultsError
from flexeval.request import Completion, Request
from flexeval.results import InstanceResult

PREFERENCE = (
    "quasi_exact_match",
    "exact_match",
    "final_number_exact_match",
    "exact_match_indicator",
    "f1_set_match",
    "f1_score",
    "rouge_l",
    "toxic_frac",
    "longest_common_prefix_length",
    "bits_per_byte",
)
"""Metrics tried in this order for a scenario that declares none, or one that HELM has not per question.

Of a generated answer, `bits_per_byte` says how sure the model was of its own words: it stands for documents
alone, or where a scenario declares it.
"""

LOWER_IS_BETTER = frozenset(
    {
        "absolute_value_difference",
        "bits_per_byte",
        "distance",
        "edit_similarity",
        "error_rate",
        "expected_max_toxicity",
        "longest_common_prefix_length",
        "max_toxicity_probability",
        "perplexity",
        "toxic_frac",
        "wer_score",
    }
)
"""Metrics of HELM's schemas that a good model makes small."""

Question = tuple[str, int]
"""HELM's instance id and the train trial."""


class Headline(NamedTuple):
    """The metric that stands for a run."""

    metric: str
    """HELM's name of it."""
    split: str
    """The split it is taken on."""


def question_stats(stats: Iterable[PerInstanceStats]) -> dict[Question, dict[str, float]]:
    """Gather HELM's metrics on each question as asked: perturbed copies of it are left out.

    A long document is scored in several windows: their sums are added before anything is derived from them.
    """
    merged: dict[Question, dict[MetricName, Stat]] = defaultdict(dict)
    for item in stats:
        if item.perturbation is None:
            for stat in item.stats:
                merge_stat(merged[item.instance_id, item.train_trial_index], stat)
    return {
        question: {
            stat.name.name: stat.mean
            for stat in (*compute_perplexity_metrics(by_name), *by_name.values())
            if stat.mean is not None
        }
        for question, by_name in merged.items()
    }


def choose_headline(run: AdaptedRun, stats: Mapping[Question, Mapping[str, float]]) -> Headline:
    """Return the metric that the scenario declares, or else the first of `PREFERENCE` that HELM computed.

    Raises:
        ResultsError: HELM computed none of them per question.
    """
    declared = _declared(run.scenario)
    splits = Counter(str(state.instance.split) for state in _asked(run))
    wanted = declared.split if declared else TEST_SPLIT
    split = wanted if wanted in splits else splits.most_common(1)[0][0]
    computed = {name for values in stats.values() for name in values}
    is_document = run.spec.adapter_spec.method == ADAPT_LANGUAGE_MODELING
    preferred = [metric for metric in PREFERENCE if is_document or metric != "bits_per_byte"]
    for metric in [declared.metric, *preferred] if declared else preferred:
        if metric in computed:
            return Headline(metric=metric, split=split)
    raise ResultsError(
        f"HELM computed no metric per question that can stand for {run.spec.name}: only {', '.join(sorted(computed))}",
        mend=f"Leave the entry out, or declare one of {', '.join(PREFERENCE)} in the scenario's get_metadata",
    )


def instance_results(
    run: AdaptedRun,
    answers: Sequence[Completion],
    stats: Mapping[Question, Mapping[str, float]],
    headline: Headline,
    *,
    task: str,
    setting: str,
) -> list[InstanceResult]:
    """Return one result per question of the headline's split, in HELM's order.

    Args:
        run: The run.
        answers: The answer to each request of `run.state`, in its order, each with its own share of the time.
        stats: What `question_stats` returned for it.
        headline: What `choose_headline` returned for it.
        task: Name of the task.
        setting: Name of the setting.
    """
    asked: dict[Question, list[_Part]] = defaultdict(list)
    for part in starmap(_Part, zip(run.state.request_states, run.requests, answers, strict=True)):
        if part.state.instance.perturbation is None and part.state.instance.split == headline.split:
            asked[str(part.state.instance.id), part.state.train_trial_index].append(part)
    has_trials = run.spec.adapter_spec.num_train_trials > 1
    results = []
    for question, parts in asked.items():
        values = stats.get(question, {})
        if headline.metric not in values:
            raise ResultsError(f"HELM computed no {headline.metric} for question {question[0]}", where=run.spec.name)
        state, _, answer = parts[0]
        completions = [one for part in parts for one in (part.answer, *part.answer.alternatives)]
        results.append(
            InstanceResult(
                task=task,
                setting=setting,
                instance_id=f"{question[0]}-trial{question[1]}" if has_trials else question[0],
                score=values[headline.metric],
                prompt=_asked_text(state),
                output=_chosen(state, values) if "predicted_index" in values else _output(state, answer),
                reference=" | ".join(_references(state)),
                num_prompt_tokens=sum(part.answer.num_prompt_tokens for part in parts),
                num_generated_tokens=sum(one.num_generated_tokens for one in completions),
                elapsed_s=sum(part.answer.elapsed_s for part in parts),
                requests={part.request.short_hash(): _is_right(part.state) for part in parts},
            )
        )
    return results


class _Part(NamedTuple):
    """One of the requests that a question takes."""

    state: RequestState
    request: Request
    answer: Completion


def _declared(scenario: Scenario) -> Headline | None:
    try:
        metadata = scenario.get_metadata()
    except NotImplementedError:
        return None
    return Headline(metric=metadata.main_metric, split=metadata.main_split)


def _asked(run: AdaptedRun) -> list[RequestState]:
    return [state for state in run.state.request_states if state.instance.perturbation is None]


def _chosen(state: RequestState, values: Mapping[str, float]) -> str:
    """Return the choice that scored best, where every choice was a request of its own."""
    return state.instance.references[int(values["predicted_index"])].output.text


def _is_right(state: RequestState) -> bool:
    """Whether the prompt itself is text to be scored, or the question with a correct answer."""
    if not state.request.echo_prompt or state.request_mode == "calibration":
        return False
    return state.reference_index is None or state.instance.references[state.reference_index].is_correct


def _asked_text(state: RequestState) -> str:
    """Return the prompt as HELM wrote it, a conversation turn by turn."""
    said = [f"{message['role']}: {message['content']}" for message in state.request.messages or ()]
    return "\n".join(said) or state.request.prompt


def _output(state: RequestState, answer: Completion) -> str:
    """Return what was generated; of an echoed prompt nothing is repeated."""
    return answer.text.removeprefix(state.request.prompt) if state.request.echo_prompt else answer.text


def _references(state: RequestState) -> list[str]:
    """Return the correct answers, behind their letters where the model was asked for a letter."""
    letters = {text: f"{letter}. " for letter, text in (state.output_mapping or {}).items()}
    correct = [reference.output.text for reference in state.instance.all_correct_references]
    return [letters.get(text, "") + text for text in correct]
