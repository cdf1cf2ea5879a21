"""The divergence from what is kept: right on average, exact where all is kept, never below what merging gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_rows import make_rows
from scipy import special
from scipy.special import rel_entr

from flexeval.report.divergence import divergences

ROUNDING = 1e-5
"""Log-probabilities are kept in 32 bits."""


def distributions(seed, num, vocab_size, sharpness, distance):
    """Log-probabilities of two related models, `[num, vocab_size]`."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(num, vocab_size)) * sharpness
    moved = logits + random.normal(size=logits.shape) * distance
    return [special.log_softmax(one.astype(np.float32), axis=-1) for one in (logits, moved)]


def true_divergence(p, q):
    return rel_entr(*(special.softmax(one.astype(float), axis=-1) for one in (p, q))).sum(-1)


def merged_divergence(p, q, num_top, tokens=None):
    """With the tokens among the `num_top` of both, and the position's own, as they are, and all others as one."""
    divergences = []
    for place, pair in enumerate(zip(np.exp(p.astype(float)), np.exp(q.astype(float)), strict=True)):
        heads = [set(np.argsort(-one, kind="stable")[:num_top].tolist()) for one in pair]
        head = sorted(heads[0] & heads[1] | (set() if tokens is None else {int(tokens[place])}))
        whole = [np.append(one[head], max(1 - one[head].sum(), 1e-7)) for one in pair]
        divergences.append(rel_entr(*whole).sum())
    return np.array(divergences)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.integers(2, 300),
    num_top=st.integers(1, 40),
    sharpness=st.sampled_from([0.1, 1.0, 3.0, 8.0]),
    distance=st.sampled_from([0.0, 0.01, 0.3, 1.0, 4.0]),
    has_token=st.booleans(),
)
def test_the_bound_is_the_merged_divergence_and_never_above_the_true_one(
    seed, vocab_size, num_top, sharpness, distance, has_token
):
    p, q = distributions(seed, 8, vocab_size, sharpness, distance)
    tokens = np.random.default_rng(seed).integers(vocab_size, size=8) if has_token else None
    found = divergences(*(make_rows(one, num_top, tokens) for one in (p, q)))
    assert found.at_least_N == pytest.approx(merged_divergence(p, q, num_top, tokens), abs=ROUNDING, rel=1e-4)
    assert (found.at_least_N <= true_divergence(p, q) * (1 + 2e-4) + ROUNDING).all()  # a rest of 32-bit numbers
    assert (found.estimate_N >= found.at_least_N).all()


@pytest.mark.parametrize("num_top", [25, 30, 50, 60])
def test_it_is_the_divergence_where_all_of_the_vocabulary_is_kept(num_top):
    p, q = distributions(1, 200, 50, 2.0, 0.5)
    found = divergences(make_rows(p, num_top), make_rows(q, num_top))
    assert found.estimate_N == pytest.approx(true_divergence(p, q), abs=ROUNDING)


@pytest.mark.parametrize("has_token", [False, True])
@pytest.mark.parametrize("num_top", [1, 4, 12])
@pytest.mark.parametrize("distance", [0.05, 1.0])
def test_the_estimate_is_right_on_average_over_the_random_numbers(num_top, distance, has_token):
    """One pair of distributions, at many places: only the random numbers differ."""
    p, q = distributions(2, 1, 120, 1.5, distance)
    num_places = 20_000
    pair = [np.repeat(one, num_places, axis=0) for one in (p, q)]
    tokens = np.full(num_places, 7) if has_token else None
    estimates = divergences(*(make_rows(one, num_top, tokens) for one in pair)).estimate_N
    error = estimates.std() / np.sqrt(num_places)
    true = true_divergence(p, q)[0]
    assert error < 0.1 * true
    assert abs(estimates.mean() - true) < 4 * error


def test_random_numbers_of_different_places_are_unrelated():
    """Else errors would not average out over positions as the reported standard error says."""
    p, q = distributions(3, 1, 300, 1.0, 0.5)
    pair = [np.repeat(one, 8_000, axis=0) for one in (p, q)]
    estimates = divergences(*(make_rows(one, 8) for one in pair)).estimate_N
    means = estimates.reshape(80, 100).mean(1)
    assert means.std(ddof=1) == pytest.approx(estimates.std() / 10, rel=0.25)


def test_over_positions_it_is_close_to_whole_distributions():
    p, q = distributions(4, 3_000, 2_000, 3.0, 0.3)
    true = true_divergence(p, q)
    found = divergences(make_rows(p, 32), make_rows(q, 32))
    error = (found.estimate_N - true).std() / np.sqrt(len(p))
    assert found.estimate_N.mean() == pytest.approx(true.mean(), abs=4 * error) and error < 0.01 * true.mean()
    assert found.at_least_N.mean() < 0.9 * true.mean(), "the sample is worth its room"


def test_equal_distributions_do_not_diverge():
    p, _ = distributions(5, 500, 1000, 3.0, 0.0)
    assert divergences(make_rows(p, 20), make_rows(p, 20)).estimate_N.max() < 1e-6


def test_nothing_and_much_at_once():
    nothing = make_rows(np.zeros((0, 5), np.float32), 3)
    assert [one.shape for one in divergences(nothing, nothing)] == [(0,), (0,)]
    p, q = (make_rows(one, 10) for one in distributions(6, 9000, 30, 1.0, 0.5))
    some = slice(4000, 4300)
    assert divergences(p, q).estimate_N[some] == pytest.approx(divergences(p[some], q[some]).estimate_N)
