"""Host memory that a GPU copies from and to: its pages are made, locked, and made ahead. Knows bytes; not what for."""

from __future__ import annotations

import mmap
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from flexeval.directio import BLOCK_BYTES
from flexeval.errors import CapacityError
from flexeval.policy.policy import Tier

HUGE_PAGE_BYTES = 2 * 2**20


def page_aligned(num_bytes: int) -> Tensor:
    """Host memory (uint8 `[num_bytes]`) that begins at a block's boundary, as direct transfers want it.

    Where it is large, in huge pages, if the system gives any: they are made and page-locked in two thirds of the time.
    """
    if num_bytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        room = torch.empty(num_bytes + BLOCK_BYTES, dtype=torch.uint8)
        start = -room.data_ptr() % BLOCK_BYTES
        return room[start : start + num_bytes]
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def pin(data: Tensor) -> None:
    """Page-lock new memory: `pin_memory=True` would round its size up to a power of two. Raises `CapacityError`."""
    data.zero_()  # makes its pages, with all threads: the driver would make them with one, three times as slowly
    _check_cuda(torch.cuda.cudart().cudaHostRegister(data.data_ptr(), data.numel(), 0))


def unpin(data: Tensor) -> None:
    """Undo `pin`; no copy may be on its way."""
    _check_cuda(torch.cuda.cudart().cudaHostUnregister(data.data_ptr()))


def _check_cuda(status: object) -> None:
    if int(status) != 0:  # type: ignore[call-overload]
        raise CapacityError(
            f"the host memory could not be page-locked (CUDA error {status})",
            mend="Raise the limit on locked memory (ulimit -l), or use less host memory (--cpu-memory)",
            tier=Tier.CPU,
        )


class BuffersAhead:
    """Buffers that a thread of its own makes while nobody waits for them yet, in the order in which they are expected.

    A gigabyte takes 50 to 200 milliseconds (16 cores beside an NVIDIA H200): gigabytes of KV would hold up the first
    prompts.
    """

    def __init__(self, make: Callable[[int], Tensor]):
        """Made by `make`, which takes a number of bytes, and may be called by any thread."""
        self._make = make
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="page_lock")
        self._coming: dict[int, deque[Future[Tensor]]] = defaultdict(deque)

    def expect(self, sizes: Iterable[int]) -> None:
        """Begin to make buffers of so many bytes."""
        for size in sizes:
            self._coming[size].append(self._worker.submit(self._make, size))

    def take(self, num_bytes: int) -> Tensor | None:
        """The next buffer of that size, once it is there; None where none is expected or begun. Raises as `make`."""
        coming = self._coming.get(num_bytes)
        if not coming:
            return None
        first = coming.popleft()
        return None if first.cancel() else first.result()

    def stop(self) -> list[Tensor]:
        """Begin no more of them; those that nobody took."""
        left = [future for coming in self._coming.values() for future in coming if not future.cancel()]
        self._coming.clear()
        return [future.result() for future in left if future.exception() is None]

    def close(self) -> list[Tensor]:
        """As `stop`, and end the thread."""
        left = self.stop()
        self._worker.shutdown()
        return left
