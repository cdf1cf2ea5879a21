"""From hidden states to tokens and log-probabilities. Knows logits; not layers, nor what the tokens are for.

Log-probabilities are natural logarithms at temperature 1, whatever the sampling. The head runs on needed positions
only, a bounded number of logits at a time. What is read comes to the host at once for a whole row.

Shapes: T tokens of a row, W wanted ones, R those of a chunk, S scores, G generators, N both, K most probable tokens, C
columns of what is kept, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flexeval.engine.compute.keeping import Keeper, KeptTensors
from flexeval.engine.compute.log_sums import log_sums
from flexeval.engine.compute.positions import Chunk, Positions
from flexeval.engine.compute.sampling import Sample, draw_tokens
from flexeval.planning.rows import Integers, RowPlan
from flexeval.request import TokenRequest, TopLogprobs

Floats = npt.NDArray[np.float32]
CHUNK_BYTES = 2**28
"""Logits of one chunk in float32 at most."""
TILE = 64
"""Positions of a chunk come in multiples of this, where there are as many: products are computed in tiles."""


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
    kept_ids_NC: Integers
    """What is kept of the distribution in the place of each, as in `Kept`: tokens, ..."""
    kept_logprobs_NC: Floats
    """... and log-probabilities."""

    @classmethod
    def zeros(cls, num_tokens: int, num_top: int, num_columns: int = 0) -> Tokens:
        """Room for some."""
        arrays = [
            array
            for shape in ((num_tokens,), (num_tokens, num_top), (num_tokens, num_columns))
            for array in (np.zeros(shape, np.int32), np.zeros(shape, np.float32))
        ]
        return cls._make(arrays)

    def are_finite(self) -> npt.NDArray[np.bool_]:
        """Of each, whether its log-probability is a finite number."""
        return np.isfinite(self.logprobs_N)

    def part(self, which: slice) -> Tokens:
        """Some of them."""
        return Tokens._make(values[which] for values in self)

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
    keeper: Keeper | None = None,
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
        keeper: Keeps the distributions, if a request asks for that.

    Log-probabilities are infinite or NaN where the model's numbers are none: see `Tokens.are_finite`.
    """
    positions, num_top = Positions(plan), min(num_top_logprobs, vocab_size)
    # Two arrays of a chunk's size, with a keeper or without: how logits are cut must not depend on what others ask.
    size = CHUNK_BYTES // (4 * vocab_size * 2)
    size = size - size % TILE if size > TILE else max(1, size)
    chunks = positions.chunks(size, hidden_1TD.device, has_shifts=keeper is not None)
    readings = []
    for chunk in chunks:
        samples = [
            Sample(row, sampled[request], num_drawn(request))
            for row, (_, request) in enumerate(chunk.generators if sampled else ())
            if request in sampled
        ]
        readings.append(_read(head(hidden_1TD[:, chunk.index_R])[0], chunk, samples, num_top, keeper))
    token_ids_G, scored_S, drawn_G, *columns = _fetch(readings)
    logprobs_N = np.concatenate([scored_S, drawn_G]).view(np.float32)
    num_wanted, num_kept = len(positions.wanted_W), 0 if keeper is None else keeper.num_columns
    shapes = ((num_wanted, num_top), (num_wanted, num_top), (num_wanted, num_kept), (num_wanted, num_kept))
    top_ids_WK, top_logprobs_WK, kept_ids_WC, kept_logprobs_WC = map(np.reshape, columns, shapes)
    tokens = Tokens(
        np.concatenate([plan.scores.token_ids, token_ids_G]),
        logprobs_N,
        top_ids_WK[positions.place_N],
        top_logprobs_WK.view(np.float32)[positions.place_N],
        kept_ids_WC[positions.place_N],
        kept_logprobs_WC.view(np.float32)[positions.place_N],
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
    kept_ids_RC: Tensor
    """What is kept of distributions: tokens, ..."""
    kept_logprobs_RC: Tensor
    """... and log-probabilities."""


def _read(logits_RV: Tensor, chunk: Chunk, samples: Sequence[Sample], num_top: int, keeper: Keeper | None) -> _Reading:
    """Read a chunk without waiting for the device, unless it samples."""
    sums = log_sums(logits_RV)
    logits_GV = logits_RV if chunk.is_drawn_only else logits_RV[chunk.drawn_G]
    if sums is None:
        # One fused kernel, where torch's logsumexp takes several passes and differs by up to 1e-5.
        numbers_RV, best_G = logits_RV.log_softmax(-1, dtype=torch.float32), logits_GV.argmax(-1)
    else:
        numbers_RV, best_G = logits_RV, sums.best_R[chunk.drawn_G]
    token_ids_G = draw_tokens(best_G, logits_GV, samples)
    if sums is not None and num_top == 1:
        top_ids_RK = sums.best_R[:, None]
        top_RK = numbers_RV.gather(1, top_ids_RK)
    else:
        top_RK, top_ids_RK = numbers_RV.topk(num_top)
        if sums is not None and num_top:
            top_ids_RK = _best_first(top_ids_RK, sums.best_R)
    nothing_R0 = numbers_RV.new_empty(len(numbers_RV), 0, dtype=torch.float32)  # no view, which would hold on to all
    kept = KeptTensors(nothing_R0, nothing_R0)
    if keeper is not None:
        logprobs_RV = numbers_RV if sums is None else numbers_RV - sums.lse_R[:, None]
        kept = keeper.keep(logprobs_RV, chunk.shifts_R)
    scored_S, drawn_G = numbers_RV[chunk.scored_S, chunk.token_ids_S], numbers_RV[chunk.drawn_G, token_ids_G]
    if sums is not None:
        scored_S, drawn_G = scored_S - sums.lse_R[chunk.scored_S], drawn_G - sums.lse_R[chunk.drawn_G]
        top_RK = top_RK - sums.lse_R[:, None]
    return _Reading(token_ids_G, scored_S, drawn_G, top_ids_RK, top_RK, *kept)


def _best_first(top_ids_RK: Tensor, best_R: Tensor) -> Tensor:
    """With the token that is drawn in the first place, however many are asked for: others may be as probable."""
    place_R1 = (top_ids_RK == best_R[:, None]).int().argmax(-1, keepdim=True)
    top_ids_RK = top_ids_RK.scatter(1, place_R1, top_ids_RK[:, :1])
    return top_ids_RK.scatter(1, torch.zeros_like(place_R1), best_R[:, None])


def _fetch(readings: Sequence[_Reading]) -> list[npt.NDArray[np.int32]]:
    """The bits of each field, chunk after chunk, in one transfer."""
    fields = [[_bits(reading[field]) for reading in readings] for field in range(len(_Reading._fields))]
    parts = [part for field in fields for part in field]
    packed = torch.cat(parts).cpu().numpy() if parts else np.zeros(0, dtype=np.int32)
    ends = accumulate((sum(part.numel() for part in field) for field in fields), initial=0)
    return [packed[first:stop] for first, stop in pairwise(ends)]


def _bits(values: Tensor) -> Tensor:
    return (values if values.is_floating_point() else values.int()).flatten().view(torch.int32)
