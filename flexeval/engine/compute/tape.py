"""Launches recorded instead of done, and done together later. Knows CUDA graphs; not what is launched."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch

_WAITED = "called a synchronizing CUDA operation"
_ROOM_BYTES = 2**28
"""Kept free of what the allocator holds while launches are recorded: a recording takes new memory, in pieces of 20 MiB
and more, and meanwhile nothing can be given back."""


class Tape(Protocol):
    """Launches that are recorded."""

    def begin(self) -> None:
        """Record from here on."""
        ...

    def end(self) -> None:
        """Up to here."""
        ...

    def replay(self) -> None:
        """Launch all of it."""
        ...


class Tapes(Protocol):
    """How launches are recorded: as CUDA graphs; the tests have another way, for the CPU."""

    def new(self) -> Tape:
        """An empty tape."""
        ...

    def recording(self) -> AbstractContextManager[None]:
        """Where tapes are recorded."""
        ...

    def waits(self) -> AbstractContextManager[list[str]]:
        """Lists, when the block has ended, what made this thread wait for the device: that cannot be recorded."""
        ...


class CudaTape:
    """One CUDA graph."""

    def __init__(self, pool: Any, begun: list[CudaTape]):
        """In a pool's memory; while it records it is in `begun`."""
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool
        self._begun = begun

    def begin(self) -> None:
        """Capture the current stream. Lanes go on in their own threads: they must not end it."""
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._begun.append(self)

    def end(self) -> None:
        """End the capture."""
        self._begun.remove(self)
        self._graph.capture_end()

    def replay(self) -> None:
        """Launch on the current stream."""
        self._graph.replay()


class CudaTapes:
    """CUDA graphs that share the memory of their temporaries: they run one after the other."""

    def __init__(self, stream: torch.cuda.Stream):
        """Recorded on `stream`, which cannot be the default one; each that is used takes a workspace of cuBLAS."""
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()
        self._begun: list[CudaTape] = []

    def new(self) -> CudaTape:
        """An empty graph."""
        return CudaTape(self._pool, self._begun)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """On a stream of its own, after what has been enqueued so far. An error ends what is being recorded."""
        if _room(self._stream.device) < _ROOM_BYTES:
            torch.cuda.empty_cache()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            try:
                yield
            except BaseException:
                for tape in [*self._begun]:  # a stream that goes on recording takes nothing else
                    with suppress(RuntimeError):
                        tape.end()
                raise
        torch.cuda.current_stream().wait_stream(self._stream)

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        """By torch's own warnings of synchronizing operations, in this thread: lanes wait in theirs all the time."""
        found: list[str] = []
        thread = threading.get_ident()

        def hear(message: Warning | str, *_: Any) -> None:
            if threading.get_ident() == thread and _WAITED in str(message):
                found.append(str(message))

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = hear  # type: ignore[assignment]
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(before)


def _room(device: torch.device) -> float:
    """Bytes that the allocator may still take of a device."""
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    return min(free, allowed - torch.cuda.memory_reserved(device))
