"""Closeness of 4-bit weights on the demo model: what a run says against transformers' whole logits."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from flexeval.asked import RunOptions
from flexeval.backends.transformers import TransformersBackend
from flexeval.models import ModelSource
from flexeval.pipeline import run_suite
from flexeval.progress import LineProgress
from flexeval.report.fidelity import perplexity_ratio
from flexeval.results import QUANTILES

pytestmark = pytest.mark.usefixtures("packaged_questions")


def logprobs(smollm2: ModelSource, setting: str, prompts: list[str]) -> tuple[list[np.ndarray], list[list[int]]]:
    """Log-probabilities after each token but the last, and the tokens but the first, of every prompt."""
    backend = TransformersBackend(smollm2, setting=setting, device="cpu", dtype="float32")
    ids = [backend.text.tokenizer.encode(prompt) for prompt in prompts]
    with torch.no_grad():
        logits = [backend.generator._model(torch.tensor([one])).logits[0, :-1].double().numpy() for one in ids]
    backend.close()
    return [log_softmax(one, axis=-1) for one in logits], [one[1:] for one in ids]


def test_a_run_says_what_whole_logits_say(smollm2: ModelSource, tmp_path: Path):
    suite = tmp_path / "small.conf"
    suite.write_text('entries: [{description: "perplexity:model=text,window_bytes=800", priority: 1}]')
    options = RunOptions(
        suite=str(suite), settings=("none", "w4"), out=tmp_path / "out", max_eval_instances=3, dtype="float32"
    )
    results = run_suite(options, LineProgress(lambda line: None)).results
    prompts = [instance.prompt for instance in results.instances if instance.setting == "none"]
    base, tokens = logprobs(smollm2, "none", prompts)
    other, _ = logprobs(smollm2, "w4", prompts)

    overall, text = results.fidelity
    assert (text.task, text.num_top, text.num_questions) == ("perplexity", 32, 3)
    # The first position is the same in every window: after the prefix token. It is one distribution, of three tokens.
    once = [slice(0 if window == 0 else 1, None) for window in range(3)]
    p, q = (np.concatenate([one[part] for one, part in zip(many, once, strict=True)]) for many in (base, other))
    assert overall.num_positions == len(p)
    assert overall.same_top == pytest.approx(np.mean(p.argmax(1) == q.argmax(1)), abs=2.5 / len(p)), "but for near ties"
    assert overall.tail == pytest.approx(1 - np.sort(np.exp(p), axis=1)[:, -32:].sum(1).mean(), abs=1e-3)

    chosen = [
        np.concatenate([one[np.arange(len(ids)), ids] for one, ids in zip(many, tokens, strict=True)])
        for many in (base, other)
    ]
    assert overall.num_text == len(chosen[0])
    ratio = perplexity_ratio(overall)
    assert ratio is not None
    assert ratio.value == pytest.approx(np.exp(chosen[0].mean() - chosen[1].mean()), rel=1e-3)
    changes = np.exp(chosen[1]) - np.exp(chosen[0])
    assert overall.probability_change == pytest.approx(changes.mean(), abs=1e-4)
    assert overall.probability_change_rms == pytest.approx(np.sqrt((changes**2).mean()), rel=1e-3)

    true = (np.exp(p) * (p - q)).sum(1)
    assert overall.kl == pytest.approx(true.mean(), rel=0.06), "from 64 tokens of 49152"
    assert overall.kl_quantiles[QUANTILES.index(0.99)] == pytest.approx(np.quantile(true, 0.99), rel=0.25)
    assert overall.kl_at_least < 0.8 * true.mean(), "distributions of a model this small are flat"
    windows = np.repeat(np.arange(3), [len(one[part]) for one, part in zip(base, once, strict=True)])
    sums = np.bincount(windows, weights=true - true.mean())
    assert overall.kl_error == pytest.approx(math.sqrt(3 / 2 * (sums**2).sum()) / len(true), rel=0.5)
