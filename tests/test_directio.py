"""Transfers past the page cache: every byte arrives, also where the file system takes no direct transfers."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from flexeval.directio import BLOCK_BYTES, CHUNK_BYTES, DirectIO, round_down, round_up


def test_what_is_tried_on_a_disk_has_no_name_that_a_killed_process_could_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwritev = os.pwritev

    def look(*arguments: object) -> int:
        assert list(tmp_path.iterdir()) == []
        return pwritev(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwritev", look)
    with DirectIO(tmp_path) as io:
        assert list(tmp_path.iterdir()) == []
    assert io.is_direct == os_takes_direct(tmp_path)


def os_takes_direct(folder: Path) -> bool:
    path = folder / "named"
    path.touch()
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_rounding_to_blocks() -> None:
    assert [round_down(n) for n in (0, 1, BLOCK_BYTES, 2 * BLOCK_BYTES - 1)] == [0, 0, BLOCK_BYTES, BLOCK_BYTES]
    assert [round_up(n) for n in (0, 1, BLOCK_BYTES, BLOCK_BYTES + 1)] == [0, BLOCK_BYTES, BLOCK_BYTES, 2 * BLOCK_BYTES]
    assert CHUNK_BYTES % BLOCK_BYTES == 0


def refuse_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def open_buffered_only(path: str, flags: int, *args: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct transfers here")
        return opened(path, flags, *args)

    monkeypatch.setattr(os, "open", open_buffered_only)


def refuse_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EINVAL, "no direct transfers here")

    monkeypatch.setattr(os, "preadv", fail)


@pytest.mark.parametrize("refuse", [None, refuse_to_open, refuse_to_read], ids=["as it is", "open", "read"])
def test_a_file_comes_back(refuse: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patches:
        if callable(refuse):
            refuse(patches)
        io = DirectIO(tmp_path)
    if refuse is not None:
        assert not io.is_direct
    content = os.urandom(3 * BLOCK_BYTES)
    with io, mmap.mmap(-1, len(content)) as source, mmap.mmap(-1, 2 * BLOCK_BYTES) as target:
        source.write(content)
        with io.opened(tmp_path / "file", os.O_RDWR | os.O_CREAT) as file:
            io.submit(io.write, file, source, 0).result()
            io.submit(io.read, file, target, BLOCK_BYTES).result()
            assert target[:] == content[BLOCK_BYTES:]
            with pytest.raises(OSError, match="the file ends before byte"):
                io.read(file, target, 2 * BLOCK_BYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_transfer_that_stops_halfway_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may move fewer bytes than it is asked to."""
    content = os.urandom(5 * BLOCK_BYTES)
    (tmp_path / "file").write_bytes(bytes(len(content)))
    pwritev, preadv = os.pwritev, os.preadv
    with DirectIO(tmp_path) as io, mmap.mmap(-1, len(content)) as buffer:
        buffer.write(content)
        monkeypatch.setattr(os, "pwritev", lambda file, parts, at: pwritev(file, [parts[0][: 2 * BLOCK_BYTES]], at))
        monkeypatch.setattr(os, "preadv", lambda file, parts, at: preadv(file, [parts[0][: 2 * BLOCK_BYTES]], at))
        with io.opened(tmp_path / "file", os.O_RDWR) as file:
            io.write(file, memoryview(buffer), 0)
            buffer[:] = bytes(len(content))
            io.read(file, memoryview(buffer), 0)
            assert buffer[:] == content


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        DirectIO(tmp_path / "missing")
