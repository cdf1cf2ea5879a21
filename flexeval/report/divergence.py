"""The Kullback-Leibler divergence of two distributions of which only the most probable tokens are known.

What is unknown is taken to be what makes the divergence least: the figure is a lower bound of the true one. Knows no
position and no setting.

Shapes: N pairs of distributions, K known tokens of each.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int32]

_ROUNDING = 1e-7
"""Probabilities are known to about so much: they are computed in 32 bits."""
_LOG_RATIO = 16.0
"""Ratios of unknown probabilities are looked for within exp of this, up and down."""
_NUM_HALVINGS = 24
_CHUNK = 4096
"""Pairs compared at once: each takes K times K comparisons."""


class Known(NamedTuple):
    """What is known of N distributions."""

    tokens_NK: Integers
    """The most probable tokens, best first; negative where there are fewer."""
    logprobs_NK: Floats
    """Their natural log-probabilities."""
    token_N: Integers
    """One more token, probable or not; negative for none."""
    logprob_N: Floats
    """Its log-probability."""

    def part(self, which: slice) -> Known:
        """Some of the distributions."""
        tokens_NK, logprobs_NK, token_N, logprob_N = self
        return Known(tokens_NK[which], logprobs_NK[which], token_N[which], logprob_N[which])


def least_divergence(p: Known, q: Known) -> Floats:
    """The least KL(P || Q), in nats, of each pair of distributions that have these most probable tokens.

    A token that both tell counts as it is. One that only P tells has in Q at most the probability of the last that Q
    tells, and the other way round; the rest of each is one outcome. To merge it so can only lower the divergence (the
    data processing inequality: Cover and Thomas, "Elements of Information Theory", 2nd ed., section 2.8). The least
    over all probabilities within these limits is a convex problem whose dual has one multiplier `r` here, the ratio of
    P to Q where no limit binds. Any `r` gives a lower bound (weak duality: Boyd and Vandenberghe, "Convex
    Optimization", section 5.2.2); the best one is found by bisection.
    """
    starts = range(0, len(p.token_N), _CHUNK)
    parts = [_least(p.part(slice(first, first + _CHUNK)), q.part(slice(first, first + _CHUNK))) for first in starts]
    return np.concatenate(parts) if parts else np.zeros(0)


def _least(p: Known, q: Known) -> Floats:
    both = (p.token_N == q.token_N) & (p.token_N >= 0)
    p_tokens, p_probs, q_tokens, q_probs = (*_with_token(p, both), *_with_token(q, both))
    match_NKK = (p_tokens[:, :, None] == q_tokens[:, None, :]) & (p_tokens >= 0)[:, :, None]
    in_q_NK, in_p_NK = match_NKK.any(2), match_NKK.any(1)
    q_of_p_NK = np.where(in_q_NK, np.take_along_axis(q_probs, match_NKK.argmax(2), 1), 1.0)
    shared = np.where(in_q_NK, p_probs, 0.0)
    known = (shared * np.log(np.where(in_q_NK, p_probs, 1.0) / q_of_p_NK)).sum(1)
    # A: tokens that only P tells. B: those that only Q tells. Then what is left for the tokens that each leaves open.
    a_NK, b_NK = np.where(in_q_NK, 0.0, p_probs), np.where(in_p_NK, 0.0, q_probs)
    p_open = np.maximum(1 - p_probs.sum(1), 0.0)
    q_open = np.maximum(1 - q_probs.sum(1), _ROUNDING)
    p_limit, q_limit = _last(p), _last(q)
    low, high = np.full(len(known), -_LOG_RATIO), np.full(len(known), _LOG_RATIO)
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        r = np.exp(middle)[:, None]
        slope = p_open - np.minimum(r * b_NK, p_limit).sum(1) - r[:, 0] * q_open + np.minimum(a_NK, r * q_limit).sum(1)
        low, high = np.where(slope > 0, middle, low), np.where(slope > 0, high, middle)
    log_r = (low + high)[:, None] / 2
    r = np.exp(log_r)
    q_of_a, p_of_b = np.minimum(a_NK / r, q_limit), np.minimum(r * b_NK, p_limit)
    terms_a = a_NK * _log_ratio(a_NK, q_of_a) + r * q_of_a
    terms_b = p_of_b * (_log_ratio(p_of_b, b_NK) - 1 - log_r)
    rest = (1 + log_r[:, 0]) * p_open - r[:, 0] * q_open
    least: Floats = np.maximum(known + terms_a.sum(1) + terms_b.sum(1) + rest, 0.0)
    return least


def _with_token(known: Known, is_used: npt.NDArray[np.bool_]) -> tuple[Integers, Floats]:
    """Tokens and probabilities, and after them the one more token where it is used and not among them."""
    is_new = is_used & ~(known.tokens_NK == known.token_N[:, None]).any(1)
    tokens = np.column_stack([known.tokens_NK, np.where(is_new, known.token_N, -1)])
    logprobs = np.column_stack([known.logprobs_NK, np.where(is_new, known.logprob_N, -np.inf)])
    return tokens, np.where(tokens < 0, 0.0, np.exp(logprobs))


def _last(known: Known) -> Floats:
    """The probability that no untold token exceeds, as a column."""
    return np.exp(known.logprobs_NK[:, -1:])


def _log_ratio(numerator: Floats, denominator: Floats) -> Floats:
    is_there = numerator > 0
    return np.log(np.where(is_there, numerator, 1.0) / np.where(is_there, denominator, 1.0))
