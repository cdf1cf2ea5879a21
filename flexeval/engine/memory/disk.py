"""Disk as a place for bytes: files, moved in large chunks past the page cache. Knows files; not what they mean."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from flexeval.config import format_size
from flexeval.directio import DirectIO, round_down, round_up
from flexeval.engine.memory.chunks import ChunkedTransfer, bytes_of, pieces
from flexeval.engine.memory.staging import Staging
from flexeval.engine.memory.tier import Meter
from flexeval.errors import CapacityError, DiskError
from flexeval.policy.policy import Tier as TierName
from flexeval.shelf import HeldFolder, Shelf, discard, prepared_shelf

_RUN_PREFIX = "flexeval-"


class DiskTier(Meter):
    """Files in a folder of its own, which goes when the tier closes, beside the shelf of what outlives it."""

    is_addressable = False

    def __init__(self, directory: Path, *, limit_bytes: int | None = None):
        """Room in `directory`; where it gets short, or `limit_bytes` are passed, the shelf is cleared for it."""
        super().__init__(TierName.DISK)
        self._directory = directory
        self._limit_bytes = limit_bytes
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(f"{_RUN_PREFIX}*"):
            discard(leftover)  # of a run that was killed
        self._folder = tempfile.TemporaryDirectory(prefix=_RUN_PREFIX, dir=directory)
        self._hold = HeldFolder(Path(self._folder.name))
        self.shelf: Shelf = prepared_shelf(directory)
        """Folders that outlive the run."""
        self.io = DirectIO(directory)
        """How files are moved."""
        self.staging = Staging()
        """Host memory that they pass through."""
        self.kept_bytes = 0
        """How much of what is used lies on the shelf."""
        self._num_files = 0

    def allocate(self, num_bytes: int) -> DiskExtent:
        """A new file of that length. Raises `CapacityError` where the disk is full."""
        path = Path(self._folder.name) / f"{self._num_files:06d}.bin"
        self._num_files += 1
        self._make_room(round_up(num_bytes))
        try:
            with self.io.opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, is_aligned=False) as file:
                if num_bytes:
                    os.posix_fallocate(file, 0, round_up(num_bytes))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise CapacityError(
                f"no room for {format_size(num_bytes)} on disk: {error.strerror}",
                where=str(path.parent),
                mend="Free some room, or name another folder with --disk",
                tier=self.name,
            ) from error
        self.take(num_bytes)
        return DiskExtent(self, path, num_bytes, is_kept=False)

    def find(self, path: Path, num_bytes: int) -> DiskExtent | None:
        """The file of that length that an earlier run kept as `path`; None where it is not there, or not whole."""
        if not path.is_file() or path.stat().st_size != round_up(num_bytes):
            return None
        self.take(num_bytes)
        self.kept_bytes += num_bytes
        return DiskExtent(self, path, num_bytes, is_kept=True)

    @contextmanager
    def opened(self, path: Path, flags: int, *, is_aligned: bool = True) -> Iterator[int]:
        """Open a file of this tier (see `DirectIO.opened`). Raises `DiskError` for what goes wrong in the block."""
        try:
            with self.io.opened(path, flags, is_aligned=is_aligned) as file:
                yield file
        except OSError as error:
            raise DiskError(
                f"the disk failed: {error.strerror}",
                where=str(path),
                mend="Check the disk, or name another folder with --disk; then run again",
            ) from error

    def close(self) -> None:
        """Delete the run's own folder, and leave the shelf."""
        self.io.close()
        self.staging.close()
        self._hold.let_go()
        self._folder.cleanup()

    def _make_room(self, num_bytes: int) -> None:
        while self._is_short_of(num_bytes) and self.shelf.discard_oldest():
            pass

    def _is_short_of(self, num_bytes: int) -> bool:
        if shutil.disk_usage(self._directory).free < num_bytes:
            return True
        if self._limit_bytes is None:
            return False
        return self.used_bytes - self.kept_bytes + self.shelf.num_bytes() + num_bytes > self._limit_bytes


class DiskExtent:
    """Bytes in one file, opened for each transfer: a cache of many logs would use up the process's file handles."""

    def __init__(self, tier: DiskTier, path: Path, num_bytes: int, *, is_kept: bool):
        """The beginning of a file of whole blocks; one that `is_kept` stays when the extent is freed."""
        self.tier = tier
        """Where its room is counted."""
        self._path = path
        self._is_kept = is_kept
        self.num_bytes = num_bytes

    def view(self) -> Tensor | None:
        """Never addressable."""
        return None

    def memory(self) -> Tensor | None:
        """Never in memory."""
        return None

    def read(self, out: Tensor, offset: int = 0) -> None:
        """Read the file; to a GPU by way of host memory, asynchronously on the current stream."""
        self._read([(offset, out)], is_pinned=out.is_cuda)

    def read_parts(self, out: Tensor, parts: Sequence[slice], *, give_way: Callable[[], None]) -> None:
        """Read parts of the file, several at once; the disk leaves the link to others most of the time."""
        self._read([(part.start, out[part]) for part in parts], is_pinned=out.is_cuda)

    def _read(self, runs: Sequence[tuple[int, Tensor]], *, is_pinned: bool) -> None:
        with (
            self.tier.opened(self._path, os.O_RDONLY) as file,
            ChunkedTransfer(self.tier.io, self.tier.staging, is_pinned=is_pinned) as transfer,
        ):
            for offset, out in runs:
                assert offset + out.numel() <= self.num_bytes, (offset, out.numel(), self.num_bytes)
                for piece in pieces(offset, offset + out.numel()):
                    transfer.read(file, piece, out[piece.first - offset : piece.last - offset])

    def write(self, data: Tensor, offset: int = 0) -> None:
        """Write the file; from a GPU by way of host memory. It is on its way to the disk when this returns."""
        end = offset + data.numel()
        assert end <= self.num_bytes, (offset, data.numel(), self.num_bytes)
        inner_start, inner_end = round_up(offset), round_down(end)
        if inner_start < inner_end:
            with (
                self.tier.opened(self._path, os.O_WRONLY) as file,
                ChunkedTransfer(self.tier.io, self.tier.staging, is_pinned=data.is_cuda) as transfer,
            ):
                for piece in pieces(inner_start, inner_end):
                    transfer.write(file, piece, data[piece.first - offset : piece.last - offset])
            edges = [(offset, inner_start), (inner_end, end)]
        else:
            edges = [(offset, end)]
        if any(start < stop for start, stop in edges):  # parts of blocks: the page cache reads and completes them
            with self.tier.opened(self._path, os.O_WRONLY, is_aligned=False) as file:
                for start, stop in edges:
                    edge = data[start - offset : stop - offset].cpu()
                    self.tier.io.write(file, bytes_of(edge), start)

    def keep_as(self, path: Path) -> None:
        """Let the file outlive the run, under another name in the tier's folder: there whole or not at all."""
        with self.tier.opened(self._path, os.O_RDONLY) as file:
            os.fsync(file)
        self._path = self._path.rename(path)
        self._is_kept = True
        self.tier.kept_bytes += self.num_bytes

    def free(self) -> None:
        """Delete the file, unless it is kept."""
        if self._is_kept:
            self.tier.kept_bytes -= self.num_bytes
        else:
            self._path.unlink(missing_ok=True)
        self.tier.give_back(self.num_bytes)
        self.num_bytes = 0
