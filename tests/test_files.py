"""Files are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexeval.files import read_json, replacing, write_json, write_text


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "file"
    with replacing(path) as temporary:
        temporary.write_text("first half")
        assert not path.exists() and temporary.parent == path.parent, "renaming must not cross file systems"
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_a_disk_that_is_full_is_said_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(OSError, match="No space left on device") as caught, replacing(path):
        Path("/dev/full").write_bytes(b"x" * 100_000)
    assert caught.value.filename == str(path)


def test_text_that_no_encoding_knows_is_written_readably(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "東 \ud800")
    assert (tmp_path / "file").read_bytes() == "東 \\ud800".encode()


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"ключ": ["東", "\n", "\ud800", 1e-300, None, {"a": [True]}]}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value
    assert "東" in (tmp_path / "file.json").read_text(encoding="utf-8"), "readable by people"


def test_nothing_is_written_through_a_link_or_waited_for_in_a_pipe(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "file"
    for name in (path.name, f".{path.name}.1.tmp", f".{path.name}.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(victim)
    os.mkfifo(tmp_path / f".{path.name}.2.tmp")
    with pytest.raises(FileExistsError):
        write_text(path, "ours")
    write_text(path, "ours")
    assert not victim.exists() and path.read_text() == "ours" and not path.is_symlink()


def test_a_pipe_is_no_json(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file.json")
    with pytest.raises(OSError, match="it is no file"):
        read_json(tmp_path / "file.json")
