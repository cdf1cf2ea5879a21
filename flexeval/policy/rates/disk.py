"""How fast a disk is read and written, as the engine moves files. Knows files; no model and no policy."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

from flexeval.directio import CHUNK_BYTES, QUEUE_DEPTH, DirectIO, unnamed_file
from flexeval.errors import ConfigError

PROBE_CHUNKS = 16
"""Chunks of the timed file: 256 MiB, a quarter of a second of a fast disk."""


def disk_rates(directory: Path) -> tuple[float, float]:
    """Reading and writing, as the engine moves files. Raises `ConfigError`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with DirectIO(directory) as io, unnamed_file(directory) as path:
            chunks = [_noise(CHUNK_BYTES) for _ in range(QUEUE_DEPTH)]
            write_rate = _transfer_rate(io, path, os.O_WRONLY, io.write, chunks)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            return _transfer_rate(io, path, os.O_RDONLY, io.read, chunks), write_rate
    except OSError as error:
        raise no_folder(directory, error) from error


def no_folder(directory: Path, error: OSError) -> ConfigError:
    """What is said of a folder that cannot be written to."""
    return ConfigError(
        f"cannot write to the disk folder: {error.strerror or error}",
        where=str(directory),
        mend="Name a writable folder with --disk DIR",
    )


def _noise(num_bytes: int) -> mmap.mmap:
    """Page-aligned memory with bytes that a compressing disk cannot shrink."""
    chunk = mmap.mmap(-1, num_bytes)
    chunk.write(os.urandom(2**20) * (num_bytes // 2**20))
    return chunk


def _transfer_rate(
    io: DirectIO, path: Path, flags: int, transfer: Callable[[int, mmap.mmap, int], None], chunks: list[mmap.mmap]
) -> float:
    """Bytes per second of `PROBE_CHUNKS` chunks of one file, as many at once as the engine moves."""

    def run(file: int, lane: int) -> None:
        for chunk in range(lane, PROBE_CHUNKS, len(chunks)):
            transfer(file, chunks[lane], chunk * CHUNK_BYTES)

    with io.opened(path, flags) as file:
        start = time.perf_counter()
        running = [io.submit(run, file, lane) for lane in range(len(chunks))]
        for one in running:
            one.result()
        if flags == os.O_WRONLY:
            os.fdatasync(file)
        return PROBE_CHUNKS * CHUNK_BYTES / (time.perf_counter() - start)
