"""The least divergence: never above the true one, never below what merging the rest gives, exact where all is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special
from scipy.special import rel_entr

from flexeval.report.divergence import Known, least_divergence

ROUNDING = 2e-6
"""Probabilities below 1e-7 count as 1e-7."""


def distributions(seed, num, vocab_size, sharpness, distance):
    """Log-probabilities of two related models, as numpy arrays `[num, vocab_size]`."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(num, vocab_size)) * sharpness
    return [special.log_softmax(one, axis=-1) for one in (logits, logits + random.normal(size=logits.shape) * distance)]


def known(logprobs, num_top, token=None):
    tokens = np.argsort(-logprobs, axis=-1, kind="stable")[:, :num_top].astype(np.int32)
    token = np.full(len(logprobs), -1, np.int32) if token is None else token
    return Known(
        tokens,
        np.take_along_axis(logprobs, tokens, -1),
        token,
        np.take_along_axis(logprobs, np.maximum(token, 0)[:, None], -1)[:, 0],
    )


def padded(one):
    room = ((0, 0), (0, 3))
    tokens = np.pad(one.tokens_NK, room, constant_values=-1)
    return one._replace(tokens_NK=tokens, logprobs_NK=np.pad(one.logprobs_NK, room, constant_values=-np.inf))


def true_divergence(p, q):
    return rel_entr(np.exp(p), np.exp(q)).sum(-1)


def merged_divergence(p, q):
    """With the tokens that both tell as they are, and all others as one outcome."""
    divergences = []
    for p_tokens, q_tokens, p_logprobs, q_logprobs in zip(
        p.tokens_NK, q.tokens_NK, p.logprobs_NK, q.logprobs_NK, strict=True
    ):
        _, ours, theirs = np.intersect1d(p_tokens, q_tokens, return_indices=True)
        pair = [np.exp(values) for values in (p_logprobs[ours], q_logprobs[theirs])]
        whole = [np.append(values, max(1 - values.sum(), 1e-7)) for values in pair]
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
def test_it_lies_between_the_merged_and_the_true_divergence(seed, vocab_size, num_top, sharpness, distance, has_token):
    p, q = distributions(seed, 8, vocab_size, sharpness, distance)
    num_top = min(num_top, vocab_size)
    token = np.random.default_rng(seed).integers(vocab_size, size=8).astype(np.int32) if has_token else None
    ours, theirs = known(p, num_top, token), known(q, num_top, token)
    least, true = least_divergence(ours, theirs), true_divergence(p, q)
    assert (least <= true + ROUNDING).all()
    assert (least >= merged_divergence(ours, theirs) - ROUNDING).all()


def test_it_is_the_divergence_where_everything_is_known():
    p, q = distributions(1, 200, 50, 2.0, 0.5)
    assert least_divergence(known(p, 50), known(q, 50)) == pytest.approx(true_divergence(p, q), abs=ROUNDING)
    assert least_divergence(padded(known(p, 50)), padded(known(q, 50))) == pytest.approx(
        true_divergence(p, q), abs=ROUNDING
    ), "room for more tokens than there are"


@pytest.mark.parametrize("seed", range(6))
def test_no_completion_of_what_is_known_has_less(seed):
    """A solver looks for the unknown probabilities that make the divergence least."""
    p, q = distributions(seed, 1, 12, 1.0, 0.8)
    ours, theirs = known(p, 4), known(q, 4)
    p_known, q_known = ours.tokens_NK[0], theirs.tokens_NK[0]
    p_free, q_free = (np.setdiff1d(np.arange(12), tokens) for tokens in (p_known, q_known))

    def spread(values):
        p_all, q_all = np.exp(p[0]).copy(), np.exp(q[0]).copy()
        p_all[p_free], q_all[q_free] = values[: len(p_free)], values[len(p_free) :]
        return p_all, q_all

    limits = [np.exp(p[0][p_known]).min()] * len(p_free) + [np.exp(q[0][q_known]).min()] * len(q_free)
    solution = optimize.minimize(
        lambda values: rel_entr(*spread(values)).sum(),
        np.concatenate([np.exp(p[0][p_free]), np.exp(q[0][q_free])]),
        bounds=[(1e-9, limit) for limit in limits],
        constraints=[{"type": "eq", "fun": lambda values: [one.sum() - 1 for one in spread(values)]}],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert solution.success
    assert least_divergence(ours, theirs)[0] == pytest.approx(solution.fun, abs=1e-5)


def test_equal_distributions_do_not_diverge():
    p, _ = distributions(3, 500, 1000, 3.0, 0.0)
    p = p.astype(np.float32).astype(float)
    assert least_divergence(known(p, 20), known(p, 20)).max() < ROUNDING


def test_the_more_is_told_the_more_of_it_is_seen():
    p, q = distributions(4, 50, 2_000, 3.0, 0.3)
    true = true_divergence(p, q).mean()
    shares = [least_divergence(known(p, num), known(q, num)).mean() / true for num in (1, 5, 20, 80, 320, 2_000)]
    assert shares == sorted(shares)
    assert shares[0] < 0.5 and shares[-1] == pytest.approx(1, abs=1e-4)


def test_nothing_and_much_at_once():
    nothing = known(np.zeros((0, 5)), 3)
    assert least_divergence(nothing, nothing).shape == (0,)
    p, q = distributions(5, 9000, 30, 1.0, 0.5)
    many = least_divergence(known(p, 10), known(q, 10))
    few = least_divergence(known(p[8500:8600], 10), known(q[8500:8600], 10))
    assert many[8500:8600] == pytest.approx(few)
