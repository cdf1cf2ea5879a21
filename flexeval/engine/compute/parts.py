"""What tokens of a row see, part by part: a node of the prefix tree, or the contexts in a log of sequences that decode.

A part takes its columns of a sheet of scores, whose columns are positions in the sequence. Knows positions; not what
other parts there are, nor what is chosen.

Shapes: T tokens, K KV heads, M query heads to a KV head, S positions, C tokens of a part, B sequences, L longest
context, P pages of E tokens, G contexts that have pages of their own, H size of a key, W size of a value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexeval.engine.codecs.kv_format import ChosenKV, KeysValues
from flexeval.engine.compute.contexts import DecodeBatch
from flexeval.planning.rows import AncestorSpan


class OwnLog(Protocol):
    """Contexts in a log, whose values may lie elsewhere until they are chosen."""

    def at(self, places: Tensor) -> ChosenKV:
        """Some of its tokens."""
        ...


class SparseContext(Protocol):
    """Gives a row the KV of earlier tokens at the current layer."""

    def own_log(self, batch: DecodeBatch) -> OwnLog:
        """The log of a decode batch, the new tokens' KV included."""
        ...

    def ancestor(self, span: AncestorSpan) -> KeysValues:
        """An ancestor that is not in the row itself."""
        ...


class Extremes(NamedTuple):
    """The least and the most of each number of a page's keys; infinities the wrong way round where there are none."""

    least_GPKH: Tensor
    most_GPKH: Tensor

    def merge(self, other: Extremes) -> None:
        """Take further keys in, in place."""
        torch.minimum(self.least_GPKH, other.least_GPKH, out=self.least_GPKH)
        torch.maximum(self.most_GPKH, other.most_GPKH, out=self.most_GPKH)


@dataclass(frozen=True, kw_only=True)
class NodePart:
    """A node of the prefix tree, seen by its own tokens or by descendants': as far as it is not behind them."""

    start: int
    """First of the tokens that see it, ..."""
    stop: int
    """... and the end of the last: they are neighbours."""
    is_own: bool
    """Whether they are the node's own; each token has one part of its own."""
    first_position: int
    """Of its first token."""
    keys_values: KeysValues
    """Of its tokens."""
    num_columns = 0
    """Columns that a sheet must have for it, though they be behind all of the tokens' positions."""
    num_gathered = 0
    """Tokens of it whose keys and values are gathered for each token that sees it."""

    def cut(self, start: int, stop: int) -> NodePart:
        """What tokens `start` to `stop` of the row see of it, of which it has some; they are counted from 0 then."""
        return replace(self, start=max(self.start, start) - start, stop=min(self.stop, stop) - start)

    def score(self, q_TKMH: Tensor, sheet_TKMS: Tensor) -> None:
        """Fill its columns of a sheet with the products of queries and keys."""
        own_TKMC = self._columns(sheet_TKMS)
        keys_CKH = self.keys_values.keys_CKH[: own_TKMC.shape[-1]].float()
        own_TKMC.copy_(torch.einsum("tkmh,ckh->tkmc", q_TKMH[self.start : self.stop], keys_CKH))

    def attend(self, weights_TKMS: Tensor, out_TKMW: Tensor) -> None:
        """Add its values, weighted."""
        own_TKMC = self._columns(weights_TKMS)
        values_CKW = self.keys_values.values_CKW[: own_TKMC.shape[-1]].float()
        out_TKMW[self.start : self.stop] += torch.einsum("tkmc,ckw->tkmw", own_TKMC, values_CKW)

    def extremes(self, page_tokens: int, num_pages: int) -> Extremes:
        """Of the pages of its keys: one context, for all of its tokens."""
        room = num_pages * page_tokens - self.first_position
        keys_CKH = self.keys_values.keys_CKH[:room].float()

        def paged(filling: float) -> Tensor:
            before, behind = self.first_position, room - len(keys_CKH)
            all_PEKH: Tensor = pad(keys_CKH, (0, 0, 0, 0, before, behind), value=filling).unflatten(0, (num_pages, -1))
            return all_PEKH

        return Extremes(paged(torch.inf).amin(1)[None], paged(-torch.inf).amax(1)[None])

    def _columns(self, sheet_TKMS: Tensor) -> Tensor:
        """Those that the sheet has: no token in it sees more."""
        columns = slice(self.first_position, self.first_position + len(self.keys_values.keys_CKH))
        return sheet_TKMS[self.start : self.stop, ..., columns]


@dataclass(frozen=True, kw_only=True)  # without slots, which leave nothing to cache in
class LogPart:
    """The contexts of sequences that decode, as they lie in a log: of each token its own."""

    start: int
    """As of a node."""
    stop: int
    """As of a node."""
    num_columns: int
    """As of a node: padding has columns too."""
    log: OwnLog
    """Where they lie."""
    index_BL: Tensor
    """Place of each context token in the log."""
    position_BL: Tensor
    """Its position; behind the sequence's last where it is padding."""
    is_own = True
    """As of a node."""

    @property
    def num_gathered(self) -> int:
        """As of a node."""
        return self.index_BL.shape[1]

    def cut(self, start: int, stop: int) -> LogPart:
        """As of a node."""
        first, end = max(self.start, start), min(self.stop, stop)
        rows = slice(first - self.start, end - self.start)
        index_BL, position_BL = self.index_BL[rows], self.position_BL[rows]
        return replace(self, start=first - start, stop=end - start, index_BL=index_BL, position_BL=position_BL)

    def score(self, q_TKMH: Tensor, sheet_TKMS: Tensor) -> None:
        """As of a node."""
        own_TKMS = sheet_TKMS[self.start : self.stop]
        keys_BLKH = self._found.keys_CKH.float()
        products_BKML = torch.einsum("bkmh,blkh->bkml", q_TKMH[self.start : self.stop], keys_BLKH)
        own_TKMS.scatter_(-1, self._columns(own_TKMS), products_BKML)

    def attend(self, weights_TKMS: Tensor, out_TKMW: Tensor) -> None:
        """As of a node."""
        own_TKMS = weights_TKMS[self.start : self.stop]
        weights_BKML = own_TKMS.gather(-1, self._columns(own_TKMS))
        values_BLKW = self._found.chosen_values((weights_BKML > 0).any(2).transpose(1, 2)).float()
        out_TKMW[self.start : self.stop] += torch.einsum("bkml,blkw->bkmw", weights_BKML, values_BLKW)

    def extremes(self, page_tokens: int, num_pages: int) -> Extremes:
        """As of a node, but of one context for each token."""
        keys_BLKH = self._found.keys_CKH.float()
        page_BLKH = (self.position_BL // page_tokens)[..., None, None].expand_as(keys_BLKH)
        nothing = keys_BLKH.new_full((len(keys_BLKH), num_pages, *keys_BLKH.shape[2:]), torch.inf)
        return Extremes(
            nothing.scatter_reduce(1, page_BLKH, keys_BLKH, "amin"),
            nothing.neg().scatter_reduce(1, page_BLKH, keys_BLKH, "amax"),
        )

    @cached_property
    def _found(self) -> ChosenKV:
        return self.log.at(self.index_BL)

    def _columns(self, own_TKMS: Tensor) -> Tensor:
        return self.position_BL[:, None, None].expand(*own_TKMS.shape[:-1], -1)


Part: TypeAlias = NodePart | LogPart
