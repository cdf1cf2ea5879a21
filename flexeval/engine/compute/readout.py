"""From hidden states to tokens and log-probabilities. Knows logits; not layers, nor what the tokens are for.

Log-probabilities are natural logarithms at temperature 1, whatever the sampling. The head runs on needed positions
only, a bounded number of logits at a time. What is read comes to the host at once for a whole row.

Shapes: T tokens of a row, W wanted ones, R those of a chunk, S scores, G generators, N both, K most probable tokens, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flexeval.engine.compute.positions import Chunk, Positions
from flexeval.engine.compute.sampling import Sample, draw_tokens
from flexeval.errors import ModelError
from flexeval.planning.rows import Integers, RowPlan
from flexeval.request import TokenRequest, TopLogprobs

Floats = npt.NDArray[np.float32]
CHUNK_BYTES = 2**28
"""Logits of one chunk in float32 at most."""


class Tokens(NamedTuple):
    """Tokens and what has been read off for each, on the host."""

    token_ids_N: Integers
    """The tokens."""
    logprobs_N: Floats
    """Their log-probabilities."""
    top_ids_NK: Integers
    """The most probable tokens in the place of each, best first, ..."""
    top_logprobs_NK: Floats
    """... and theirs."""

    @classmethod
    def zeros(cls, num_tokens: int, num_top: int) -> Tokens:
        """Room for some."""
        ids, logprobs, shape = np.int32, np.float32, (num_tokens, num_top)
        return cls(
            np.zeros(num_tokens, ids), np.zeros(num_tokens, logprobs), np.zeros(shape, ids), np.zeros(shape, logprobs)
        )

    def part(self, which: slice) -> Tokens:
        """Some of them."""
        token_ids_N, logprobs_N, top_ids_NK, top_logprobs_NK = self
        return Tokens(token_ids_N[which], logprobs_N[which], top_ids_NK[which], top_logprobs_NK[which])

    def tops(self) -> list[TopLogprobs]:
        """The most probable tokens in the place of each, as results have them."""
        num_tokens, num_top = self.top_ids_NK.shape
        if not num_top:
            return [()] * num_tokens
        pairs = zip(self.top_ids_NK.ravel().tolist(), self.top_logprobs_NK.ravel().tolist(), strict=True)
        return list(zip(*[pairs] * num_top, strict=True))  # one iterator, read in turn: without a Python loop


class Readout(NamedTuple):
    """What is read off one row."""

    scored: Tokens
    """In the order of the plan's scores."""
    drawn: Tokens
    """In the order of the plan's generators."""


def read_row(
    plan: RowPlan,
    hidden_1TD: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    sampled: Mapping[int, TokenRequest],
    num_drawn: Callable[[int], int],
    vocab_size: int,
    num_top_logprobs: int,
) -> Readout:
    """Score the prompt tokens and draw the next tokens that a row's plan asks for.

    Args:
        plan: The row's scores and generators.
        hidden_1TD: Hidden states after the last layer.
        head: Hidden states `[1, R, D]` to logits `[1, R, V]`.
        sampled: The requests of the batch that are not greedy.
        num_drawn: How many tokens one of these has drawn before.
        vocab_size: V.
        num_top_logprobs: The most that any request asks for.

    Raises:
        ModelError: A log-probability is infinite or NaN.
    """
    positions, num_top = Positions(plan), min(num_top_logprobs, vocab_size)
    chunks = positions.chunks(max(1, CHUNK_BYTES // (4 * vocab_size)), hidden_1TD.device)
    readings = []
    for chunk in chunks:
        samples = [
            Sample(row, sampled[request], num_drawn(request))
            for row, (_, request) in enumerate(chunk.generators if sampled else ())
            if request in sampled
        ]
        readings.append(_read(head(hidden_1TD[:, chunk.index_R])[0], chunk, samples, num_top))
    token_ids_G, scored_S, drawn_G, top_ids_W, top_logprobs_W = _fetch(readings)
    logprobs_N = np.concatenate([scored_S, drawn_G]).view(np.float32)
    if not np.isfinite(logprobs_N).all():
        raise ModelError("the model's logits are not finite", mend="Compute in float32 (--dtype float32)")
    shape_WK = len(positions.wanted_W), num_top
    tokens = Tokens(
        np.concatenate([plan.scores.token_ids, token_ids_G]),
        logprobs_N,
        top_ids_W.reshape(shape_WK)[positions.place_N],
        top_logprobs_W.view(np.float32).reshape(shape_WK)[positions.place_N],
    )
    num_scores = len(plan.scores)
    return Readout(tokens.part(slice(num_scores)), tokens.part(slice(num_scores, None)))


class _Reading(NamedTuple):
    """What is read off a chunk, on the device."""

    token_ids_G: Tensor
    """Tokens drawn."""
    scored_S: Tensor
    """Log-probabilities of prompt tokens ..."""
    drawn_G: Tensor
    """... and of those drawn."""
    top_ids_RK: Tensor
    """The most probable tokens ..."""
    top_logprobs_RK: Tensor
    """... and theirs."""


def _read(logits_RV: Tensor, chunk: Chunk, samples: Sequence[Sample], num_top: int) -> _Reading:
    """Read a chunk without waiting for the device, unless it samples."""
    # One fused kernel, where torch's logsumexp takes several passes and differs by up to 1e-5.
    logprobs_RV = logits_RV.log_softmax(-1, dtype=torch.float32)
    token_ids_G = draw_tokens(logits_RV if chunk.is_drawn_only else logits_RV[chunk.drawn_G], samples)
    top_logprobs_RK, top_ids_RK = logprobs_RV.topk(num_top)
    return _Reading(
        token_ids_G,
        logprobs_RV[chunk.scored_S, chunk.token_ids_S],
        logprobs_RV[chunk.drawn_G, token_ids_G],
        top_ids_RK,
        top_logprobs_RK,
    )


def _fetch(readings: Sequence[_Reading]) -> list[npt.NDArray[np.int32]]:
    """The bits of each field, chunk after chunk, in one transfer."""
    fields = [[_bits(reading[field]) for reading in readings] for field in range(len(_Reading._fields))]
    parts = [part for field in fields for part in field]
    packed = torch.cat(parts).cpu().numpy() if parts else np.zeros(0, dtype=np.int32)
    ends = accumulate((sum(part.numel() for part in field) for field in fields), initial=0)
    return [packed[first:stop] for first, stop in pairwise(ends)]


def _bits(values: Tensor) -> Tensor:
    return (values if values.is_floating_point() else values.int()).flatten().view(torch.int32)
