"""Data files in one archive, from a machine with a network to one without. Knows files and checksums; no benchmark.

An archive begins with a manifest: of each file the root it lies under, its path there, its size and SHA-256. Nothing
is unpacked that the manifest does not name, nothing outside the roots, and nothing is put in place before all of it has
been checked.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from flexeval.errors import DataError
from flexeval.files import replacing

VERSION = 1
MANIFEST = "flexeval-data.json"
MAX_FILES, MAX_BYTES, MAX_MANIFEST_BYTES = 500_000, 200 * 2**30, 256 * 2**20
"""Of what an archive holds, unpacked: more is refused before anything is written."""
_CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file of an archive."""

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
        """Its name in the archive."""
        return f"{self.root}/{self.path}"


class Imported(NamedTuple):
    """What an import has done."""

    num_new: int
    """Files put in place."""
    num_there: int
    """Files that lay there already, the same."""


def pack(paths: Iterable[Path], roots: Mapping[str, Path], out: Path) -> list[Entry]:
    """Write files, and folders with all that is in them, to a `.tar.gz`, whole or not at all.

    Args:
        paths: Each below one of the roots.
        roots: By name.
        out: The archive.

    Raises:
        DataError: A path is below none of them, or there is nothing to pack.
    """
    files = dict.fromkeys(file for path in paths for file in _files_of(path))
    entries = {file: _entry(file, roots) for file in files}
    if not entries:
        raise DataError("there is nothing to pack", where=str(out), mend="Fetch the data first")
    manifest = json.dumps({"version": VERSION, "files": [asdict(entry) for entry in entries.values()]}).encode()
    with replacing(out) as temporary, tarfile.open(temporary, "w:gz") as archive:
        archive.addfile(_header(MANIFEST, len(manifest)), BytesIO(manifest))
        for file, entry in entries.items():
            with file.open("rb") as content:
                archive.addfile(_header(entry.member, entry.size), content)
    return list(entries.values())


def unpack(source: Path, roots: Mapping[str, Path]) -> Imported:
    """Put the files of an archive, or of a folder that one was unpacked to, below their roots: all or none.

    Raises:
        DataError: It is damaged, holds what it should not, or another file lies where one of its own belongs.
    """
    members = _members(source)
    with tempfile.TemporaryDirectory(prefix=".flexeval-import-", dir=_place(roots)) as scratch:
        name, content = next(members, ("", BytesIO()))
        if name != MANIFEST:
            raise _refuse(source, f"it does not begin with {MANIFEST}", "Make it with flexeval data export")
        entries = {entry.member: entry for entry in _read_manifest(source, content, roots)}
        unpacked: dict[str, Path] = {}
        for name, content in members:
            entry = entries.get(name)
            if entry is None or name in unpacked:
                raise _refuse(source, f"it holds {name!r}, which its manifest does not name")
            unpacked[name] = Path(scratch) / str(len(unpacked))
            if _copy(source, content, unpacked[name], entry.size) != entry.sha256:
                raise _refuse(source, f"{name} is damaged: its checksum differs")
        if missing := entries.keys() - unpacked.keys():
            raise _refuse(source, f"{len(missing)} files are missing, {min(missing)} among them")
        targets = {name: roots[entry.root] / entry.path for name, entry in entries.items()}
        there = {name for name, target in targets.items() if target.exists()}
        for name in there:
            if not targets[name].is_file() or _sha256(targets[name]) != entries[name].sha256:
                raise _refuse(source, f"another file lies at {targets[name]}", "Move it away")
        for name in targets.keys() - there:
            targets[name].parent.mkdir(parents=True, exist_ok=True)
            shutil.move(unpacked[name], targets[name])
        return Imported(len(targets) - len(there), len(there))


def _files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _entry(file: Path, roots: Mapping[str, Path]) -> Entry:
    for name, root in roots.items():
        if file.is_relative_to(root):
            path = file.relative_to(root).as_posix()
            return Entry(root=name, path=path, size=file.stat().st_size, sha256=_sha256(file))
    raise DataError("this lies in no folder of data", where=str(file), mend="Fetch it with flexeval data fetch")


def _header(name: str, size: int) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size = size
    return header


def _read_manifest(source: Path, content: IO[bytes], roots: Mapping[str, Path]) -> list[Entry]:
    with _reading(source):
        text = content.read(MAX_MANIFEST_BYTES + 1)
    try:
        manifest = json.loads(text)
        if manifest["version"] != VERSION:
            raise _refuse(source, f"its form has version {manifest['version']!r}, this flexeval reads {VERSION}")
        entries = [Entry(**entry) for entry in manifest["files"]]
        is_sane = all(type(entry.size) is int and entry.size >= 0 for entry in entries)
        names = {entry.member for entry in entries}
    except (ValueError, TypeError, KeyError) as error:
        raise _refuse(source, f"its manifest cannot be read: {error}") from error
    if not is_sane or len(names) != len(entries):
        raise _refuse(source, "its manifest names a file twice, or without a size")
    if len(entries) > MAX_FILES or sum(entry.size for entry in entries) > MAX_BYTES:
        raise _refuse(source, f"it holds more than {MAX_FILES} files or {MAX_BYTES // 2**30} GiB")
    for entry in entries:
        path = PurePosixPath(entry.path)
        is_inside = entry.path and not path.is_absolute() and ".." not in path.parts and "\\" not in entry.path
        if entry.root not in roots or not is_inside or "\0" in entry.path:
            raise _refuse(source, f"it wants to write to {entry.member!r}")
        target = roots[entry.root] / entry.path
        if not target.parent.resolve().is_relative_to(roots[entry.root].resolve()):
            raise _refuse(source, f"a link leads {entry.member!r} out of its folder")
    return entries


def _members(source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """The files of an archive or a folder, the manifest first: name and content, to be read before the next."""
    if not source.exists():
        raise DataError("there is no such file", where=str(source), mend="Name an archive or a folder")
    return _of_folder(source) if source.is_dir() else _of_archive(source)


def _of_folder(folder: Path) -> Iterator[tuple[str, IO[bytes]]]:
    names = [file.relative_to(folder).as_posix() for file in _files_of(folder) if not file.is_symlink()]
    for name in sorted(names, key=lambda name: (name != MANIFEST, name)):
        with (folder / name).open("rb") as content:
            yield name, content


def _of_archive(source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with _reading(source), tarfile.open(source, "r|*") as archive:
        for member in archive:
            if member.isdir():
                continue
            content = archive.extractfile(member) if member.isreg() else None
            if content is None:
                raise _refuse(source, f"{member.name!r} is no plain file")
            yield member.name, content


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """What tarfile and its decompressors raise for bytes that are no archive."""
    try:
        yield
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, TypeError, ValueError) as error:
        raise _refuse(source, f"it cannot be read: {error}") from error
    except OSError as error:
        if error.errno is not None:  # the disk's, not the archive's
            raise
        raise _refuse(source, f"it cannot be read: {error}") from error


def _copy(source: Path, content: IO[bytes], target: Path, size: int) -> str:
    """Copy at most one byte more than `size`; the checksum of what was copied."""
    digest, left = hashlib.sha256(), size + 1
    with target.open("wb") as file:
        while left:
            with _reading(source):
                chunk = content.read(min(_CHUNK_BYTES, left))
            if not chunk:
                break
            file.write(chunk)
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _place(roots: Mapping[str, Path]) -> Path:
    """Where to unpack: beside the first root's files, so that putting them in place is a rename."""
    root = next(iter(roots.values()))
    root.mkdir(parents=True, exist_ok=True)
    return root


def _refuse(source: Path, what: str, mend: str = "Copy it again, or make it anew") -> DataError:
    return DataError(f"the archive is refused: {what}", where=str(source), mend=mend)
