"""The KV cache: per layer and group one append-only log of tokens. Knows logs, tiers and lanes; not sequences.

A log is appended to in the order in which tokens are computed, so that reading what a group needs is one run of bytes.
Where it rests on memory that the compute device addresses it is used in place; elsewhere it is read ahead into a
buffer with room for the step's new tokens, which are written behind. A log has room for all that it can come to hold
from its first token on, and keeps it until the batch ends: nothing is allocated from sweep to sweep.

Where tokens rest coded, all attend to what comes back of the others, in whatever row and sweep these were computed:
what a request is answered depends neither on its neighbours nor on the policy.

Shapes: T new tokens of a row, C tokens of a log, B bytes of a token, K KV heads, H size of a key, W size of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from flexeval.engine.codecs.kv_format import KeysValues, KVCoding, KVFormat, KVLog, KVShape, make_format
from flexeval.engine.compute.row import CompactionBatch, Row
from flexeval.engine.memory.kv_context import HostContext, LoadedContext, Log
from flexeval.engine.memory.lane import Lane, Transfer, drain
from flexeval.engine.memory.read_buffers import ReadBuffers
from flexeval.engine.memory.tier import Tier
from flexeval.engine.trace import Trace
from flexeval.planning.rows import Keep, KeySource
from flexeval.policy.policy import Tier as TierName

MakeForm = Callable[[KVShape, torch.dtype, KVCoding | None], KVFormat]
COMPACTED_TOKENS = 4096
"""Tokens of a log that move at a time."""


class KVCache:
    """The logs of one batch of requests, and the scratch of the current layer."""

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
        make_form: MakeForm = make_format,
        brings_own: bool = True,
    ):
        """A cache whose layer l rests on `tiers[l]`, each token as `coding` says.

        Args:
            tiers: Of each layer.
            capacities: The most tokens of each group's log.
            coding: What the setting does to keys and values.
            device: Where they are computed.
            lane_in: For KV coming in.
            lane_out: For KV going out.
            trace: Where bytes are counted.
            make_form: How a layer's tokens rest.
            brings_own: Whether the logs of sequences that decode are read where they do not lie in place; what is
                rewritten is read in any case.
        """
        self._tiers = tiers
        self._capacities = capacities
        self._coding = coding
        self._lane_out = lane_out
        self.lane_in = lane_in
        self._trace = trace
        self._logs: dict[tuple[int, int], Log] = {}
        self._token_bytes: dict[int, int] = {}
        self._scratch: dict[int, KeysValues] = {}
        self._make_form = make_form
        self._brings_own = brings_own
        self._buffers = ReadBuffers(device)

    def load(self, layer: int, row: Row) -> LoadedContext:
        """Bring what a row reads at a layer to the device; runs on the lane for KV coming in.

        Two loads may be outstanding: the one in use and the next. Where all lies in place, or the row reads no log, it
        may run anywhere.
        """
        return self._load(layer, row, brings_own=self._brings_own)

    def load_above(self, layer: int, row: Row) -> LoadedContext:
        """Bring what a row's sequences share, and nothing else; as `load`."""
        return self._load(layer, row, brings_own=False)

    def store(self, layer: int, row: Row, keys_TKH: Tensor, values_TKW: Tensor, context: LoadedContext) -> KeysValues:
        """Take the KV of a row's new tokens: into logs, and into the scratch for later rows of the sweep.

        Returns:
            What the row's own tokens attend to: where tokens rest coded, what comes back of them. Sequences that decode
            read theirs in their log.
        """
        seen = given = KeysValues(keys_TKH, values_TKW)
        coded_TB = None
        if self._coding is not None and row.plan.fresh:
            coded = self._format_of(given)
            coded_TB = keys_TKH.new_empty(len(keys_TKH), coded.token_bytes, dtype=torch.uint8)
            coded.write(keys_TKH, values_TKW, coded_TB)
            seen = coded.read(coded_TB, slice(None))
        for span in row.plan.scratch:
            tokens = slice(span.start, span.start + span.length)
            self._scratch[span.node] = KeysValues(*(part[tokens] for part in seen))
        places = {batch.span.group: batch.last_place_B for batch in row.decode}
        for keep in row.plan.keeps:
            self._append(layer, keep, given, coded_TB, places.get(keep.group), context)
        return seen

    def store_for_host(self, layer: int, row: Row, keys_TKH: Tensor, values_TKW: Tensor) -> HostContext:
        """Take the KV of a row for which the CPU attends; where it finds what the sequences have for themselves."""
        self.store(layer, row, keys_TKH, values_TKW, LoadedContext({}, {}, {}))
        return HostContext({batch.span.group: self._logs[layer, batch.span.group] for batch in row.decode})

    def host_token_bytes(self, layer: int) -> int:
        """Bytes of a token's KV at a layer whose KV rests in host memory; 0 at others, and before there is any."""
        return self._token_bytes.get(layer, 0) if self._tiers[layer].name is TierName.CPU else 0

    def is_in_place(self, layer: int) -> bool:
        """Whether a layer's logs lie, for as long as this cache, where the compute device reads and writes them."""
        return self._tiers[layer].is_addressable

    def log(self, layer: int, group: int) -> Log:
        """A log that there is."""
        return self._logs[layer, group]

    def end_layer(self) -> None:
        """Forget the scratch: the sweep moves on to the next layer."""
        self._scratch.clear()

    def flush(self) -> None:
        """Wait for what is written behind; raises where any of it failed, read or not."""
        for log in self._logs.values():
            if log.last_write is not None:
                log.last_write.wait()

    def close(self) -> None:
        """Give back everything, also in the middle of a sweep."""
        drain(self.lane_in)
        drain(self._lane_out)
        for log in self._logs.values():
            log.extent.free()
        self._logs = {}
        self._scratch.clear()

    def _load(self, layer: int, row: Row, *, brings_own: bool) -> LoadedContext:
        groups = row.read_groups
        if groups and not self.is_in_place(layer):
            self._buffers.next_turn()
        logs = {group: log for group in groups if (log := self._logs.get((layer, group))) is not None}
        rooms = {batch.span.group: batch.num_sequences for batch in row.decode}
        held: dict[int, Tensor] = {}  # logs as a whole
        for compaction in row.compactions:
            held[compaction.group] = self._compact(logs[compaction.group], compaction, rooms.get(compaction.group, 0))
        for batch in row.decode if brings_own else ():
            if batch.span.group in logs and batch.span.group not in held:
                log, span = logs[batch.span.group], batch.span
                held[span.group] = self._read(log, 0, span.log_length, room=batch.num_sequences)
        ancestors: dict[KeySource, KVLog] = {}
        for ancestor in row.ancestors:
            source = ancestor.source
            if source.group is None or source in ancestors:
                continue
            if source.group in held:
                tokens_CB = held[source.group][source.log_start : source.log_start + ancestor.num_keys]
            else:
                tokens_CB = self._read(logs[source.group], source.log_start, ancestor.num_keys, room=0)
            ancestors[source] = KVLog(logs[source.group].format, tokens_CB)
        own = {group: KVLog(logs[group].format, held[group]) for group in rooms if group in held}
        return LoadedContext(own, ancestors, MappingProxyType(self._scratch))  # which is not looked through

    def _read(self, log: Log, start: int, num_tokens: int, *, room: int) -> Tensor:
        """Tokens of a log on the device, with room for more behind them; in place, where that is possible."""
        if (view := log.extent.view()) is not None:
            return log.tokens(view)[start:] if room else log.tokens(view)[start : start + num_tokens]
        if log.last_write is not None:
            log.last_write.wait()
        token_bytes = log.format.token_bytes
        num_bytes = num_tokens * token_bytes
        most_bytes = log.extent.num_bytes - start * token_bytes if room else num_bytes  # a log that grows
        # No log grows beyond its extent: one that is full is compacted, and has its room then.
        buffer = self._buffers.take(min(num_bytes + room * token_bytes, most_bytes), most_bytes=most_bytes)
        log.extent.read(buffer[: num_tokens * token_bytes], start * token_bytes)
        self._trace.moved("kv_in", num_tokens * token_bytes)
        return log.tokens(buffer)

    def _compact(self, log: Log, compaction: CompactionBatch, room: int) -> Tensor:
        """Rewrite a log, where it rests and as it is read: a part at a time, so that no second copy is needed.

        Tokens only move up, and in their order: what a part overwrites has been moved before.
        """
        num_tokens = compaction.places_C.numel()
        tokens_CB = self._read(log, 0, compaction.log_length, room=room)
        for start in range(0, num_tokens, COMPACTED_TOKENS):
            places_C = compaction.places_C[start : start + COMPACTED_TOKENS]
            tokens_CB[start : start + places_C.numel()] = tokens_CB.index_select(0, places_C)
        if log.extent.view() is None:
            log.last_write = self._lane_out.submit(self._write, log, log.last_write, 0, tokens_CB[:num_tokens])
            self._buffers.keep_for(log.last_write)
        return tokens_CB[: num_tokens + room]

    def _append(
        self,
        layer: int,
        keep: Keep,
        given: KeysValues,
        coded_TB: Tensor | None,
        places_B: Tensor | None,
        context: LoadedContext,
    ) -> None:
        """Add tokens to a log; those of sequences that decode, `places_B`, where the device's own index says."""
        log = self._log(layer, keep.group, given)
        own, view = context.own.get(keep.group), log.extent.view()
        if view is not None and places_B is not None:
            [(start, length)] = keep.spans
            row = slice(start, start + length)
            log.format.append(given.keys_CKH[row], given.values_CKW[row], log.tokens(view), places_B)
            context.own[keep.group] = KVLog(log.format, log.tokens(view))
            return
        place = slice(keep.log_start, keep.log_start + keep.num_tokens)
        if view is not None:
            tokens_CB = log.tokens(view)[place]
        else:
            tokens_CB = given.keys_CKH.new_empty(keep.num_tokens, log.format.token_bytes, dtype=torch.uint8)
        done = 0
        for start, length in keep.spans:
            own_tokens, target_CB = slice(start, start + length), tokens_CB[done : done + length]
            if coded_TB is None:
                log.format.write(given.keys_CKH[own_tokens], given.values_CKW[own_tokens], target_CB)
            else:
                target_CB.copy_(coded_TB[own_tokens])
            done += length
        if view is None:
            if own is not None:  # in place, `own` is the log itself
                own.data_CB[place] = tokens_CB
            log.last_write = self._lane_out.submit(self._write, log, log.last_write, keep.log_start, tokens_CB)
        if keep.log_start == 0 and own is None:  # a log that there was not when the row was loaded
            context.own[keep.group] = KVLog(log.format, tokens_CB)

    def _write(self, log: Log, before: Transfer[None] | None, start: int, tokens_CB: Tensor) -> None:
        if before is not None:
            before.wait()  # done long since, on this very lane: a failure is handed on to whoever reads the log
        log.extent.write(tokens_CB.reshape(-1), start * log.format.token_bytes)
        self._trace.moved("kv_out", tokens_CB.numel())

    def _log(self, layer: int, group: int, given: KeysValues) -> Log:
        """The log, made when its first tokens arrive: only then is the layer's shape known."""
        if (layer, group) not in self._logs:
            form = self._format_of(given)
            extent = self._tiers[layer].allocate(self._capacities[group] * form.token_bytes)
            self._token_bytes[layer] = form.token_bytes
            self._logs[layer, group] = Log(extent, form)
        return self._logs[layer, group]

    def _format_of(self, given: KeysValues) -> KVFormat:
        return self._make_form(KVShape.of(*given), given.keys_CKH.dtype, self._coding)
