"""Which files there are, with checksums: what begins an archive, and what is remembered of files that came.

Knows roots (the folders that data lie below, by name), sizes and SHA-256; must not know what the files mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from flexeval.errors import DataError
from flexeval.files import read_json, write_json

VERSION = 1
_HIDDEN_SUFFIXES = (".lock", ".incomplete")
_UNFINISHED = ".flexeval-unfinished."

Roots = Mapping[str, Path]
"""Folders that data lie below, by name, the most particular first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file that is known."""

    root: str
    """Name of the folder it lies under."""
    path: str
    """Where, with `/`."""
    size: int
    """Bytes."""
    sha256: str
    """Of its content, in hexadecimal."""

    @property
    def member(self) -> str:
        """Its name in an archive."""
        return f"{self.root}/{self.path}"


def describe(file: Path, roots: Roots) -> Entry:
    """Return a file's entry. Raises `DataError` for one that lies below none of the roots."""
    root, path = _place(file, roots)
    return Entry(root=root, path=path, size=file.stat().st_size, sha256=sha256_of(file))


def files_of(path: Path) -> list[Path]:
    """Return a file, or all files of a folder but locks and what is unfinished, in order."""
    found = path.rglob("*") if path.is_dir() else [path]
    return sorted(f for f in found if f.is_file() and f.suffix not in _HIDDEN_SUFFIXES and _UNFINISHED not in str(f))


def sha256_of(file: Path) -> str:
    """Return the checksum of a file's content, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def to_json(entries: Iterable[Entry]) -> dict[str, Any]:
    """Return what a manifest says."""
    return {"version": VERSION, "files": [asdict(entry) for entry in entries]}


def from_json(manifest: Any) -> list[Entry]:
    """Read what `to_json` returned, from a stranger perhaps.

    Raises:
        ValueError: It is not of that form, or names a file twice.
    """
    try:
        if manifest["version"] != VERSION:
            raise ValueError(f"its form has version {manifest['version']!r}, this flexeval reads {VERSION}")
        entries = [Entry(**entry) for entry in manifest["files"]]
        is_sane = all(
            type(e.size) is int and e.size >= 0 and all(type(text) is str for text in (e.root, e.path, e.sha256))
            for e in entries
        )
    except (TypeError, KeyError) as error:
        raise ValueError(f"its manifest cannot be read: {error}") from error
    if not is_sane or len({entry.member for entry in entries}) != len(entries):
        raise ValueError("its manifest names a file twice, or without a size")
    return entries


class Ledger:
    """The checksums that files had when they came to this machine, kept beside them."""

    def __init__(self, path: Path, roots: Roots):
        """Read it, if it is there; one that cannot be read is taken for none."""
        self._path = path
        self._roots = roots
        self._entries = self._read()

    def record(self, paths: Iterable[Path], *, anew: bool = False) -> None:
        """Remember all files of some files and folders as they are now: those that are not known yet, or all `anew`.

        What lies below none of the roots is left out.
        """
        files = [
            file for path in paths for file in files_of(path) if any(map(file.is_relative_to, self._roots.values()))
        ]
        self.add(describe(file, self._roots) for file in files if anew or self._find(file) is None)

    def add(self, entries: Iterable[Entry]) -> None:
        """Remember files."""
        new = {entry.member: entry for entry in entries}
        if not new:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self._path}.lock"):  # another process may have added some
            self._entries = self._read() | new
            write_json(self._path, to_json(self._entries.values()))

    def damage_of(self, path: Path, *, reads: bool) -> str:
        """Say what has changed in a file or folder since it came; empty where nothing is seen.

        Args:
            path: The file or folder.
            reads: Compare checksums, not only sizes.
        """
        files = set(files_of(path))
        for file in files:
            entry = self._find(file)
            if entry is None:
                continue
            if file.stat().st_size != entry.size:
                return f"{file} has {file.stat().st_size} bytes, {entry.size} when it came"
            if reads and sha256_of(file) != entry.sha256:
                return f"{file} has another checksum than when it came"
        gone = [file for file in self._recorded_below(path) if file not in files]
        return f"{min(gone)} is gone, which came with it" if gone else ""

    def knows(self, path: Path) -> bool:
        """Whether the checksums of all files in it are recorded."""
        return all(self._find(file) is not None for file in files_of(path))

    def _read(self) -> dict[str, Entry]:
        try:
            return {entry.member: entry for entry in from_json(read_json(self._path))}
        except (OSError, ValueError):
            return {}

    def _find(self, file: Path) -> Entry | None:
        try:
            root, path = _place(file, self._roots)
        except DataError:
            return None
        return self._entries.get(f"{root}/{path}")

    def _recorded_below(self, path: Path) -> list[Path]:
        places = (self._roots[e.root] / e.path for e in self._entries.values() if e.root in self._roots)
        return [place for place in places if place.is_relative_to(path)]


def _place(file: Path, roots: Roots) -> tuple[str, str]:
    for name, root in roots.items():
        if file.is_relative_to(root):
            return name, file.relative_to(root).as_posix()
    raise DataError("this lies in no folder of data", where=str(file), mend="Fetch it with flexeval data fetch")


def parse(text: bytes) -> list[Entry]:
    """Read the text of a manifest. Raises `ValueError`."""
    return from_json(json.loads(text))
