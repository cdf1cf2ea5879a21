"""From logits to the next token. Knows requests and their random streams; not where logits come from.

Shapes: G tokens to draw, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexeval.request import TokenRequest


class Sample(NamedTuple):
    """A token that is sampled, where others are the most probable ones."""

    row: int
    """Which of the logits it is drawn from."""
    request: TokenRequest
    """How."""
    step: int
    """Tokens that its request has drawn before: the place in its random stream."""


def draw_tokens(best_G: Tensor, logits_GV: Tensor, samples: Sequence[Sample]) -> Tensor:
    """The next token after each position: the most probable, or a sample where `samples` has one."""
    if not samples:
        return best_G
    token_ids_G = best_G.clone()
    for row, request, step in samples:
        token_ids_G[row] = sample(logits_GV[row], request, step)
    return token_ids_G


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
