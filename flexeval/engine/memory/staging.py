"""Host buffers for bytes on their way between disk and a device, a chunk each. Knows memory and events; no file.

Lanes share them. A lane that holds some may not wait for another's (`try_take`): two such lanes would wait for ever.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from threading import Condition

import torch
from torch import Tensor

from flexeval.directio import CHUNK_BYTES, STAGED_CHUNKS
from flexeval.engine.memory.page_lock import page_aligned, pin, unpin


@dataclass(slots=True, eq=False)
class StagingBuffer:
    """Room for one chunk."""

    memory: Tensor
    """uint8 `[CHUNK_BYTES]`, page-aligned."""
    is_pinned: bool = False
    """Whether a GPU copies to and from it by itself."""
    num_touched: int = 0
    """The most bytes of it that were ever used: what it takes of the host's memory."""
    in_use: torch.cuda.Event | None = None
    """Until when a GPU copies from it."""

    def first(self, num_bytes: int) -> Tensor:
        """Its beginning."""
        self.num_touched = max(self.num_touched, num_bytes)
        return self.memory[:num_bytes]


class Staging:
    """At most `STAGED_CHUNKS` buffers, made when they are needed."""

    def __init__(self) -> None:
        self._buffers: list[StagingBuffer] = []
        self._idle: deque[StagingBuffer] = deque()
        self._changed = Condition()

    @property
    def num_bytes(self) -> int:
        """Host memory that the buffers have come to take."""
        return sum(buffer.memory.numel() if buffer.is_pinned else buffer.num_touched for buffer in self._buffers)

    def take(self, *, is_pinned: bool) -> StagingBuffer:
        """A buffer that nobody uses; waits for one."""
        with self._changed:
            while (buffer := self._find()) is None:
                self._changed.wait()
        return _ready(buffer, is_pinned)

    def try_take(self, *, is_pinned: bool) -> StagingBuffer | None:
        """A buffer that nobody uses, if there is one."""
        with self._changed:
            buffer = self._find()
        return None if buffer is None else _ready(buffer, is_pinned)

    def give_back(self, buffer: StagingBuffer) -> None:
        """Let others use a buffer once what the current stream has to do with it is done."""
        if buffer.is_pinned:
            buffer.in_use = torch.cuda.current_stream().record_event()
        with self._changed:
            self._idle.append(buffer)
            self._changed.notify()

    def close(self) -> None:
        """Give the memory back. All buffers must be."""
        assert len(self._idle) == len(self._buffers), "a staging buffer is in use"
        for buffer in self._buffers:
            if buffer.is_pinned:
                unpin(_ready(buffer, True).memory)
        self._buffers, self._idle = [], deque()

    def _find(self) -> StagingBuffer | None:
        """The idle buffer that was given back first; else a new one; None where there are as many as there may be."""
        if self._idle:
            return self._idle.popleft()
        if len(self._buffers) == STAGED_CHUNKS:
            return None
        self._buffers.append(StagingBuffer(page_aligned(CHUNK_BYTES)))
        return self._buffers[-1]


def _ready(buffer: StagingBuffer, is_pinned: bool) -> StagingBuffer:
    """Wait until a buffer's last copy is done; page-lock it where that is asked for the first time."""
    if buffer.in_use is not None:
        buffer.in_use.synchronize()
        buffer.in_use = None
    if is_pinned and not buffer.is_pinned:
        pin(buffer.memory)
        buffer.is_pinned = True
    return buffer
