"""Slabs on their way to disk while the next ones are packed. Knows slabs and files; not what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from types import TracebackType
from typing import NamedTuple

from torch import Tensor

from flexeval.directio import round_up
from flexeval.engine.memory.chunks import bytes_of
from flexeval.engine.memory.disk import DiskExtent
from flexeval.engine.memory.page_lock import page_aligned
from flexeval.engine.memory.prepared import PreparedLayers


class _UnderWay(NamedTuple):
    layer: int
    extent: DiskExtent
    written: Future[None]
    digest: Future[str] | None


class Storing:
    """Writes one slab at a time. Use it in a `with` block, which ends when all are on disk, also after a failure."""

    def __init__(self, prepared: PreparedLayers | None):
        """What is written is kept in `prepared`; None keeps nothing."""
        self._prepared = prepared
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="storing")
        self._room, self._other_room = page_aligned(0), page_aligned(0)
        self._under_way: _UnderWay | None = None

    def __enter__(self) -> Storing:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            with suppress(Exception) if kind else nullcontext():
                self._finish()
        finally:
            self._workers.shutdown()

    def store(self, layer: int, extent: DiskExtent, fill: Callable[[Tensor], None]) -> None:
        """Let `fill` make a layer's slab, uint8 `[num_bytes]`, and begin to write it. Raises `DiskError` and as `fill`.

        Equal layers make equal files, gaps included.
        """
        num_bytes = round_up(extent.num_bytes)
        if self._room.numel() < num_bytes:
            self._room = page_aligned(num_bytes)
        blocks = self._room[:num_bytes].zero_()
        slab = blocks[: extent.num_bytes]
        fill(slab)
        self._finish()
        written = self._workers.submit(extent.write, slab)
        digest = self._workers.submit(_sha256, blocks) if self._prepared is not None else None
        self._under_way = _UnderWay(layer, extent, written, digest)
        self._room, self._other_room = self._other_room, self._room

    def _finish(self) -> None:
        """Wait for the slab that is under way."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.written.result()
            if self._prepared is not None and under_way.digest is not None:
                self._prepared.keep(under_way.layer, under_way.extent, under_way.digest.result())


def _sha256(data: Tensor) -> str:
    return hashlib.sha256(bytes_of(data)).hexdigest()
