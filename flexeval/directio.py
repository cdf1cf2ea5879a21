"""Files read and written past the page cache, in large aligned chunks, several at once. Knows files and buffers only.

Weights are read once a sweep and may be larger than memory: the page cache would only copy them once more, and push out
what is needed. Direct transfers (O_DIRECT) want offsets, lengths and addresses to be multiples of a block. Where a file
system does not take them, the same calls go through the page cache and give it back at once.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BLOCK_BYTES = 4096
"""Offsets, lengths and addresses of direct transfers are multiples of it."""
CHUNK_BYTES = 16 * 2**20
"""Bytes of one transfer at most: large enough for the disk's full rate, small enough to overlap with the next hop."""
QUEUE_DEPTH = 4
"""Transfers in flight at once; the rate of one NVMe disk grows up to about there."""
STAGED_CHUNKS = QUEUE_DEPTH + 4
"""Chunks of host memory that files pass through: a full queue of transfers, and as many on the other hop."""


def round_down(num_bytes: int) -> int:
    """The next lower multiple of a block."""
    return num_bytes // BLOCK_BYTES * BLOCK_BYTES


def round_up(num_bytes: int) -> int:
    """The next higher multiple of a block."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


class DirectIO:
    """Transfers between memory and the files of one folder. Use it in a `with` block, or close it."""

    def __init__(self, directory: Path):
        """Find out what `directory`'s file system takes. Raises `OSError` where it cannot be written."""
        self.is_direct = _takes_direct(directory)
        """Whether transfers bypass the page cache."""
        self._workers = ThreadPoolExecutor(QUEUE_DEPTH, thread_name_prefix="direct_io")

    def __enter__(self) -> DirectIO:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def opened(self, path: Path, flags: int, *, is_aligned: bool = True) -> Iterator[int]:
        """Open a file; `is_aligned` promises whole blocks at aligned addresses, which may then bypass the cache."""
        direct = os.O_DIRECT if is_aligned and self.is_direct else 0
        file = os.open(path, flags | direct, 0o600)
        try:
            yield file
        finally:
            os.close(file)

    def submit(self, transfer: Callable[..., None], *args: Any) -> Future[None]:
        """Run `transfer(*args)` (this object's `read` or `write`) beside the caller, `QUEUE_DEPTH` at a time."""
        return self._workers.submit(transfer, *args)

    def read(self, file: int, buffer: memoryview | mmap.mmap, offset: int) -> None:
        """Fill `buffer` from `offset` on. Raises `OSError`."""
        left, position = memoryview(buffer), offset
        while left:
            num_read = os.preadv(file, [left], position)
            if num_read == 0:
                raise OSError(errno.EIO, f"the file ends before byte {position + len(left)}")
            left, position = left[num_read:], position + num_read
        if not self.is_direct:
            os.posix_fadvise(file, offset, position - offset, os.POSIX_FADV_DONTNEED)

    def write(self, file: int, buffer: memoryview | mmap.mmap, offset: int) -> None:
        """Write `buffer` at `offset`. Raises `OSError`."""
        left = memoryview(buffer)
        while left:
            num_written = os.pwritev(file, [left], offset)
            left, offset = left[num_written:], offset + num_written

    def close(self) -> None:
        """End the threads."""
        self._workers.shutdown()


@contextmanager
def unnamed_file(directory: Path) -> Iterator[Path]:
    """Yield a path of a new file in a directory that has no name there: a process that is killed leaves none behind."""
    with tempfile.TemporaryFile(dir=directory) as file:
        yield Path(f"/proc/self/fd/{file.fileno()}")


def _takes_direct(directory: Path) -> bool:
    """Try it: some file systems refuse to open, others to read."""
    with unnamed_file(directory) as probe, mmap.mmap(-1, BLOCK_BYTES) as block:
        try:
            file = os.open(probe, os.O_RDWR | os.O_DIRECT)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
        try:
            return os.pwritev(file, [block], 0) == os.preadv(file, [block], 0) == BLOCK_BYTES
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return False
            raise
        finally:
            os.close(file)
