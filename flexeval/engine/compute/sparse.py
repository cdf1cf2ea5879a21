"""Attention to some of the keys: scores of all that a token sees, a choice among them, a softmax over the chosen ones.

Every new token chooses, in prompts as well as in decode; why, docs/architecture.md says. Knows rows; not how a method
chooses, nor where KV rests. Plain torch: there is no kernel for it.

Shapes: T tokens, K KV heads, M query heads to a KV head, N = K M, S positions, H size of a key, W size of a value.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flexeval.engine.compute.parts import Part, SparseContext
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import Row
from flexeval.engine.compute.selection import Selection
from flexeval.engine.compute.sight import PartsInSight, find_parts
from flexeval.planning.rows import Integers
from flexeval.policy.sparse import GATHERED_NUMBERS, SHEET_SCORES


class SparseAttention:
    """Attention by one method; one instance serves every row and layer."""

    is_recordable = False

    def __init__(self, selection: Selection):
        """Attend to what it chooses."""
        self._selection = selection

    def __call__(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions, row: Row, context: SparseContext
    ) -> Tensor:
        """Attention output `[T, N, W]` of the row's new tokens, whose KV `context` already holds."""
        num_tokens, num_heads, _ = q_TNH.shape
        assert num_tokens == row.plan.num_tokens, (num_tokens, row.plan.num_tokens)
        parts = find_parts(k_TKH, v_TKW, row, context)
        q_TKMH = q_TNH.unflatten(1, (k_TKH.shape[1], -1)).float()
        out_TKMW = q_TKMH.new_zeros(*q_TKMH.shape[:-1], v_TKW.shape[-1])
        positions = np.asarray(row.plan.positions)
        at_once = tokens_at_once(positions, parts, num_heads, num_numbers=k_TKH[0].numel() + v_TKW[0].numel())
        for start in range(0, num_tokens, at_once):
            stop = min(start + at_once, num_tokens)
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
    """Softmax; a sink adds exp(sink) to the denominator of its head and is never chosen away."""
    weights_TKMS = scores_TKMS.softmax(-1)
    if sinks_N is not None:
        lse_TKM = scores_TKMS.logsumexp(-1)
        weights_TKMS *= torch.sigmoid(lse_TKM - sinks_N.float().view(lse_TKM.shape[1:]))[..., None]
    return weights_TKMS


def tokens_at_once(positions: Integers, parts: Sequence[Part], num_heads: int, *, num_numbers: int) -> int:
    """Tokens whose scores, and keys and values of `num_numbers` a token as far as they are gathered, fit in memory."""
    num_columns = max([int(positions.max()) + 1, *(part.num_columns for part in parts)])
    num_gathered = max(part.num_gathered for part in parts)
    at_once = min(SHEET_SCORES // (num_heads * num_columns), GATHERED_NUMBERS // max(1, num_numbers * num_gathered))
    return max(1, at_once)
