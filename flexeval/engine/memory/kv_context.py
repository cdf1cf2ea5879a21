"""What one row reads of logs at one layer: brought to the compute device, or where it lies in host memory.

Knows logs and rows; not how anything was brought.

Shapes: C tokens of a log, B bytes of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from flexeval.engine.codecs.kv_format import KeysValues, KVFormat, KVLog
from flexeval.engine.compute.contexts import DecodeBatch
from flexeval.engine.compute.row import Row
from flexeval.engine.memory.lane import Lane, Transfer
from flexeval.engine.memory.tier import Extent
from flexeval.planning.rows import AncestorSpan, KeySource


@dataclass(slots=True)
class Log:
    """One group's tokens at one layer."""

    extent: Extent
    format: KVFormat
    last_write: Transfer[None] | None = None

    def tokens(self, data: Tensor) -> Tensor:
        """Bytes as tokens `[C, B]`."""
        return data.view(-1, self.format.token_bytes)


class LoadedContext(NamedTuple):
    """What one row reads at one layer, on the compute device. A tuple, so that its lane finds the tensors to lend."""

    own: dict[int, KVLog]
    """By group, its log with room for the step's new tokens."""
    ancestors: dict[KeySource, KVLog]
    """What was read of other logs."""
    scratch: Mapping[int, KeysValues]
    """By node, what earlier rows of this sweep left."""

    def own_log(self, batch: DecodeBatch) -> KVLog:
        """The log of a decode batch."""
        return self.own[batch.span.group]

    def ancestor(self, span: AncestorSpan) -> KeysValues:
        """An ancestor: from an earlier row of this sweep, or from a log."""
        if span.source.scratch_node is not None:
            return self.scratch[span.source.scratch_node]
        return self.ancestors[span.source].at(slice(None))


class HostContext:
    """What a row's sequences have for themselves at one layer, in host memory, where it rests."""

    def __init__(self, logs: dict[int, Log]):
        self._logs = logs
        self._writes = [log.last_write for log in logs.values() if log.last_write is not None]

    @property
    def format(self) -> KVFormat:
        """How tokens rest."""
        return next(iter(self._logs.values())).format

    def wait(self) -> None:
        """Have the caller's stream see all that was to be written when this was made; the host may be ahead of it."""
        for write in self._writes:
            write.wait()

    def own_log(self, batch: DecodeBatch) -> KVLog:
        """The log of a decode batch."""
        log = self._logs[batch.span.group]
        memory = log.extent.memory()
        assert memory is not None and memory.device.type == "cpu", "the CPU attends in host memory only"
        return KVLog(log.format, log.tokens(memory))

    def ancestor(self, span: AncestorSpan) -> KeysValues:
        """Never asked for."""
        raise AssertionError("what sequences share is attended to on the compute device")


class Cache(Protocol):
    """The KV of one batch of requests, as a sweep uses it."""

    lane_in: Lane
    """For KV coming in."""

    def load(self, layer: int, row: Row) -> Any:
        """What a row reads at a layer: a context of the cache's own kind, for `store` and for attention."""
        ...

    def store(self, layer: int, row: Row, keys_TKH: Tensor, values_TKW: Tensor, context: Any) -> KeysValues:
        """Take the KV of a row's new tokens; what its own tokens attend to."""
        ...

    def load_above(self, layer: int, row: Row) -> Any:
        """The same for a row for which the CPU attends: only what its sequences share."""
        ...

    def store_for_host(self, layer: int, row: Row, keys_TKH: Tensor, values_TKW: Tensor) -> HostContext:
        """Take the KV of a row for which the CPU attends; where it finds what the sequences have for themselves."""
        ...

    def host_token_bytes(self, layer: int) -> int:
        """Bytes of a token's KV that the CPU could attend to where they rest; 0 where it could not."""
        ...

    def is_in_place(self, layer: int) -> bool:
        """Whether a layer's logs lie, for as long as this cache, where the compute device reads and writes them."""
        ...

    def end_layer(self) -> None:
        """The sweep moves on to the next layer."""
        ...

    def flush(self) -> None:
        """Wait for what is written behind; raises where any of it failed, read or not."""
        ...

    def close(self) -> None:
        """Give back everything, also in the middle of a sweep."""
        ...
