"""The KV cache under a sparse setting: keys come ahead, values when they are chosen, where that spares the link.

Of a layer whose KV rests in host memory beside the compute device, keys and values lie in logs of their own. A row that
decodes is brought its keys ahead of time; the values of its sequences' own contexts it asks for when it has chosen, by
token and KV head (FlexGen: Sheng et al., ICML 2023, section 5). What sequences share comes whole: among all who read it
nearly all of it is chosen. So does all that rests on a disk, which reads blocks of thousands of bytes: hardly one of
them holds nothing that is chosen. Elsewhere logs are read in place.

Shapes: T new tokens, B sequences, L longest context, X rows of single heads, K KV heads, H size of a key, W size of a
value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from flexeval.engine.codecs.kv_format import ChosenKV, KeysValues, KVCoding, KVLog
from flexeval.engine.codecs.kv_halves import KeysFormat, ValuesFormat
from flexeval.engine.compute.contexts import DecodeBatch
from flexeval.engine.compute.row import Row
from flexeval.engine.memory.kv import KVCache
from flexeval.engine.memory.kv_context import HostContext, LoadedContext
from flexeval.engine.memory.lane import Lane
from flexeval.engine.memory.tier import Tier
from flexeval.engine.trace import Trace
from flexeval.planning.rows import AncestorSpan
from flexeval.policy.policy import Tier as TierName

Fetch = Callable[[Tensor, Tensor], Tensor]
"""(places [B, L], chosen [B, L, K]) -> values [B, L, K, W], 0 where they are not chosen."""


class SparseKVCache:
    """What `KVCache` is to a dense setting."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        capacities: Mapping[int, int],
        coding: KVCoding | None,
        device: torch.device,
        lane_in: Lane,
        lane_out: Lane,
        trace: Trace,
    ):
        """As for `KVCache`."""
        self.lane_in = lane_in
        self._device = device
        self._trace = trace
        self._is_apart = [tier.name is TierName.CPU and not tier.is_addressable for tier in tiers]
        make = partial(
            KVCache,
            tiers,
            capacities=capacities,
            coding=coding,
            device=device,
            lane_in=lane_in,
            lane_out=lane_out,
            trace=trace,
        )
        self._together = make()
        self._keys = make(make_form=KeysFormat)
        self._values = make(make_form=ValuesFormat, brings_own=False)

    def load(self, layer: int, row: Row) -> LoadedContext | ApartContext:
        """Bring what a row reads before it has chosen; see `KVCache`."""
        if not self._is_apart[layer]:
            return self._together.load(layer, row)
        keys, values = self._keys.load(layer, row), self._values.load(layer, row)
        groups = [batch.span.group for batch in row.decode]
        return ApartContext(keys, values, {group: partial(self._fetch, layer, group) for group in groups})

    def store(
        self, layer: int, row: Row, keys_TKH: Tensor, values_TKW: Tensor, context: LoadedContext | ApartContext
    ) -> KeysValues:
        """Take the KV of a row's new tokens; see `KVCache`."""
        if isinstance(context, LoadedContext):
            return self._together.store(layer, row, keys_TKH, values_TKW, context)
        keys = self._keys.store(layer, row, keys_TKH, values_TKW, context.keys)
        values = self._values.store(layer, row, keys_TKH, values_TKW, context.values)
        return KeysValues(keys.keys_CKH, values.values_CKW)

    def load_above(self, layer: int, row: Row) -> LoadedContext:
        """Never asked for: the CPU attends to all keys."""
        raise AssertionError("the CPU does not attend under a sparse setting")

    def store_for_host(self, layer: int, row: Row, keys_TKH: Tensor, values_TKW: Tensor) -> HostContext:
        """Never asked for: the CPU attends to all keys."""
        raise AssertionError("the CPU does not attend under a sparse setting")

    def host_token_bytes(self, layer: int) -> int:
        """Nothing that the CPU could attend to."""
        return 0

    def is_in_place(self, layer: int) -> bool:
        """See `KVCache`."""
        return self._together.is_in_place(layer)

    def end_layer(self) -> None:
        """See `KVCache`."""
        for cache in self._caches:
            cache.end_layer()

    def flush(self) -> None:
        """See `KVCache`."""
        for cache in self._caches:
            cache.flush()

    def close(self) -> None:
        """See `KVCache`."""
        for cache in self._caches:
            cache.close()

    @property
    def _caches(self) -> tuple[KVCache, ...]:
        return self._together, self._keys, self._values

    def _fetch(self, layer: int, group: int, index_BL: Tensor, is_chosen_BLK: Tensor) -> Tensor:
        """Bring the values that were chosen of some contexts in a log, once all of its tokens are there."""
        log = self._values.log(layer, group)
        form = log.format
        assert isinstance(form, ValuesFormat)
        sequence_X, step_X, head_X = is_chosen_BLK.nonzero(as_tuple=True)
        row_X = index_BL[sequence_X, step_X].long() * form.shape.num_heads + head_X
        rows_XB = self.lane_in.submit(self._gather, layer, group, row_X).wait()
        values_XW = form.read_rows(rows_XB)
        values_BLKW = values_XW.new_zeros(*is_chosen_BLK.shape, form.shape.value_size)
        values_BLKW[sequence_X, step_X, head_X] = values_XW
        return values_BLKW

    def _gather(self, layer: int, group: int, row_X: Tensor) -> Tensor:
        """Rows of a log in host memory, on the compute device; runs on the lane for KV coming in."""
        log = self._values.log(layer, group)
        memory, form = log.extent.memory(), log.format
        assert memory is not None and isinstance(form, ValuesFormat)
        if log.last_write is not None:
            log.last_write.wait()
        row_X = row_X.cpu()  # and what the write has enqueued is done: the host reads now
        is_pinned = self._device.type == "cuda"
        found_XB = torch.empty(len(row_X), form.row_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        torch.index_select(memory.view(-1, form.row_bytes), 0, row_X, out=found_XB)
        self._trace.moved("kv_in", found_XB.numel())
        return found_XB.to(self._device, non_blocking=True)


class ApartContext(NamedTuple):
    """What one row reads at one layer, its sequences' own values once they are chosen."""

    keys: LoadedContext
    values: LoadedContext
    """Of sequences' own logs, those alone that were rewritten or begun in this very sweep."""
    fetch: dict[int, Fetch]
    """By group."""

    def own_log(self, batch: DecodeBatch) -> _ApartLog:
        """The log of a decode batch."""
        group = batch.span.group
        return _ApartLog(self.keys.own[group], self.values.own.get(group), self.fetch[group])

    def ancestor(self, span: AncestorSpan) -> KeysValues:
        """An ancestor: all of it."""
        return KeysValues(self.keys.ancestor(span).keys_CKH, self.values.ancestor(span).values_CKW)


class _ApartLog(NamedTuple):
    """A log of keys, and one of values that is at hand or elsewhere."""

    keys: KVLog
    values: KVLog | None
    fetch: Fetch

    def at(self, places: Tensor) -> ChosenKV:
        """Keys of some tokens, and where their values come from."""
        keys_BLKH = self.keys.at(places).keys_CKH
        if self.values is not None:
            return KeysValues(keys_BLKH, self.values.at(places).values_CKW)
        return _ToFetch(keys_BLKH, places, self.fetch)


class _ToFetch(NamedTuple):
    """Keys, and values to be brought when they are chosen."""

    keys_CKH: Tensor
    places_BL: Tensor
    fetch: Fetch

    def chosen_values(self, is_chosen_BLK: Tensor) -> Tensor:
        """Values of the heads that are chosen of each token; 0 elsewhere."""
        return self.fetch(self.places_BL, is_chosen_BLK)
