"""Launches recorded instead of done, and done together later. Knows CUDA graphs; not what is launched."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

_WAITED = "called a synchronizing CUDA operation"


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
        """Lists, when the block has ended, what made the host wait for the device: that cannot be recorded."""
        ...


class CudaTape:
    """One CUDA graph."""

    def __init__(self, pool: Any):
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def begin(self) -> None:
        """Capture the current stream. Lanes go on in their own threads: they must not end it."""
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        """End the capture."""
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

    def new(self) -> CudaTape:
        """An empty graph."""
        return CudaTape(self._pool)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """On a stream of its own, after what has been enqueued so far."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        """By torch's own warnings of synchronizing operations."""
        found: list[str] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(before)
        found += [text for one in caught if _WAITED in (text := str(one.message))]
