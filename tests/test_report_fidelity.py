"""Figures of closeness against sums written out by hand, where both settings have seen the same tokens."""

import math
from dataclasses import replace

import numpy as np
import pytest
from kept_rows import kept_of, put
from scipy import special, stats
from synthetic_results import TASKS, synthetic
from test_distributions import rows_of

from flexeval.distributions import contexts_after, request_key, row_type
from flexeval.errors import ResultsError
from flexeval.parquet import save
from flexeval.report.compare import compare
from flexeval.report.fidelity import Home, compare_rows, measure, perplexity_ratio
from flexeval.report.merge import distribution_files, distribution_path, merge
from flexeval.results import QUANTILES, RunResults

VOCAB = 40
HOMES = {1: Home("text", 0), 2: Home("text", 1), 3: Home("choice", 2), 4: Home("choice", 3)}


def models(seed, num, distance):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(num, VOCAB)) * 2
    moved = logits + random.normal(size=logits.shape) * distance
    return [special.log_softmax(one, axis=-1).astype(np.float32) for one in (logits, moved)]


def rows(logprobs, tokens, *, num_top=VOCAB, requests=None, contexts=None, is_drawn=False, is_text=True):
    num = len(tokens)
    made = np.zeros(num, row_type(num_top))
    made["context"] = np.arange(num) * 1000 if contexts is None else contexts
    made["request"] = [1 + place % 2 for place in range(num)] if requests is None else requests
    made["token"], made["is_drawn"], made["is_text"] = tokens, is_drawn, is_text
    made["logprob"] = logprobs[np.arange(num), tokens]
    return put(made, kept_of(logprobs, num_top))


def test_the_figures_are_those_of_the_whole_distributions():
    p, q = models(0, 300, 0.4)
    tokens = np.random.default_rng(1).integers(VOCAB, size=300)
    shuffle = np.random.default_rng(2).permutation(300)
    overall, text = compare_rows(rows(p, tokens), rows(q, tokens)[shuffle], HOMES, ("w4", "none"))
    assert (overall.task, text.task, overall.setting, overall.baseline) == ("", "text", "w4", "none")
    assert replace(text, task="") == overall, "there is one task"
    divergence = (np.exp(p) * (p - q.astype(float))).sum(1)
    assert overall.kl == pytest.approx(divergence.mean(), rel=1e-4)
    assert overall.kl_quantiles == pytest.approx(list(np.quantile(divergence, QUANTILES)), rel=1e-3, abs=1e-5)
    assert overall.same_top == pytest.approx(np.mean(p.argmax(1) == q.argmax(1)))
    assert (overall.num_positions, overall.num_questions, overall.num_top, overall.num_text) == (300, 2, VOCAB, 300)
    assert overall.tail == pytest.approx(0, abs=1e-6)
    ours, theirs = (one[np.arange(300), tokens].astype(float) for one in (p, q))
    ratio = perplexity_ratio(overall)
    assert ratio.value == pytest.approx(math.exp(-theirs.mean()) / math.exp(-ours.mean()))
    assert math.exp(overall.text_loss) == pytest.approx(math.exp(-ours.mean()))
    changes = np.exp(theirs) - np.exp(ours)
    assert overall.probability_change == pytest.approx(changes.mean())
    assert overall.probability_change_rms == pytest.approx(math.sqrt((changes**2).mean()))
    assert overall.probability_change_quantiles == pytest.approx(list(np.quantile(changes, QUANTILES)))


def test_errors_are_those_of_llama_cpp_where_every_position_is_a_question_of_its_own():
    p, q = models(3, 200, 0.4)
    tokens = np.random.default_rng(4).integers(VOCAB, size=200)
    homes = {place: Home("text", place) for place in range(200)}
    one, _ = compare_rows(*(rows(x, tokens, requests=np.arange(200)) for x in (p, q)), homes, ("w4", "none"))
    assert one.kl_error == pytest.approx(stats.sem((np.exp(p) * (p - q.astype(float))).sum(1)), rel=1e-3)
    share = one.same_top
    assert one.same_top_error == pytest.approx(math.sqrt(share * (1 - share) / 199))
    ours, theirs = (x[np.arange(200), tokens].astype(float) for x in (p, q))
    # tools/perplexity/perplexity.cpp: the error of ln PPL(Q) - ln PPL(base) with their covariance, times the ratio
    variances = np.cov(-theirs, -ours)
    error = math.sqrt((variances[0, 0] + variances[1, 1] - 2 * variances[0, 1]) / 200)
    ratio = perplexity_ratio(one)
    assert ratio.error == pytest.approx(ratio.value * error)


def test_positions_count_where_both_have_seen_the_same_tokens():
    ours, theirs = rows_of((7, 8, 9), (4, 5, 6)), rows_of((7, 8, 9), (4, 3, 6), shift=0.25)
    for one in (ours, theirs):
        one["request"] = 1
    (overall, _) = compare_rows(ours, theirs, {1: Home("text", 0)}, ("w4", "none"))
    assert overall.num_positions == 4, "two of the prompt; the drawn 4; and what was drawn after it, 5 or 3"
    assert overall.kl_error is None and overall.num_text == 0 and perplexity_ratio(overall) is None


def test_a_context_counts_once_and_every_token_of_a_text_counts():
    """Two endings of one question: one distribution after the question, two right tokens."""
    p, q = models(5, 2, 0.5)
    p[1], q[1] = p[0], q[0]
    both = [rows(x, np.array([3, 4]), contexts=[9, 9], requests=[3, 4]) for x in (p, q)]
    both[1] = both[1][::-1]
    overall, *_ = compare_rows(*both, HOMES, ("w4", "none"))
    assert (overall.num_positions, overall.num_text) == (1, 2)
    losses = [-(x[0, 3] + x[0, 4]) / 2 for x in (p, q)]
    assert overall.loss_change == pytest.approx(losses[1] - losses[0], rel=1e-4)


def test_only_text_that_is_right_counts_as_text_and_only_questions_that_were_asked_count_at_all():
    p, q = models(6, 30, 0.5)
    tokens = np.zeros(30, int)
    requests = [3] * 10 + [4] * 10 + [99] * 10
    both = [rows(x, tokens, requests=requests, is_text=np.arange(30) < 5) for x in (p, q)]
    overall, choice = compare_rows(*both, HOMES, ("w4", "none"))
    assert (overall.num_positions, overall.num_text, overall.num_questions) == (20, 5, 2)
    assert choice.task == "choice"
    assert compare_rows(both[0][20:], both[1][20:], HOMES, ("w4", "none")) == []


def test_fewer_tokens_estimate_the_divergence_and_give_the_same_everything_else():
    p, q = models(7, 500, 0.5)
    tokens = np.random.default_rng(8).integers(VOCAB, size=500)
    whole, part = (
        compare_rows(*(rows(x, tokens, num_top=num) for x in (p, q)), HOMES, ("w4", "none"))[0] for num in (VOCAB, 5)
    )
    assert whole.kl_at_least == whole.kl == pytest.approx(part.kl, rel=0.15)
    assert 0.5 * whole.kl < part.kl_at_least < 0.95 * whole.kl
    assert part.tail == pytest.approx(1 - np.sort(np.exp(p), axis=1)[:, -5:].sum(1).mean(), rel=1e-4)
    exact = {"same_top", "loss_change", "loss_change_error", "probability_change_rms", "num_positions"}
    assert all(getattr(part, name) == getattr(whole, name) for name in exact)


def run_with_rows(directory, name, models_of):
    """A synthetic run of one task whose settings have distributions on disk."""
    results = synthetic(settings=list(models_of), tasks=[TASKS[1]], num_questions=20, name=name)
    requests = [f"{number:016x}" for number in range(20)]
    instances = [
        replace(instance, requests={requests[int(instance.instance_id[2:])]: True}) for instance in results.instances
    ]
    results = replace(results, instances=instances)
    for setting, logprobs in models_of.items():
        keys = [request_key(request) for request in requests]
        save(rows(logprobs, np.zeros(20, int), num_top=8, requests=keys), distribution_path(directory, setting))
    results = replace(results, fidelity=measure(results, distribution_files([results], [directory])))
    results.save(directory)
    return results


def test_a_run_knows_its_figures_and_the_tables_show_them(tmp_path):
    p, q = models(9, 20, 0.5)
    results = run_with_rows(tmp_path, "one", {"none": p, "w4": q})
    assert [one.task for one in results.fidelity] == ["", "openbookqa"]
    assert RunResults.load(tmp_path) == results
    comparison = compare(results)
    assert comparison.settings[0].fidelity is None and comparison.settings[1].fidelity == results.fidelity[0]
    assert comparison.tasks[0].cells[1].fidelity == results.fidelity[1]
    same = run_with_rows(tmp_path / "same", "same", {"none": p, "w4": p})
    assert same.fidelity[0].kl < 1e-6 and same.fidelity[0].same_top == 1


def test_merged_runs_are_compared_with_the_first_ones_baseline(tmp_path):
    p, q = models(10, 20, 0.5)
    runs = [run_with_rows(tmp_path / "a", "a", {"none": p}), run_with_rows(tmp_path / "b", "b", {"none": q, "w4": p})]
    merged = merge(runs)
    files = distribution_files(runs, [tmp_path / "a", tmp_path / "b/results.json"])
    assert files.keys() == {"a/none", "b/none", "b/w4"}
    figures = {one.setting: one for one in measure(merged, files) if not one.task}
    assert figures.keys() == {"b/none", "b/w4"} and all(one.baseline == "a/none" for one in figures.values())
    assert figures["b/none"].kl > 0.01 > figures["b/w4"].kl
    assert [(one.setting, one.baseline) for one in merged.fidelity] == [("b/w4", "b/none")] * 2
    assert compare(merged).settings[2].fidelity is None, "that is against another baseline"
    distribution_path(tmp_path / "a", "none").unlink()
    assert measure(merged, distribution_files(runs, [tmp_path / "a", tmp_path / "b"])) == []


def test_contexts_of_other_tokenizers_are_never_equal():
    ours, theirs = rows_of((7, 8, 9)), rows_of((7, 8, 9), vocabulary=1)
    assert not set(contexts_after(ours).tolist()) & set(contexts_after(theirs).tolist())
    ours["request"] = theirs["request"] = 1
    assert compare_rows(ours, theirs, HOMES, ("w4", "none")) == []


def test_flips_are_answers_that_changed_sides():
    results = synthetic(settings=["none", "w4"], tasks=TASKS[:2], num_questions=40)
    scores = {(one.setting, one.task, one.instance_id): one.score for one in results.instances}
    comparison = compare(results)
    grades, choices = comparison.tasks
    assert comparison.settings[0].flips is None and choices.cells[0].flips is None
    pairs = [(scores["none", "openbookqa", f"id{i}"], scores["w4", "openbookqa", f"id{i}"]) for i in range(40)]
    flips = choices.cells[1].flips
    assert (flips.num_to_wrong, flips.num_to_right) == (pairs.count((1, 0)), pairs.count((0, 1)))
    assert flips.num_questions == 40 and flips.num_to_wrong > 0
    assert grades.cells[1].flips is None
    assert comparison.settings[1].flips == flips


def test_a_file_of_something_else_is_named(tmp_path):
    p, q = models(11, 20, 0.5)
    results = run_with_rows(tmp_path, "one", {"none": p, "w4": q})
    save(np.zeros(3, [("context", "<u8"), ("top_tokens", "<i4", (2,))]), distribution_path(tmp_path, "w4"))
    with pytest.raises(ResultsError, match=r"w4\.parquet.*Run again"):
        measure(results, distribution_files([results], [tmp_path]))
    save(np.zeros(3, [("context", "<u8")]), distribution_path(tmp_path, "w4"))
    with pytest.raises(ResultsError, match=r"w4\.parquet"):
        measure(results, distribution_files([results], [tmp_path]))


def test_settings_that_keep_different_numbers_of_tokens_can_be_compared(tmp_path):
    p, q = models(12, 400, 0.5)
    tokens = np.zeros(400, int)
    (overall, _), (whole, _) = (
        compare_rows(rows(p, tokens, num_top=num), rows(q, tokens), HOMES, ("w4", "none")) for num in (8, VOCAB)
    )
    assert overall.kl == pytest.approx(whole.kl, rel=0.1)
