"""The next token: samples have their distribution, depend on nothing but their request, and are greedy at the limit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from flexeval.engine.compute.sampling import Sample, draw_tokens, sample
from flexeval.request import TokenRequest

LOGITS_V = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.5, -3.0])
NUM_SAMPLES = 1500


def distribution(temperature: float, top_p: float) -> Tensor:
    """Softmax at a temperature, cut to the smallest set that holds `top_p`, and scaled back to 1."""
    probs_V = (LOGITS_V.double() / temperature).softmax(-1)
    order = probs_V.argsort(descending=True).tolist()
    kept, total = [], 0.0
    for token in order:
        if total >= top_p:
            break
        kept.append(token)
        total += float(probs_V[token])
    out_V = torch.zeros_like(probs_V)
    out_V[kept] = probs_V[kept] / total
    return out_V


def request(**values: float) -> TokenRequest:
    return TokenRequest(prompt_ids=(1,), max_tokens=1, **values)


@pytest.mark.parametrize("stream", ["seeds", "steps"])
@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (3.0, 1.0), (1.0, 0.9), (1.0, 0.5), (2.0, 0.7)]
)
def test_samples_have_the_right_distribution(temperature: float, top_p: float, stream: str) -> None:
    """Chi-square over consecutive seeds and over the consecutive steps of one seed; both are fixed."""
    asked = request(temperature=temperature, top_p=top_p)
    places = [(draw, 0) if stream == "seeds" else (3, draw) for draw in range(NUM_SAMPLES)]
    tokens = [sample(LOGITS_V, dataclasses.replace(asked, seed=seed), step) for seed, step in places]
    counts_V = torch.bincount(torch.tensor(tokens), minlength=len(LOGITS_V))
    expected_V = distribution(temperature, top_p) * NUM_SAMPLES
    assert counts_V[expected_V == 0].sum() == 0, "nothing from outside the nucleus"
    possible = expected_V > 0
    if possible.sum() > 1:
        assert chisquare(counts_V[possible].numpy(), expected_V[possible].numpy()).pvalue > 1e-3


def test_neighbouring_seeds_and_steps_draw_independently() -> None:
    """Pairs of draws from neighbouring streams fill the square of two choices evenly."""
    logits_V = torch.zeros(4)
    for seed_step, next_step in (((1, 0), (0, 1)), ((0, 1), (1, 0)), ((1, 0), (1, 1))):
        counts = torch.zeros(4, 4)
        for draw in range(NUM_SAMPLES):
            seed, step = draw * seed_step[0], draw * seed_step[1]
            one = sample(logits_V, request(temperature=1.0, seed=seed), step)
            other = sample(logits_V, request(temperature=1.0, seed=seed + next_step[0]), step + next_step[1])
            counts[one, other] += 1
        assert chisquare(counts.flatten().numpy()).pvalue > 1e-3


def test_a_sample_does_not_depend_on_the_batch() -> None:
    logits_RV = torch.randn(40, 30, generator=torch.Generator().manual_seed(2))
    asked = [request(temperature=1.0, top_p=0.9, seed=seed) for seed in range(40)]
    best_R = logits_RV.argmax(-1)
    together = draw_tokens(best_R, logits_RV, [Sample(i, asked[i], i % 3) for i in range(40)]).tolist()
    alone = [int(draw_tokens(best_R[[i]], logits_RV[[i]], [Sample(0, asked[i], i % 3)])) for i in reversed(range(40))]
    assert together == alone[::-1] != logits_RV.argmax(-1).tolist()
    half = draw_tokens(best_R, logits_RV, [Sample(i, asked[i], i % 3) for i in range(0, 40, 2)]).tolist()
    assert half[::2] == together[::2] and half[1::2] == logits_RV.argmax(-1).tolist()[1::2]
    global_state = torch.get_rng_state()
    sample(logits_RV[0], asked[0], 0)
    assert torch.equal(torch.get_rng_state(), global_state), "nobody else's stream is touched"


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-3])
def test_a_very_low_temperature_is_greedy(temperature: float) -> None:
    logits_V = torch.tensor([-50.0, 700.0, 699.0, -torch.inf])
    assert {sample(logits_V, request(temperature=temperature, seed=seed), 0) for seed in range(20)} == {1}


def test_a_very_high_temperature_is_uniform() -> None:
    logits_V = torch.tensor([-50.0, 700.0, 0.0, 3.0])
    tokens = [sample(logits_V, request(temperature=1e308, seed=seed), 0) for seed in range(NUM_SAMPLES)]
    assert chisquare(torch.bincount(torch.tensor(tokens), minlength=4).numpy()).pvalue > 1e-3


def test_a_very_small_nucleus_holds_the_most_probable_token_alone() -> None:
    for temperature in (1.0, 100.0):
        asked = request(temperature=temperature, top_p=5e-324)
        assert {sample(LOGITS_V, dataclasses.replace(asked, seed=seed), 0) for seed in range(20)} == {2}


def test_a_nucleus_holds_no_more_tokens_than_it_needs() -> None:
    two_equal_V = torch.zeros(2)
    for top_p, possible in ((0.5, {0}), (0.51, {0, 1})):
        asked = [request(temperature=1.0, top_p=top_p, seed=seed) for seed in range(20)]
        assert {sample(two_equal_V, one, 0) for one in asked} == possible


def test_a_token_that_is_ruled_out_is_never_drawn() -> None:
    logits_V = torch.full((1000,), -torch.inf)
    logits_V[[17, 900]] = 0.0
    assert {sample(logits_V, request(temperature=9.0, seed=seed), 0) for seed in range(50)} == {17, 900}
