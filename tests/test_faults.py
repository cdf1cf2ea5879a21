"""Faults in the middle of the work end in one line that names them; nothing hangs or stays behind, and it can go on."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_directory import write_tiny_model
from torch import Tensor

from flexeval.backends.native import Engine
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.memory.weights import WeightStore
from flexeval.errors import CapacityError, DiskError
from flexeval.request import Completion, Request

ON_DISK = "cpu-weights=0,disk-weights=1,cpu-kv=0,disk-kv=1,row_tokens=64,sweep_tokens=128,group_sequences=2"
REQUESTS = [Request(prompt=f"what is {number}, and why? " * 4, max_tokens=1 + number % 4) for number in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[Completion]:
    with Engine.load(str(model), dtype="float32", disk=tmp_path_factory.mktemp("disk"), policy=ON_DISK) as engine:
        return engine.generate(REQUESTS)


@pytest.fixture
def engine(model: Path, tmp_path: Path) -> Iterator[Engine]:
    """On a disk folder of its own, which is as it was when it is closed, and so are the threads."""
    threads = threading.active_count()
    with Engine.load(str(model), dtype="float32", disk=tmp_path / "disk", policy=ON_DISK) as loaded:
        yield loaded
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["prepared"]
    assert threading.active_count() == threads


def texts(completions: Sequence[Completion]) -> list[tuple[str, tuple[int, ...]]]:
    return [(one.text, one.token_ids) for one in completions]


def failing(real: Callable[..., Any], error: BaseException, *, at: int) -> Callable[..., Any]:
    """Fail at the call of that number."""
    num_calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == at:
            raise error
        return real(*args, **kwargs)

    return call


@pytest.mark.parametrize("at", [5, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["preadv", "pwritev"])
def test_a_disk_that_fails_is_named_and_the_engine_goes_on(
    name: str, at: int, engine: Engine, expected: Sequence[Completion], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine.place(REQUESTS)
    with monkeypatch.context() as patches:
        patches.setattr(os, name, failing(getattr(os, name), OSError(errno.EIO, "Input/output error"), at=at))
        with pytest.raises(DiskError, match=rf"the disk failed: Input/output error.*{tmp_path}"):
            engine.generate(REQUESTS)
    assert texts(engine.generate(REQUESTS)) == texts(expected)


def test_short_reads_and_writes_are_gone_on_with(
    engine: Engine, expected: Sequence[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, pwritev = os.preadv, os.pwritev

    def short(buffers: Any) -> list[memoryview]:
        (buffer,) = buffers
        whole = memoryview(buffer)
        return [whole[: max(4096, len(whole) // 8192 * 4096)]]

    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, short(buffers), offset))
    monkeypatch.setattr(os, "pwritev", lambda file, buffers, offset: pwritev(file, short(buffers), offset))
    assert texts(engine.generate(REQUESTS)) == texts(expected)


def test_a_disk_that_is_full_is_named(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patches:
        patches.setattr(os, "posix_fallocate", failing(os.posix_fallocate, full, at=2))
        with pytest.raises(CapacityError, match=rf"no room for .* on disk: No space left.*{tmp_path}.*--disk"):
            engine.generate(REQUESTS)
    assert len(engine.generate(REQUESTS)) == len(REQUESTS)


@pytest.mark.parametrize("error", [RuntimeError("the lane is broken"), SystemExit(3), KeyboardInterrupt()])
def test_what_ends_a_worker_thread_s_work_ends_the_batch(
    error: BaseException, engine: Engine, expected: Sequence[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patches:
        patches.setattr(WeightStore, "load", failing(WeightStore.load, error, at=6))
        with pytest.raises(type(error)):
            engine.generate(REQUESTS)
    assert texts(engine.generate(REQUESTS)) == texts(expected)


def test_memory_that_runs_out_is_said_with_the_option(
    engine: Engine, expected: Sequence[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(self: Anatomy, layer: int, *args: Any) -> Tensor:
        return torch.empty(2**46, dtype=torch.uint8)

    with monkeypatch.context() as patches:
        patches.setattr(Anatomy, "run_layer", greedy)
        with pytest.raises(CapacityError, match=r"cpu memory ran out: .*allocate.*--cpu-memory"):
            engine.generate(REQUESTS)
    assert texts(engine.generate(REQUESTS)) == texts(expected)
