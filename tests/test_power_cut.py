"""What is said to be on the disk is there after a loss of power, whatever of the rest has reached it.

A stand-in for a disk: what `fsync` was called for is durable, of files their bytes, of folders their names. Before each
call that changes something, and at the end, the power goes off: of all else, everything or nothing has arrived, names
and bytes apart.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_journal import FIRST, FORKED, PLAIN, SECOND

from flexeval.cache import build_whole
from flexeval.files import replacing, write_json
from flexeval.journal import Journal
from flexeval.request import Request

Files = dict[str, bytes]
"""A folder after the power went off: bytes by path."""


class Cut(NamedTuple):
    """A loss of power."""

    before: str
    """The call that was not made any more; empty at the end."""
    files: Files


class Disk:
    """Watches a folder; its subfolders are watched as they are synced."""

    def __init__(self, root: Path):
        self._root = root
        self._bytes: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self.cuts: list[Cut] = []

    def sync(self, path: Path, status: os.stat_result) -> None:
        if stat.S_ISDIR(status.st_mode):
            self._names[status.st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self._bytes[status.st_ino] = path.read_bytes()

    def cut(self, before: str) -> None:
        """Take down what may be left of the folder now."""
        for has_names in (False, True):
            for share in (0.0, 0.5, 1.0):
                left = self._left(self._root.stat().st_ino, self._root, has_names, share)
                self.cuts.append(Cut(before, {str(path.relative_to(self._root)): data for path, data in left}))

    def _left(self, inode: int, folder: Path, has_names: bool, share: float) -> Iterator[tuple[Path, bytes]]:
        is_here = _is_at(folder, inode)
        now = {entry.name: entry.inode() for entry in os.scandir(folder)} if is_here else {}
        for name, child in (now if has_names and is_here else self._names.get(inode, {})).items():
            path = folder / name
            if child in self._names or (_is_at(path, child) and path.is_dir()):
                yield from self._left(child, path, has_names, share)
                continue
            synced = self._bytes.get(child, b"")
            current = path.read_bytes() if _is_at(path, child) else synced
            arrived = current[: len(synced) + int(share * (len(current) - len(synced)))]
            yield path, synced if share == 0.0 else arrived


def _is_at(path: Path, inode: int) -> bool:
    return path.exists() and path.stat().st_ino == inode


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    root = tmp_path / "disk"
    root.mkdir()
    watched = Disk(root)
    fsync = os.fsync

    def synced(file: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        watched.cut(f"fsync {path.name}")
        fsync(file)
        watched.sync(path, os.fstat(file))

    def watching(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            watched.cut(f"{name} {args}")
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", synced)
    for name in ("replace", "rename", "unlink"):
        monkeypatch.setattr(os, name, watching(name))
    return watched


def test_a_file_is_the_old_one_or_the_new_one(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "disk" / "results.json"
    write_json(path, {"old": 1})
    disk.cuts.clear()
    write_json(path, {"new": [2] * 100})
    assert {cut.files["results.json"] for cut in disk.cuts} == {b'{\n "old": 1\n}\n', path.read_bytes()}
    disk.cuts.clear()
    disk.cut("")
    assert all(cut.files["results.json"] == path.read_bytes() for cut in disk.cuts), "when it is said to be there"


def test_a_first_file_is_there_or_not(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "disk" / "answers.parquet"
    with replacing(path) as temporary:
        temporary.write_bytes(b"x" * 5000)
    found = {cut.files.get(path.name) for cut in disk.cuts}
    assert found == {None, b"x" * 5000}


def test_answers_that_are_said_to_be_durable_are(disk: Disk, tmp_path: Path) -> None:
    """Wherever the power goes off: those of finished sweeps come back as they were, and no other than was written."""
    path = tmp_path / "disk" / "journal" / "one.jsonl"
    requests = [FIRST, SECOND, Request(prompt="three"), Request(prompt="four")]
    answers = [PLAIN, FORKED, replace(PLAIN, text="three"), replace(PLAIN, text="four" * 100)]
    num_durable: list[tuple[int, int]] = []  # cuts until then, answers durable
    with Journal(path) as journal:
        for number, pair in enumerate(zip(requests, answers, strict=True)):
            journal.add([pair])
            num_durable.append((len(disk.cuts), number + 1))
            disk.cut("")
    copy = tmp_path / "copy.jsonl"
    seen = set()
    for index, cut in enumerate(list(disk.cuts)):  # reading makes more
        least = max((number for first, number in num_durable if index >= first), default=0)
        copy.write_bytes(cut.files.get("journal/one.jsonl", b""))
        with Journal(copy) as found:
            known = [request in found for request in requests]
            assert all(known[:least]), (cut.before, least, known)
            assert all(
                found[request] == answer for request, answer in zip(requests, answers, strict=True) if request in found
            )
            seen.add(sum(known))
    assert seen == set(range(len(requests) + 1))


def test_a_folder_is_whole_or_not_there(disk: Disk, tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "weights").write_bytes(b"w" * 9000)
        (folder / "config").write_text("{}")

    whole = {"made/deep/weights": b"w" * 9000, "made/config": b"{}"}
    build_whole(tmp_path / "disk" / "made", build)
    disk.cut("")
    for cut in disk.cuts:
        found = {name: data for name, data in cut.files.items() if name.startswith("made/")}
        assert found in ({}, whole), cut.before
    assert {name: data for name, data in disk.cuts[-6].files.items() if name.startswith("made/")} == whole
