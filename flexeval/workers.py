"""Threads that each compute alone. Knows how torch counts threads; not what is computed.

Torch spreads one operation over a team of threads that wait for each other. Where other threads want a core now and
then, every operation waits for the one that has lost its. Work that comes in pieces goes to threads of its own instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

SPARED_CORES = 2
"""For the thread that feeds the compute device, and for the lanes."""


def num_spare_cores() -> int:
    """Cores that a computation beside the compute device may keep busy, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - SPARED_CORES)


class Workers:
    """A number of threads, started when they are first needed. Close it, or use it in a `with` block."""

    def __init__(self, num_workers: int):
        self._num_workers = num_workers
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`work(item)` for every item, a thread each as they come free; results in order."""
        if self._pool is None:
            self._pool = self._start()

        def run(item: T) -> R:
            with torch.inference_mode():
                return work(item)

        return list(self._pool.map(run, items))

    def _start(self) -> ThreadPoolExecutor:
        everyone = Barrier(self._num_workers)

        def begin() -> None:
            torch.get_num_threads()  # a thread's first question sets its number: to the one that was set last anywhere
            torch.set_num_threads(1)
            everyone.wait()

        own = torch.get_num_threads()
        pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="worker")
        for started in [pool.submit(begin) for _ in range(self._num_workers)]:
            started.result()
        torch.set_num_threads(own)  # for threads that have not asked yet
        return pool
