"""The Kullback-Leibler divergence of two distributions, from what was kept of each. Knows no position and no setting.

Shapes: N pairs of distributions, E tokens kept of each.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flexeval.distributions import Rows

Floats = npt.NDArray[np.float64]

_ROUNDING = 1e-7
"""What is left of a distribution counts as so much at least: log-probabilities are known in 32 bits."""
_CHUNK = 4096
"""Pairs compared at once."""


class Divergences(NamedTuple):
    """KL(P || Q) of N pairs, in nats."""

    estimate_N: Floats
    """Unbiased; exact where all of the vocabulary is kept. Never below `at_least_N`."""
    at_least_N: Floats
    """A lower bound: with all that is not told by both as one outcome."""


def divergences(ours: Rows, theirs: Rows) -> Divergences:
    """KL(P || Q) of pairs of rows: P is what ours keep, Q what theirs keep, at the same places.

    H are the tokens that are among the most probable of P and of Q, and the one that stands there in both; T are all
    others, of masses P_T = 1 - sum_H p and Q_T = 1 - sum_H q, and r = P_T / Q_T. Then

        KL = sum_H p log(p / q) + P_T log r + sum_T [p log(p / (r q)) - p + r q]

    exactly, since sum_T (p - r q) = 0. The first two terms are the divergence with T as one outcome, which is never
    more (the data processing inequality: Cover and Thomas, "Elements of Information Theory", 2nd ed., section 2.8).
    Of the third, no term of which is negative, those tokens are known that were kept of both; each is divided by the
    probability that it was (Horvitz and Thompson 1952), the lesser of its two, since both samples go by one random
    number (rank conditioning: Cohen and Kaplan 2007). So the expectation of the estimate is the divergence.
    """
    parts = [
        _divergences(ours[first : first + _CHUNK], theirs[first : first + _CHUNK])
        for first in range(0, len(ours), _CHUNK)
    ]
    return Divergences(*map(np.concatenate, zip(*parts, strict=True))) if parts else Divergences(*np.zeros((2, 0)))


def _divergences(ours: Rows, theirs: Rows) -> Divergences:
    is_shared = ours["token"] == theirs["token"]
    one, other = _entries(ours, is_shared), _entries(theirs, is_shared)
    keys, mine, yours = np.intersect1d(one.keys, other.keys, assume_unique=True, return_indices=True)
    pair, num = (keys >> np.int64(32)).astype(int), len(ours)
    is_head = one.is_certain[mine] & other.is_certain[yours]
    log_p, log_q = one.logprobs[mine], other.logprobs[yours]
    p, q = np.exp(log_p), np.exp(log_q)

    def total(values: Floats, which: npt.NDArray[np.bool_]) -> Floats:
        sums: Floats = np.bincount(pair[which], weights=values[which], minlength=num).astype(float)
        return sums

    p_rest, q_rest = (np.maximum(1 - total(values, is_head), _ROUNDING) for values in (p, q))
    log_r = np.log(p_rest / q_rest)
    merged = np.maximum(total(p * (log_p - log_q), is_head) + p_rest * log_r, 0.0)
    change = log_p - log_q - log_r[pair]
    terms = p * (change + np.expm1(-change))  # p log(p / (r q)) - p + r q
    chances = np.exp(np.minimum(one.log_chances[mine], other.log_chances[yours]))
    return Divergences(merged + total(terms / chances, ~is_head), merged)


class _Entries(NamedTuple):
    """Tokens kept of many distributions, each once in each."""

    keys: npt.NDArray[np.int64]
    """Which distribution, times 2^32, and the token."""
    logprobs: Floats
    log_chances: Floats
    """Logarithm of the probability that a token was kept."""
    is_certain: npt.NDArray[np.bool_]
    """Whether it was kept whatever the random numbers."""


def _entries(rows: Rows, is_shared: npt.NDArray[np.bool_]) -> _Entries:
    """What rows keep; `is_shared` says where the row's own token counts as kept, too."""
    num_top, own_N1 = rows["top_tokens"].shape[1], rows["token"][:, None]
    tokens_NE = np.concatenate([rows["top_tokens"], rows["sampled_tokens"], own_N1], axis=1).astype(np.int64)
    logprobs_NE = np.concatenate([rows["top_logprobs"], rows["sampled_logprobs"], rows["logprob"][:, None]], axis=1)
    logprobs_NE = np.where(tokens_NE < 0, 0.0, logprobs_NE.astype(float))
    is_own_NE = (tokens_NE == own_N1) & is_shared[:, None]
    is_certain_NE = is_own_NE.copy()
    is_certain_NE[:, :num_top] = True
    chances_NE = np.where(is_certain_NE, 0.0, np.minimum(logprobs_NE - rows["threshold"][:, None], 0.0))
    is_kept_NE = tokens_NE >= 0
    is_kept_NE[:, -1] &= is_shared & ~is_own_NE[:, :-1].any(1)
    keys_NE = (np.arange(len(rows)) << 32)[:, None] + tokens_NE
    return _Entries(keys_NE[is_kept_NE], logprobs_NE[is_kept_NE], chances_NE[is_kept_NE], is_certain_NE[is_kept_NE])
