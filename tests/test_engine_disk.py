"""Disk extents: chunks and blocks join without a seam, room is made, and what is kept is there whole or not at all."""

from __future__ import annotations

import errno
import os
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from flexeval.directio import BLOCK_BYTES
from flexeval.engine.memory import chunks, staging
from flexeval.engine.memory.disk import DiskTier
from flexeval.engine.memory.tier import page_aligned
from flexeval.errors import DiskError

SMALL_CHUNK = 4 * BLOCK_BYTES
NUM_BYTES = 19 * BLOCK_BYTES + 77
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
RANGES = [
    (0, NUM_BYTES),
    (0, 3 * SMALL_CHUNK),
    (BLOCK_BYTES, 5 * BLOCK_BYTES),
    (BLOCK_BYTES - 1, BLOCK_BYTES + 1),
    (5, 9),
    (SMALL_CHUNK + 5, 3 * SMALL_CHUNK - 9),
    (NUM_BYTES - 1, NUM_BYTES),
    (777, 777),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 KiB, so that a small file has many."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", SMALL_CHUNK)
    monkeypatch.setattr(staging, "CHUNK_BYTES", SMALL_CHUNK)


def noise(num_bytes: int, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_bytes)
    return torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=generator).to(device)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@devices
@pytest.mark.parametrize("is_direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("is_aligned", [True, False], ids=["aligned", "unaligned"])
def test_any_range_is_written_and_read(device: str, is_direct: bool, is_aligned: bool, tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    tier.io.is_direct &= is_direct
    extent = tier.allocate(NUM_BYTES)
    expected = noise(NUM_BYTES)
    extent.write(expected.to(device))

    def buffer(num_bytes: int) -> torch.Tensor:
        if device == "cuda":
            return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        return page_aligned(num_bytes + 1)[0 if is_aligned else 1 :][:num_bytes]

    for round, (start, stop) in enumerate(RANGES):
        data = buffer(stop - start)
        data.copy_(noise(2 * NUM_BYTES + round)[: stop - start])
        extent.write(data, start)
        expected[start:stop] = data.cpu()
        for first, last in RANGES:
            out = buffer(last - first)
            extent.read(out, first)
            assert torch.equal(out.cpu(), expected[first:last]), (start, stop, first, last)
    tier.close()


@devices
def test_many_lanes_share_the_staging_buffers(device: str, tmp_path: Path) -> None:
    """More lanes than buffers, each with more chunks than there are buffers: nobody waits for ever, no byte is lost."""
    tier = DiskTier(tmp_path)
    extents = [tier.allocate(NUM_BYTES) for _ in range(staging.STAGED_CHUNKS + 2)]
    right: list[int] = []

    def work(index: int) -> None:
        data = page_aligned(NUM_BYTES + 1)[1:].copy_(noise(NUM_BYTES + index)[:NUM_BYTES]).to(device)
        for _ in range(3):
            extents[index].write(data)
            out = torch.zeros(NUM_BYTES + 1, dtype=torch.uint8, device=device)[1:]
            extents[index].read(out)
            assert torch.equal(out, data)
        right.append(index)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(extents))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(right) == list(range(len(extents)))
    assert 0 < tier.staging.num_bytes <= staging.STAGED_CHUNKS * SMALL_CHUNK
    tier.close()


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_chunk_that_fails_fails_the_transfer_and_gives_its_buffers_back(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = DiskTier(tmp_path)
    extent = tier.allocate(NUM_BYTES)
    data = page_aligned(NUM_BYTES + 1)[1:].copy_(noise(NUM_BYTES))
    extent.write(data)
    done = getattr(tier.io, operation)

    def fail_in_the_middle(file: int, buffer: memoryview, offset: int) -> None:
        if offset == 2 * SMALL_CHUNK:
            raise OSError(errno.EIO, "broken sector")
        done(file, buffer, offset)

    with monkeypatch.context() as patches:
        patches.setattr(tier.io, operation, fail_in_the_middle)
        with pytest.raises(DiskError, match="broken sector"):
            getattr(extent, operation)(data)
    extent.read(data)
    tier.close()  # checks that every buffer is back


def test_what_is_kept_outlives_the_run_and_is_found_whole(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    folder = tier.shelf.take("model")
    extent = tier.allocate(NUM_BYTES)
    extent.write(noise(NUM_BYTES))
    extent.keep_as(folder.path / "layer")
    assert (tier.used_bytes, tier.kept_bytes) == (NUM_BYTES, NUM_BYTES)
    extent.free()
    assert (tier.used_bytes, tier.kept_bytes) == (0, 0)
    folder.let_go()
    tier.close()
    assert files(tmp_path) == [folder.path / "layer"]

    later = DiskTier(tmp_path)
    found = later.find(folder.path / "layer", NUM_BYTES)
    assert found is not None and later.used_bytes == NUM_BYTES
    out = torch.zeros(NUM_BYTES, dtype=torch.uint8)
    found.read(out)
    assert torch.equal(out, noise(NUM_BYTES))
    assert later.find(folder.path / "other", NUM_BYTES) is None
    assert later.find(folder.path / "layer", NUM_BYTES + BLOCK_BYTES) is None
    os.truncate(folder.path / "layer", NUM_BYTES)
    assert later.find(folder.path / "layer", NUM_BYTES) is None, "cut short"
    later.close()


def test_the_leftovers_of_a_killed_run_go_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    living = DiskTier(tmp_path)
    living.allocate(10)
    dead = tmp_path / "flexeval-dead"
    dead.mkdir()
    (dead / "000000.bin").write_bytes(b"half")
    (tmp_path / "mine.txt").write_text("not ours")
    DiskTier(tmp_path).close()
    assert not dead.exists()
    assert len(files(tmp_path)) == 2
    living.close()
    assert files(tmp_path) == [tmp_path / "mine.txt"]


def kept(tier: DiskTier, name: str, num_bytes: int, *, age_s: int) -> Path:
    folder = tier.shelf.take(name)
    extent = tier.allocate(num_bytes)
    extent.keep_as(folder.path / "layer")
    extent.free()
    folder.let_go()
    os.utime(folder.path, (1e9 - age_s, 1e9 - age_s))
    return folder.path


def test_what_other_models_left_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 16 * BLOCK_BYTES
    tier = DiskTier(tmp_path, limit_bytes=4 * size)
    old, new = kept(tier, "old", size, age_s=2), kept(tier, "new", size, age_s=1)
    tier.allocate(size)
    assert old.exists() and new.exists()
    tier.allocate(3 * size // 2)
    assert not old.exists() and new.exists(), "the limit is kept by the one used least lately"

    tier.close()
    tier = DiskTier(tmp_path)
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1, 1, 2 * size if not new.exists() else size))
    tier.allocate(size // 2)
    assert new.exists()
    tier.allocate(size + 1)
    assert not new.exists(), "the disk itself is short"
    tier.close()
