"""Where bytes rest, and memory as such a place. Knows bytes and addresses; not what they mean. Disks are in `disk.py`.

A tier hands out extents. An extent on memory that the compute device can address is used in place (`view`); any other
is copied in and out (`read`, `write`), on the calling lane's thread and stream.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from flexeval.config import format_size
from flexeval.engine.memory.page_lock import BuffersAhead, page_aligned, pin, unpin
from flexeval.errors import CapacityError
from flexeval.policy.policy import Tier as TierName

PIECE_BYTES, PIECES_AHEAD = 64 * 2**20, 2
"""What is copied to a GPU in parts goes in pieces, a millisecond of the link each, of which so many stand in its queue,
so that it can give way: a row's KV or hidden states would wait for a whole layer's weights, and the next one's."""


class Extent(Protocol):
    """A run of bytes at rest."""

    num_bytes: int
    """Its length."""

    def view(self) -> Tensor | None:
        """The bytes in place (uint8), where the compute device can address them."""
        ...

    def memory(self) -> Tensor | None:
        """The bytes in place (uint8), wherever they are, to be filled from the host; None on disk."""
        ...

    def read(self, out: Tensor, offset: int = 0) -> None:
        """Fill `out` (uint8, contiguous, any device) with the bytes from `offset` on."""
        ...

    def read_parts(self, out: Tensor, parts: Sequence[slice], *, give_way: Callable[[], None]) -> None:
        """Fill `parts` of `out` (uint8, contiguous, any device) with the same parts of the bytes.

        `give_way` is called before each copy over a link that others use too.
        """
        ...

    def write(self, data: Tensor, offset: int = 0) -> None:
        """Store `data` (uint8, contiguous, any device) at `offset`."""
        ...

    def free(self) -> None:
        """Give the room back."""
        ...


class Tier(Protocol):
    """A place with room for extents."""

    name: TierName
    """`gpu`, `cpu` or `disk`."""
    used_bytes: int
    """Room handed out now."""
    peak_bytes: int
    """The most ever handed out."""
    is_addressable: bool
    """Whether the compute device can use its extents in place."""

    def allocate(self, num_bytes: int) -> Extent:
        """Room for `num_bytes`. Raises `CapacityError` where there is none."""
        ...

    def close(self) -> None:
        """Give back everything, also outside the process."""
        ...


class Meter:
    """Counts the bytes a tier has handed out."""

    def __init__(self, name: TierName):
        self.name = name
        self.used_bytes = 0
        self.peak_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Count what is handed out."""
        self.used_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def give_back(self, num_bytes: int) -> None:
        """Count what came back."""
        self.used_bytes -= num_bytes
        assert self.used_bytes >= 0, (self.name, self.used_bytes)


class MemoryTier(Meter):
    """The memory of one device; host memory is page-locked where a GPU copies from it.

    Page-locking takes long, so page-locked buffers that are given back wait for the next request of about their size,
    and those that are expected are made ahead. What is idle makes room for others, the smallest first, where more would
    be held than ever was.
    """

    def __init__(self, name: TierName, device: torch.device, *, compute_device: torch.device):
        super().__init__(name)
        self.device = device
        self.is_addressable = device == compute_device
        self.is_pinned = device.type == "cpu" and compute_device.type == "cuda"
        self._idle: list[Tensor] = []
        self._counting = threading.Lock()  # buffers are made by a thread of their own as well
        self._ahead = BuffersAhead(self._make)

    def allocate(self, num_bytes: int) -> MemoryExtent:
        """Room in this memory. Raises `CapacityError`."""
        buffer = self._take_idle(num_bytes)
        if buffer is None:
            buffer = self._ahead.take(num_bytes)
        if buffer is None:
            buffer = self._make(num_bytes)
        return MemoryExtent(self, buffer, num_bytes)

    def expect(self, sizes: Sequence[int]) -> None:
        """Page-locked extents of these sizes will be asked for: they are made beside the caller's work."""
        assert self.is_pinned, "others are made at once"
        there = {index: buffer for index, size in enumerate(sizes) if (buffer := self._take_idle(size)) is not None}
        with self._counting:
            self._idle += there.values()
        self._ahead.expect(size for index, size in enumerate(sizes) if index not in there)

    def expect_no_more(self) -> None:
        """What was expected is not made any more; what was made, and not asked for, waits for others."""
        left = self._ahead.stop()
        with self._counting:
            self._idle += left

    def recycle(self, buffer: Tensor) -> None:
        """Take a buffer back from an extent."""
        with self._counting:
            if self.is_pinned and buffer.numel():
                self._idle.append(buffer)
            else:
                self.give_back(buffer.numel())

    def close(self) -> None:
        """Give idle buffers back; the others go with their extents."""
        self._idle += self._ahead.close()
        while self._idle:
            self._drop(self._idle.pop())

    def _take_idle(self, num_bytes: int) -> Tensor | None:
        """The smallest buffer that waits and fits."""
        with self._counting:
            return self._take_smallest(lambda size: num_bytes <= size <= 2 * num_bytes)

    def _make(self, num_bytes: int) -> Tensor:
        """A new buffer; any thread. Raises `CapacityError`."""
        while (idle := self._in_the_way(num_bytes)) is not None:
            self._drop(idle)
        try:
            buffer = (
                page_aligned(num_bytes)
                if self.device.type == "cpu"
                else torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
            )
        except (torch.OutOfMemoryError, RuntimeError, OSError, MemoryError) as error:
            raise CapacityError(
                f"no room for {format_size(num_bytes)} more in {self.name} memory",
                where=f"{format_size(self.used_bytes)} in use",
                mend="Move more of the model to another tier (--disk DIR), or choose a smaller setting such as w4",
                tier=self.name,
            ) from error
        if self.is_pinned and num_bytes:
            pin(buffer)
        with self._counting:
            self.take(num_bytes)
        return buffer

    def _in_the_way(self, num_bytes: int) -> Tensor | None:
        """The smallest idle buffer, taken, where that and as many bytes more would be more than there ever were."""
        with self._counting:
            is_more = self.used_bytes + num_bytes > self.peak_bytes
            return self._take_smallest(lambda size: is_more)

    def _take_smallest(self, is_wanted: Callable[[int], bool]) -> Tensor | None:
        """The smallest idle buffer of a size that is wanted, if there is any."""
        wanted = [buffer for buffer in self._idle if is_wanted(buffer.numel())]
        smallest = min(wanted, key=Tensor.numel, default=None)
        self._idle = [buffer for buffer in self._idle if buffer is not smallest]
        return smallest

    def _drop(self, idle: Tensor) -> None:
        torch.cuda.synchronize()  # a copy may still be on its way
        unpin(idle)
        with self._counting:
            self.give_back(idle.numel())


class MemoryExtent:
    """Bytes in the memory of one device."""

    def __init__(self, tier: MemoryTier, buffer: Tensor, num_bytes: int):
        self._tier = tier
        self._buffer = buffer
        self.num_bytes = num_bytes

    def view(self) -> Tensor | None:
        """The bytes themselves, on the compute device."""
        return self._buffer[: self.num_bytes] if self._tier.is_addressable else None

    def memory(self) -> Tensor:
        """The bytes themselves, on the tier's device."""
        return self._buffer[: self.num_bytes]

    def read(self, out: Tensor, offset: int = 0) -> None:
        """Copy out; asynchronous on the current stream between host and GPU."""
        out.copy_(self._buffer[offset : offset + out.numel()], non_blocking=self._tier.is_pinned)

    def read_parts(self, out: Tensor, parts: Sequence[slice], *, give_way: Callable[[], None]) -> None:
        """Copy parts out, as `read` does, but for other lanes' copies in between: all but the last pieces are there."""
        pieces: deque[torch.cuda.Event] = deque()
        for part in parts:
            for start in range(part.start, part.stop, PIECE_BYTES):
                give_way()
                self.read(out[start : min(start + PIECE_BYTES, part.stop)], start)
                if self._tier.is_pinned:
                    pieces.append(torch.cuda.Event(blocking=True))
                    pieces[-1].record()
                if len(pieces) > PIECES_AHEAD:
                    pieces.popleft().synchronize()

    def write(self, data: Tensor, offset: int = 0) -> None:
        """Copy in; asynchronous on the current stream between host and GPU."""
        self._buffer[offset : offset + data.numel()].copy_(data, non_blocking=self._tier.is_pinned)

    def free(self) -> None:
        """Give the memory back."""
        self._tier.recycle(self._buffer)
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.num_bytes = 0
