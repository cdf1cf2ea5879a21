"""Thousands of small blocks in one process: memory, files, threads and the offload folder stay as they are."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from tiny_directory import write_tiny_model

from flexeval.backends.native import Engine
from flexeval.journal import Journal
from flexeval.request import Request

ON_DISK = "cpu-weights=0,disk-weights=1,cpu-kv=0,disk-kv=1,cpu-hidden=0.5,disk-hidden=0.5"
SIZES = "row_tokens=64,sweep_tokens=128,group_sequences=2,num_groups=2"


class Use(NamedTuple):
    """What a process has taken."""

    num_files: int
    threads: frozenset[str]
    """But for those that read the disk, of which one more is begun whenever more reads are under way than ever."""
    num_disk_bytes: int
    num_memory_bytes: int


def use(disk: Path) -> Use:
    gc.collect()
    return Use(
        len(os.listdir("/proc/self/fd")),
        frozenset(thread.name for thread in threading.enumerate() if not thread.name.startswith("direct_io")),
        sum(path.stat().st_size for path in disk.rglob("*") if path.is_file()),
        psutil.Process().memory_info().rss,
    )


def block(number: int) -> list[Request]:
    """A few requests that nobody has asked before."""
    header = f"block {number} begins with the same words for all, so that something is shared: " * 2
    return [Request(prompt=f"{header}{i}", max_tokens=(0, 1, 3)[i % 3], echo=i % 3 == 0, keep_top=2) for i in range(4)]


@pytest.mark.parametrize("num_blocks", [12, pytest.param(2_000, marks=pytest.mark.slow)])
def test_nothing_grows(num_blocks: int, tmp_path: Path) -> None:
    model, disk = write_tiny_model(tmp_path / "model"), tmp_path / "disk"
    options = {"dtype": "float32", "disk": disk, "policy": f"{ON_DISK},{SIZES}"}
    num_first = max(4, num_blocks // 6)
    with Engine.load(str(model), **options) as engine, Journal(tmp_path / "journal.jsonl") as journal:  # type: ignore[arg-type]
        for number in range(num_blocks):
            requests = block(number)
            journal.add(zip(requests, engine.generate(requests), strict=True))
            if number + 1 == num_first:
                first = use(disk)
        last = use(disk)
    print(f"\nafter {num_first} blocks {first}, after {num_blocks} {last}")
    assert all(now <= before for now, before in zip(last[:3], first[:3], strict=True)), (first, last)
    # The journal holds every answer: some kilobytes a block.
    assert last.num_memory_bytes - first.num_memory_bytes < 2**25 + num_blocks * 2**13
    assert [path.name for path in disk.iterdir()] == ["prepared"], "what is kept for later runs, and nothing else"


@pytest.mark.parametrize("num_engines", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_engines_leave_nothing_behind(num_engines: int, tmp_path: Path) -> None:
    """Opened, used and closed; also by an error in the middle."""
    model, disk = write_tiny_model(tmp_path / "model"), tmp_path / "disk"

    def stop(answers: object) -> None:
        raise KeyboardInterrupt

    for number in range(num_engines):
        with Engine.load(str(model), dtype="float32", disk=disk, policy=f"{ON_DISK},{SIZES}") as engine:
            if number % 2:
                with pytest.raises(KeyboardInterrupt):
                    engine.generate(block(number), on_completions=stop)
            assert len(engine.generate(block(number))) == 4, "it goes on after an interruption"
        if not number:
            first = use(disk)
    last = use(disk)
    assert all(now <= before for now, before in zip(last[:3], first[:3], strict=True)), (first, last)
    assert last.num_memory_bytes - first.num_memory_bytes < 2**26
