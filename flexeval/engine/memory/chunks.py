"""Bytes between a file and a tensor, chunk by chunk, both hops at once. Knows files and buffers; not what they hold.

Between disk and GPU a chunk passes through page-locked host memory: while one is copied the next ones are read. Host
memory that is aligned like the file is read and written straight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import NamedTuple

from torch import Tensor

from flexeval.directio import BLOCK_BYTES, CHUNK_BYTES, QUEUE_DEPTH, DirectIO, round_down, round_up
from flexeval.engine.memory.staging import Staging, StagingBuffer


class Piece(NamedTuple):
    """Bytes `first` to `last` of a file, moved as the whole blocks from `start` to `stop`."""

    start: int
    stop: int
    first: int
    last: int

    @property
    def is_whole(self) -> bool:
        """Whether every byte that is moved is wanted."""
        return (self.start, self.stop) == (self.first, self.last)


def pieces(first: int, last: int) -> Iterator[Piece]:
    """Whole blocks that hold the bytes from `first` to `last` of a file, in chunks."""
    if first == last:
        return
    start, end = round_down(first), round_up(last)
    while start < end:
        stop = min(start + CHUNK_BYTES, end)
        yield Piece(start, stop, max(start, first), min(stop, last))
        start = stop


class _Step(NamedTuple):
    """A chunk on its way."""

    done: Future[None]
    staged: StagingBuffer | None
    source: Tensor | None
    target: Tensor | None


class ChunkedTransfer:
    """The chunks of one read or write: up to `QUEUE_DEPTH` on the disk's hop, finished in order."""

    def __init__(self, io: DirectIO, staging: Staging, *, is_pinned: bool):
        """Use it in a `with` block; `is_pinned` says that the other end is a GPU."""
        self._io = io
        self._staging = staging
        self._is_pinned = is_pinned
        self._steps: deque[_Step] = deque()

    def __enter__(self) -> ChunkedTransfer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish what was begun; after a failure, only wait for it: buffers and files are about to be taken away."""
        try:
            while kind is None and self._steps:
                self._finish_first()
        finally:
            for step in self._steps:
                step.done.exception()
                if step.staged is not None:
                    self._staging.give_back(step.staged)

    def read(self, file: int, piece: Piece, out: Tensor) -> None:
        """Begin to read a piece into `out`."""
        if piece.is_whole and _is_aligned(out):
            self._begin(_Step(self._io.submit(self._io.read, file, bytes_of(out), piece.start), None, None, None))
            return
        staged = self._stage()
        chunk = staged.first(piece.stop - piece.start)
        done = self._io.submit(self._io.read, file, bytes_of(chunk), piece.start)
        self._begin(_Step(done, staged, chunk[piece.first - piece.start : piece.last - piece.start], out))

    def write(self, file: int, piece: Piece, data: Tensor) -> None:
        """Begin to write a piece of whole blocks from `data`."""
        if _is_aligned(data):
            self._begin(_Step(self._io.submit(self._io.write, file, bytes_of(data), piece.start), None, None, None))
            return
        staged = self._stage()
        chunk = staged.first(data.numel())
        chunk.copy_(data)
        done = self._io.submit(self._io.write, file, bytes_of(chunk), piece.start)
        self._begin(_Step(done, staged, None, None))

    def _stage(self) -> StagingBuffer:
        while self._steps:
            if (buffer := self._staging.try_take(is_pinned=self._is_pinned)) is not None:
                return buffer
            self._finish_first()
        return self._staging.take(is_pinned=self._is_pinned)

    def _begin(self, step: _Step) -> None:
        self._steps.append(step)
        if len(self._steps) > QUEUE_DEPTH:
            self._finish_first()

    def _finish_first(self) -> None:
        step = self._steps[0]
        step.done.result()
        if step.target is not None and step.source is not None:
            step.target.copy_(step.source, non_blocking=True)
        self._steps.popleft()
        if step.staged is not None:
            self._staging.give_back(step.staged)


def _is_aligned(data: Tensor) -> bool:
    return data.device.type == "cpu" and data.data_ptr() % BLOCK_BYTES == 0


def bytes_of(data: Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor on the host."""
    return memoryview(data.numpy().data)
