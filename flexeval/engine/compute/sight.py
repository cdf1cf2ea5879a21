"""What some tokens of a row see: all parts of their contexts on one sheet of scores.

The columns of a sheet are positions in the sequence. So it does not show how a context was cut and shared, and what is
chosen from it is chosen among all parts together. Knows rows; no method of choosing.

Shapes: T tokens, K KV heads, M query heads to a KV head, S positions, P pages, H size of a key, W size of a value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexeval.engine.codecs.kv_format import KeysValues
from flexeval.engine.compute.contexts import DecodeBatch
from flexeval.engine.compute.parts import Extremes, LogPart, NodePart, OwnLog, Part, SparseContext
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import Row


def find_parts(k_TKH: Tensor, v_TKW: Tensor, row: Row, context: SparseContext) -> list[Part]:
    """All that a row's tokens see; for each of its new tokens one part is its own."""
    positions, parts = row.plan.positions, list[Part]()
    for span in row.plan.fresh:
        tokens = slice(span.start, span.start + span.length)
        parts.append(
            NodePart(
                start=tokens.start,
                stop=tokens.stop,
                is_own=True,
                first_position=int(positions[span.start]),
                keys_values=KeysValues(k_TKH[tokens], v_TKW[tokens]),
            )
        )
    for batch in row.decode:
        parts.append(_log_part(batch, row, context.own_log(batch)))
    for ancestor in row.ancestors:
        in_row = ancestor.source.row_start
        if in_row is None:
            keys_values = context.ancestor(ancestor)
        else:
            tokens = slice(in_row, in_row + ancestor.num_keys)
            keys_values = KeysValues(k_TKH[tokens], v_TKW[tokens])
        parts.append(
            NodePart(
                start=ancestor.start,
                stop=ancestor.start + ancestor.length,
                is_own=False,
                first_position=ancestor.first_key_position,
                keys_values=keys_values,
            )
        )
    return parts


def _log_part(batch: DecodeBatch, row: Row, log: OwnLog) -> LogPart:
    stop = batch.span.start + batch.num_sequences
    first_B = row.positions_1T[0, batch.span.start : stop] + 1 - batch.lengths_B
    return LogPart(
        start=batch.span.start,
        stop=stop,
        num_columns=max(batch.span.first_own_positions) + batch.index_BS.shape[1],
        log=log,
        index_BL=batch.index_BS,
        position_BL=first_B[:, None] + batch.steps_S,
    )


class PartsInSight:
    """What some consecutive tokens of a row see: a sheet of scores, and what can be told of its columns."""

    def __init__(
        self, parts: Sequence[Part], q_TKMH: Tensor, position_T: Tensor, *, max_position: int, window: int | None
    ):
        """Tokens with these queries and positions; `parts` are cut to them."""
        self.position_T = position_T
        self.first_T = torch.zeros_like(position_T) if window is None else (position_T + 1 - window).clamp(min=0)
        self.max_visible = max_position + 1 if window is None else min(max_position + 1, window)
        self._parts = parts
        self._q_TKMH = q_TKMH
        self._num_columns = max([max_position + 1, *(part.num_columns for part in parts)])

    def scores(self, options: AttentionOptions) -> Tensor:
        """Scores as a softmax takes them `[T, K, M, S]`, float32; -inf where a token may see no key."""
        sheet_TKMS = self._q_TKMH.new_empty(*self._q_TKMH.shape[:-1], self._num_columns)
        for part in self._parts:
            part.score(self._q_TKMH, sheet_TKMS)
        sheet_TKMS *= options.scale
        if options.softcap is not None:
            sheet_TKMS.div_(options.softcap).tanh_().mul_(options.softcap)
        position_S = torch.arange(self._num_columns, device=sheet_TKMS.device)
        is_seen_TS = (position_S <= self.position_T[:, None]) & (position_S >= self.first_T[:, None])
        return sheet_TKMS.masked_fill_(~is_seen_TS[:, None, None], -torch.inf)

    def attend(self, weights_TKMS: Tensor, out_TKMW: Tensor) -> None:
        """Add up all values, weighted."""
        for part in self._parts:
            part.attend(weights_TKMS, out_TKMW)

    def page_bounds(self, page_tokens: int) -> Tensor:
        """The most that a query's product with any key of a page can be `[T, K, M, P]`.

        Number by number the larger of the products with the page's least and its most (Tang et al. 2024, algorithm 1).
        Of pages that a token sees only a part of, it is any number.
        """
        num_pages = -(-self._num_columns // page_tokens)
        bounds_TKMP = self._q_TKMH.new_empty(*self._q_TKMH.shape[:-1], num_pages)
        above = [(part, part.extremes(page_tokens, num_pages)) for part in self._parts if not part.is_own]
        for own in self._parts:
            if not own.is_own:
                continue
            pages = own.extremes(page_tokens, num_pages)
            is_one = len(pages.least_GPKH) == 1
            for part, found in above:
                first, end = max(part.start, own.start), min(part.stop, own.stop)
                if first < end:
                    rows = slice(None) if is_one else slice(first - own.start, end - own.start)
                    Extremes(pages.least_GPKH[rows], pages.most_GPKH[rows]).merge(found)
            q_TKMH = self._q_TKMH[own.start : own.stop]
            form = "tkmh,pkh->tkmp" if is_one else "tkmh,tpkh->tkmp"
            least, most = (page_GPKH[0] if is_one else page_GPKH for page_GPKH in pages)
            bounds = torch.einsum(form, q_TKMH.clamp(min=0), most) + torch.einsum(form, q_TKMH.clamp(max=0), least)
            bounds_TKMP[own.start : own.stop] = bounds
        return bounds_TKMP
