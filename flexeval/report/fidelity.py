"""How closely settings follow the baseline's probabilities. Pairs up positions and computes figures; knows no page.

The figures are those of llama.cpp's `llama-perplexity --kl-divergence` (tools/perplexity/README.md), but that a mean's
error counts the positions of one question as one sample, and that the divergence is estimated from what is kept of the
distributions (`divergence`). With p the baseline's probabilities at a position and q the setting's:

- KL divergence: the mean of sum_v p_v log(p_v / q_v), in nats;
- same top token: the share of positions where argmax p = argmax q;
- perplexity ratio: exp(mean of log p_t - log q_t), over the tokens t of texts that are known to be right;
- change of the right token's probability: of q_t - p_t, mean, root of the mean square, quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from flexeval.distributions import Contexts, Rows, contexts_after, request_key, row_type
from flexeval.errors import ResultsError
from flexeval.parquet import load
from flexeval.report.divergence import Divergences, divergences
from flexeval.report.merge import baseline_index
from flexeval.report.statistics import MeanWithError, clustered_mean
from flexeval.results import QUANTILES, Fidelity, RunResults

_LARGEST_LOG = 700.0
"""Its exponential is still a number."""
Numbers = npt.NDArray[Any]


class Home(NamedTuple):
    """Where the rows of a request belong."""

    task: str
    """Name of the task."""
    question: int
    """Number of the question: rows of one question are one sample."""


def measure(results: RunResults, files: Mapping[str, Path]) -> list[Fidelity]:
    """Compare each setting with the baseline, over all tasks and for each of them.

    Args:
        results: A run, or several merged.
        files: Where a setting's rows lie; settings without are left out.

    Raises:
        ResultsError: A file holds something else, or settings keep different numbers of tokens.
    """
    names = [setting.setting for setting in results.settings]
    baseline = names[baseline_index(names)]
    others = [name for name in names if name != baseline and name in files]
    if not others or baseline not in files:
        return []
    homes, base = _homes(results), _load(files[baseline])
    return [figures for name in others for figures in compare_rows(base, _load(files[name]), homes, (name, baseline))]


def _load(path: Path) -> Rows:
    rows = load(path)
    if "top_tokens" not in (rows.dtype.names or ()) or rows.dtype != row_type(rows["top_tokens"].shape[1]):
        raise ResultsError("its columns are not those of distributions", where=str(path), mend="Run again")
    return rows


def perplexity_ratio(one: Fidelity) -> MeanWithError | None:
    """The setting's perplexity over the baseline's, with its standard error; None where there is no text.

    Of the mean change of minus log p, by the delta method.
    """
    if one.loss_change is None:
        return None
    ratio = math.exp(min(one.loss_change, _LARGEST_LOG))
    return MeanWithError(ratio, None if one.loss_change_error is None else ratio * one.loss_change_error)


def compare_rows(base: Rows, other: Rows, homes: Mapping[int, Home], labels: tuple[str, str]) -> list[Fidelity]:
    """One setting's rows against the baseline's: over all tasks, then for each task that has rows in common.

    Args:
        base: Rows of the baseline.
        other: Rows of the setting.
        homes: Where each request belongs, by its key; rows of others do not count.
        labels: Names of the setting and of the baseline.
    """
    base, other = (rows[np.isin(rows["request"], list(homes))] for rows in (base, other))
    ours, theirs = _pair(base, other, base["context"], other["context"])
    base, other = (rows[rows["is_text"]] for rows in (base, other))
    our_text, their_text = _pair(base, other, contexts_after(base), contexts_after(other))
    found = divergences(ours, theirs)
    tasks, questions = _places(ours, homes)
    text_tasks, text_questions = _places(our_text, homes)
    figures = []
    for task in ("", *dict.fromkeys(home.task for home in homes.values())):
        chosen, text = ((here == task) | (task == "") for here in (tasks, text_tasks))
        if chosen.any():
            part = Divergences(*(values[chosen] for values in found))
            shared = _of_positions(ours[chosen], theirs[chosen], part, questions[chosen])
            of_text = _of_text(our_text[text], their_text[text], text_questions[text])
            figures.append(Fidelity(task=task, setting=labels[0], baseline=labels[1], **shared, **of_text))
    return figures


def _of_positions(ours: Rows, theirs: Rows, found: Divergences, questions: Numbers) -> dict[str, Any]:
    kl = clustered_mean(found.estimate_N, questions)
    same_top = clustered_mean((ours["top_tokens"][:, 0] == theirs["top_tokens"][:, 0]).astype(float), questions)
    told = np.exp(ours["top_logprobs"].astype(float)).sum(1)
    return {
        "num_positions": len(ours),
        "num_questions": len(np.unique(questions)),
        "num_top": ours["top_tokens"].shape[1],
        "tail": max(0.0, 1 - float(told.mean())),
        "kl": kl.value,
        "kl_error": kl.error,
        "kl_quantiles": _quantiles(found.estimate_N),
        "kl_at_least": float(found.at_least_N.mean()),
        "same_top": same_top.value,
        "same_top_error": same_top.error,
    }


def _of_text(ours: Rows, theirs: Rows, questions: Numbers) -> dict[str, Any]:
    if not len(ours):
        return {}
    our_logprobs, their_logprobs = (rows["logprob"].astype(float) for rows in (ours, theirs))
    changes = np.exp(their_logprobs) - np.exp(our_logprobs)
    loss_change = clustered_mean(our_logprobs - their_logprobs, questions)
    change = clustered_mean(changes, questions)
    return {
        "num_text": len(ours),
        "text_loss": -float(our_logprobs.mean()),
        "loss_change": loss_change.value,
        "loss_change_error": loss_change.error,
        "probability_change": change.value,
        "probability_change_error": change.error,
        "probability_change_rms": float(np.sqrt(np.mean(changes**2))),
        "probability_change_quantiles": _quantiles(changes),
    }


def _homes(results: RunResults) -> dict[int, Home]:
    """The first question that each request was asked for."""
    homes: dict[int, Home] = {}
    questions: dict[tuple[str, str], int] = {}
    for instance in results.instances:
        question = questions.setdefault((instance.task, instance.instance_id), len(questions))
        for request in instance.requests:
            homes.setdefault(request_key(request), Home(instance.task, question))
    return homes


def _pair(base: Rows, other: Rows, base_keys: Contexts, other_keys: Contexts) -> tuple[Rows, Rows]:
    """The rows of both that have the same key, in the same order; of several with one key the first."""
    _, ours, theirs = np.intersect1d(base_keys, other_keys, return_indices=True)
    return base[ours], other[theirs]


def _places(rows: Rows, homes: Mapping[int, Home]) -> tuple[Numbers, Numbers]:
    """Task and question of each row."""
    found = [homes[request] for request in rows["request"].tolist()]
    return np.array([home.task for home in found], dtype=object), np.array([home.question for home in found], dtype=int)


def _quantiles(values: Numbers) -> list[float]:
    return [float(value) for value in np.quantile(values, QUANTILES)]
