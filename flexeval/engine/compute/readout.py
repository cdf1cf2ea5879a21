"""From hidden states to tokens and log-probabilities. Knows logits; not layers, nor what the tokens are for.

Log-probabilities are natural logarithms at temperature 1, whatever the sampling. The head runs on needed positions
only, a bounded number of logits at a time.

Shapes: T tokens of a row, R positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexeval.errors import ModelError
from flexeval.planning.rows import RowPlan, Score
from flexeval.request import TokenRequest, TopLogprobs

CHUNK_BYTES = 2**28
"""Logits of one chunk in float32 at most."""


class Drawn(NamedTuple):
    """The next token of a sequence."""

    token_id: int
    logprob: float
    top_logprobs: TopLogprobs


class Scored(NamedTuple):
    """The log-probability of one prompt token."""

    logprob: float
    top_logprobs: TopLogprobs


class Readout(NamedTuple):
    """What is read off one row."""

    scored: list[Scored]
    """In the order of the plan's scores."""
    drawn: list[Drawn]
    """In the order of the plan's generators."""


def read_row(
    plan: RowPlan,
    hidden_1TD: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    requests: Sequence[TokenRequest],
    num_drawn: Mapping[int, int],
    vocab_size: int,
    num_top_logprobs: int,
) -> Readout:
    """Score the prompt tokens and draw the next tokens that a row's plan asks for.

    Args:
        plan: The row's scores and generators.
        hidden_1TD: Hidden states after the last layer.
        head: Hidden states `[1, R, D]` to logits `[1, R, V]`.
        requests: All requests of the batch.
        num_drawn: Per request, how many tokens it has drawn before: the place in its random stream.
        vocab_size: V.
        num_top_logprobs: The most that any request asks for.

    Raises:
        ModelError: A log-probability is infinite or NaN.
    """
    scored: list[Scored | None] = [None] * len(plan.scores)
    drawn: list[Drawn | None] = [None] * len(plan.generators)
    wanted = sorted({score.offset for score in plan.scores} | {offset for offset, _ in plan.generators})
    rows_per_chunk = max(1, CHUNK_BYTES // (4 * vocab_size))
    for first in range(0, len(wanted), rows_per_chunk):
        chunk = wanted[first : first + rows_per_chunk]
        place = {offset: row for row, offset in enumerate(chunk)}
        index_R = torch.tensor(chunk, device=hidden_1TD.device)
        logits_RV = head(hidden_1TD[:, index_R])[0].float()
        logprobs_RV = logits_RV.log_softmax(-1)
        tops = top_logprobs(logprobs_RV, num_top_logprobs)
        items = [(i, score) for i, score in enumerate(plan.scores) if score.offset in place]
        for (i, score), logprob in zip(items, _gather(logprobs_RV, place, [s for _, s in items]), strict=True):
            scored[i] = Scored(_finite(logprob), tops[place[score.offset]])
        pairs = [(i, offset, request) for i, (offset, request) in enumerate(plan.generators) if offset in place]
        tokens = draw_tokens(
            logits_RV,
            [place[offset] for _, offset, _ in pairs],
            [requests[request] for *_, request in pairs],
            [num_drawn[request] for *_, request in pairs],
        )
        picked = logprobs_RV[[place[offset] for _, offset, _ in pairs], tokens].tolist() if pairs else []
        for (i, offset, _), token, logprob in zip(pairs, tokens, picked, strict=True):
            drawn[i] = Drawn(token, _finite(logprob), tops[place[offset]])
    everything_scored = [entry for entry in scored if entry is not None]
    everything_drawn = [entry for entry in drawn if entry is not None]
    assert len(everything_scored) == len(scored) and len(everything_drawn) == len(drawn)
    return Readout(everything_scored, everything_drawn)


def _gather(logprobs_RV: Tensor, place: Mapping[int, int], scores: Sequence[Score]) -> list[float]:
    if not scores:
        return []
    rows = torch.tensor([place[score.offset] for score in scores], device=logprobs_RV.device)
    tokens = torch.tensor([score.token_id for score in scores], device=logprobs_RV.device)
    return logprobs_RV[rows, tokens].tolist()


def top_logprobs(logprobs_RV: Tensor, num_top: int) -> list[TopLogprobs]:
    """The `num_top` most probable tokens of each row."""
    if num_top == 0:
        return [()] * logprobs_RV.shape[0]
    values, tokens = logprobs_RV.topk(min(num_top, logprobs_RV.shape[1]), dim=-1)
    return [tuple(zip(t, v, strict=True)) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]


def draw_tokens(
    logits_RV: Tensor, rows: Sequence[int], requests: Sequence[TokenRequest], num_drawn: Sequence[int]
) -> list[int]:
    """The next token of each request: the most probable, or a sample from its own random stream."""
    if not rows:
        return []
    greedy: list[int] = logits_RV[list(rows)].argmax(-1).tolist()
    return [
        token if request.temperature == 0 else sample(logits_RV[row], request, step)
        for token, row, request, step in zip(greedy, rows, requests, num_drawn, strict=True)
    ]


def sample(logits_V: Tensor, request: TokenRequest, step: int) -> int:
    """Draw from softmax(logits / temperature), cut to the nucleus (Holtzman et al. 2020).

    The draw depends on the request's seed and the step alone, not on the batch: it inverts the distribution function at
    a uniform number from the request's own stream.
    """
    logits_V = logits_V.double().cpu()
    scores_V = (logits_V - logits_V.max()) / request.temperature  # at most 0: the lowest temperature overflows to -inf
    probs_V, order_V = scores_V.softmax(-1).sort(descending=True, stable=True)
    before_V = probs_V.cumsum(-1) - probs_V
    kept_V = probs_V.where(before_V < request.top_p, torch.zeros_like(probs_V))
    generator = torch.Generator().manual_seed(((request.seed * 1_000_003) ^ step) % 2**63)
    target = torch.rand((), generator=generator, dtype=torch.float64) * kept_V.sum()
    index = int(torch.searchsorted(kept_V.cumsum(-1), target, right=True))
    return int(order_V[min(index, int((kept_V > 0).sum()) - 1)])


def _finite(logprob: float) -> float:
    if not math.isfinite(logprob):
        raise ModelError("the model's logits are not finite", mend="Compute in float32 (--dtype float32)")
    return logprob
