"""Attention to some of the keys: scores of all that a token sees, a choice among them, a softmax over the chosen ones.

Every new token chooses, in prompts as well as in decode; why, docs/architecture.md says. Knows rows; not how a method
chooses, nor where KV rests. Plain torch: there is no kernel for it.

Shapes: T tokens, K KV heads, M query heads to a KV head, N = K M, S positions, H size of a key, W size of a value.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from flexeval.engine.compute.attention import Context
from flexeval.engine.compute.parts import Part
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import Row
from flexeval.engine.compute.selection import Selection
from flexeval.engine.compute.sight import PartsInSight, find_parts
from flexeval.planning.rows import Integers

SHEET_SCORES = 2**23
"""Scores written out at a time at most, or those of one token."""
SHEET_BYTES = 32
"""Memory for each of them: the scores and what is sorted of them, masks, weights."""


class SparseAttention:
    """Attention by one method; one instance serves every row and layer."""

    is_recordable = False

    def __init__(self, selection: Selection):
        """Attend to what it chooses."""
        self._selection = selection

    def __call__(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions, row: Row, context: Context
    ) -> Tensor:
        """Attention output `[T, N, W]` of the row's new tokens, whose KV `context` already holds."""
        num_tokens, num_heads, _ = q_TNH.shape
        assert num_tokens == row.plan.num_tokens, (num_tokens, row.plan.num_tokens)
        parts = find_parts(k_TKH, v_TKW, row, context)
        q_TKMH = q_TNH.unflatten(1, (k_TKH.shape[1], -1)).float()
        out_TKMW = q_TKMH.new_zeros(*q_TKMH.shape[:-1], v_TKW.shape[-1])
        positions = np.asarray(row.plan.positions)
        for start, stop in _stretches(num_tokens, num_heads * _num_columns(positions, parts)):
            sight = PartsInSight(
                [part.cut(start, stop) for part in parts if part.start < stop and part.stop > start],
                q_TKMH[start:stop],
                row.positions_1T[0, start:stop],
                max_position=int(positions[start:stop].max()),
                window=options.window,
            )
            scores_TKMS = sight.scores(options)
            scores_TKMS.masked_fill_(~self._selection.keep(scores_TKMS, sight), -torch.inf)
            sight.attend(softmax_with(scores_TKMS, options.sinks_N), out_TKMW[start:stop])
        out_TNW: Tensor = out_TKMW.flatten(1, 2).to(q_TNH.dtype)
        return out_TNW


def softmax_with(scores_TKMS: Tensor, sinks_N: Tensor | None) -> Tensor:
    """Softmax, in place; a sink adds exp(sink) to the denominator of its head and is never chosen away."""
    lse_TKM = scores_TKMS.logsumexp(-1)
    if sinks_N is not None:
        lse_TKM = torch.logaddexp(lse_TKM, sinks_N.float().view(lse_TKM.shape[1:]))
    weights_TKMS: Tensor = scores_TKMS.sub_(lse_TKM[..., None]).exp_()
    return weights_TKMS


def _num_columns(positions: Integers, parts: list[Part]) -> int:
    return max([int(positions.max()) + 1, *(part.num_columns for part in parts)])


def _stretches(num_tokens: int, scores_per_token: int) -> Iterator[tuple[int, int]]:
    """Tokens in stretches whose scores fit in memory."""
    step = max(1, SHEET_SCORES // scores_per_token)
    for start in range(0, num_tokens, step):
        yield start, min(start + step, num_tokens)
