"""What rows read of logs, on its way before it is asked for. Knows the order in which that is; not what is brought."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from flexeval.engine.compute.row import Row
from flexeval.engine.memory.kv_context import Cache
from flexeval.engine.memory.lane import ahead


class Wanted(NamedTuple):
    """What a row reads at a layer."""

    layer: int
    row: Row
    is_above_alone: bool = False
    """Only what its sequences share: for their own contexts the CPU attends."""

    @property
    def what(self) -> Hashable:
        """Equal for what is brought once, where it is asked for several times in turn."""
        if not self.is_above_alone:
            return self.layer, self.row.index
        return self.layer, tuple(span.source for span in self.row.ancestors)


class ContextsAhead:
    """The contexts of one sweep: while one is in use, the next is brought, unless all lies in place.

    Prompts that read no log stand in no queue: the next context would be sent for only when the one before had been
    used.
    """

    def __init__(self, cache: Cache, num_layers: int, wanted: Iterable[Wanted]):
        """They are asked for in the order of `wanted`; what need not be brought, in any."""
        self._cache = cache
        self.is_in_place = [cache.is_in_place(layer) for layer in range(num_layers)]
        coming = (one for one in wanted if self._is_brought(one))
        each = [next(alike) for _, alike in groupby(coming, lambda one: one.what)]
        # Not by a method: an iterator that holds its owner keeps the batch's buffers until garbage is collected.
        self._ahead = ahead(cache.lane_in, partial(_load, cache), each)
        self._above: tuple[Hashable, Any] = (None, None)

    def take(self, wanted: Wanted) -> Any:
        """A context of the cache's own kind, on the compute device."""
        if not self._is_brought(wanted):
            return _load(self._cache, wanted)
        if not wanted.is_above_alone:
            return next(self._ahead)
        if self._above[0] != wanted.what:
            self._above = wanted.what, next(self._ahead)
        return self._above[1]

    def _is_brought(self, wanted: Wanted) -> bool:
        return not self.is_in_place[wanted.layer] and bool(wanted.row.read_groups)


def _load(cache: Cache, wanted: Wanted) -> Any:
    load = cache.load_above if wanted.is_above_alone else cache.load
    return load(wanted.layer, wanted.row)
