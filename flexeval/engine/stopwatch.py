"""Busy seconds, lap by lap: of a thread, or of a CUDA stream as the device saw it. Knows clocks; not what is timed.

On a CUDA device a span is a pair of events recorded on the current stream. They are read once the device has passed
them, so nothing waits while work goes on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class _Span(NamedTuple):
    lap: int
    start: torch.cuda.Event
    end: torch.cuda.Event


class Stopwatch:
    """Adds up the spans of one thread or stream; spans of one stopwatch follow each other."""

    def __init__(self, device: torch.device):
        """On a CUDA device spans are device time, elsewhere host time."""
        self._is_cuda = device.type == "cuda"
        self._laps = [0.0]
        self._open: deque[_Span] = deque()
        self._added: deque[tuple[int, float]] = deque()  # by any thread
        self._lap = 0
        self._start: torch.cuda.Event | float | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count a block in the current lap."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave a block out of the span that is running."""
        self._end()
        try:
            yield
        finally:
            self._begin()

    def add(self, seconds: float) -> None:
        """Count in the current lap what was timed elsewhere; any thread may."""
        self._added.append((len(self._laps) - 1, seconds))

    def next_lap(self) -> None:
        """End the current lap; a span that runs still belongs to it."""
        self._laps.append(0.0)
        while self._open and self._open[0].end.query():
            self._close_first()

    def take_laps(self) -> list[float]:
        """Busy seconds of each lap since they were taken last, with what the last one then had still to come.

        Waits until the device has ended the last span; none is running.
        """
        assert self._start is None, "a span is running"
        while self._open:
            self._open[0].end.synchronize()
            self._close_first()
        while self._added:
            lap, seconds = self._added.popleft()
            self._laps[lap] += seconds
        laps, self._laps = self._laps, [0.0]
        return laps

    def _begin(self) -> None:
        assert self._start is None, "spans of one stopwatch follow each other"
        self._lap = len(self._laps) - 1
        if self._is_cuda:
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()
        else:
            self._start = time.perf_counter()

    def _end(self) -> None:
        assert self._start is not None, "no span is running"
        if isinstance(self._start, float):
            self._laps[self._lap] += time.perf_counter() - self._start
        else:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._open.append(_Span(self._lap, self._start, end))
        self._start = None

    def _close_first(self) -> None:
        span = self._open.popleft()
        self._laps[span.lap] += span.start.elapsed_time(span.end) / 1000
