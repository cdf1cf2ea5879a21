"""Data files in one archive, from a machine with a network to one without. Knows files and manifests; no benchmark.

An archive begins with a manifest: of each file the root it lies under, its path there, its size and SHA-256. Nothing
is unpacked that the manifest does not name, nothing outside the roots, and nothing is put in place before all of it has
been checked.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, NamedTuple

from flexeval.benchmark.supply import archive
from flexeval.benchmark.supply.archive import Member, checked_name, read_members, reading
from flexeval.benchmark.supply.manifest import Entry, Roots, describe, files_of, parse, sha256_of, to_json
from flexeval.cache import unfinished_beside
from flexeval.errors import DataError
from flexeval.files import replacing

MANIFEST = "flexeval-data.json"
_MAX_MANIFEST_BYTES = 256 * 2**20
_NUM_NAMED = 3
_COMPRESSION = 3  # most of it is compressed already, or text: more takes five times as long for a tenth less
_CHUNK_BYTES = 2**20


BeforePlacing = Callable[[list[Entry]], None]
OnFile = Callable[[int, int], None]
"""Told (files done, files in all)."""


class Imported(NamedTuple):
    """What an import has done."""

    entries: list[Entry]
    """All files of the archive; they are in place now."""
    num_there: int
    """How many of them lay there already, the same."""


def pack(
    paths: Iterable[Path], roots: Roots, out: Path, *, on_file: OnFile = lambda num_done, num_files: None
) -> list[Entry]:
    """Write files, and folders with all that is in them, to a `.tar.gz`, whole or not at all.

    Args:
        paths: Each below one of the roots.
        roots: By name.
        out: The archive.
        on_file: Told the progress.

    Raises:
        DataError: A path is below none of them, or there is nothing to pack.
    """
    files = dict.fromkeys(file for path in paths for file in files_of(path))
    entries = {file: describe(file, roots) for file in files}
    if not entries:
        raise DataError("there is nothing to pack", where=str(out), mend="Fetch the data first")
    manifest = json.dumps(to_json(entries.values())).encode()
    with replacing(out) as temporary, tarfile.open(temporary, "w:gz", compresslevel=_COMPRESSION) as tar:
        tar.addfile(_header(MANIFEST, len(manifest)), BytesIO(manifest))
        for num_done, (file, entry) in enumerate(entries.items()):
            on_file(num_done, len(entries))
            with file.open("rb") as content:
                tar.addfile(_header(entry.member, entry.size), content)
    return list(entries.values())


def unpack(
    source: Path,
    roots: Roots,
    *,
    before: BeforePlacing = lambda entries: None,
    on_file: OnFile = lambda num_done, num_files: None,
) -> Imported:
    """Put the files of an archive, or of a folder that one was unpacked to, below their roots: all or none.

    Args:
        source: The archive or folder.
        roots: By name.
        before: Told what comes, once all of it has been checked and before the first file is in place: whoever
            remembers it sees what is missing if the machine stops in between.
        on_file: Told the progress.

    Raises:
        DataError: It is damaged, holds what it should not, or another file lies where one of its own belongs.
    """
    above, entries = _find_manifest(source, roots)
    with unfinished_beside(next(iter(roots.values())) / "import") as scratch:
        unpacked: dict[str, Path] = {}
        strays = []
        for name, content in _members(source):
            inner = name.removeprefix(above)
            if inner == MANIFEST:
                continue
            entry = entries.get(inner) if name.startswith(above) else None
            if entry is None:
                strays.append(name)
                continue
            on_file(len(unpacked), len(entries))
            unpacked[inner] = scratch / str(len(unpacked))
            if _copy(source, content, unpacked[inner], entry.size) != entry.sha256:
                raise _refuse(source, f"{inner} is damaged: its checksum differs")
        if strays:
            raise _refuse(source, f"its manifest does not name {_some(strays)}", "Take out what does not belong")
        if missing := sorted(entries.keys() - unpacked.keys()):
            raise _refuse(source, f"its manifest names {_some(missing)}, not in it")
        there = _already_there(source, entries, roots)
        before(list(entries.values()))
        _put_in_place({name: _target(entries[name], roots) for name in entries.keys() - there}, unpacked)
        return Imported(list(entries.values()), len(there))


def _already_there(source: Path, entries: dict[str, Entry], roots: Roots) -> set[str]:
    """Which files are in place already, the same. Raises `DataError` where another one is."""
    there = {name for name, entry in entries.items() if _target(entry, roots).exists()}
    for name in there:
        target = _target(entries[name], roots)
        if not target.is_file() or sha256_of(target) != entries[name].sha256:
            raise _refuse(source, f"another file lies at {target}", "Move it away")
    return there


def _put_in_place(targets: dict[str, Path], unpacked: dict[str, Path]) -> None:
    placed: list[Path] = []
    try:
        for name, target in targets.items():
            with replacing(target) as temporary:
                shutil.move(unpacked[name], temporary)
            placed.append(target)
    except BaseException:
        for target in placed:
            target.unlink()
        raise


def _target(entry: Entry, roots: Roots) -> Path:
    return roots[entry.root] / entry.path


def _find_manifest(source: Path, roots: Roots) -> tuple[str, dict[str, Entry]]:
    """The folder of an archive in which its manifest lies, with a slash at the end, and what it says, by member."""
    names = []
    for name, content in _members(source):
        above, _, last = name.rpartition("/")
        if last == MANIFEST and above.count("/") == 0:
            entries = _read_manifest(source, content, roots)
            return (f"{above}/" if above else ""), {entry.member: entry for entry in entries}
        names.append(name)
    held = f"only {_some(names)}" if names else "nothing"
    raise _refuse(source, f"it holds no {MANIFEST}, {held}", "Make one with flexeval data export")


def _read_manifest(source: Path, content: IO[bytes], roots: Roots) -> list[Entry]:
    text = BytesIO()
    with reading(source):
        while (chunk := content.read(_CHUNK_BYTES)) and text.tell() <= _MAX_MANIFEST_BYTES:
            text.write(chunk)
    try:
        entries = parse(text.getvalue())
    except (ValueError, RecursionError) as error:
        raise _refuse(source, str(error)) from error
    if len(entries) > archive.MAX_FILES or sum(entry.size for entry in entries) > archive.MAX_BYTES:
        raise _refuse(source, f"it holds more than {archive.MAX_FILES} files or {archive.MAX_BYTES // 2**30} GiB")
    for entry in entries:
        if entry.root not in roots or not entry.path or checked_name(source, entry.path) != entry.path:
            raise _refuse(source, f"it wants to write to {entry.member!r}")
        if not _target(entry, roots).parent.resolve().is_relative_to(roots[entry.root].resolve()):
            raise _refuse(source, f"a link leads {entry.member!r} out of its folder")
    return entries


def _members(source: Path) -> Iterator[Member]:
    """The files of an archive or a folder; a folder's manifest first."""
    if not source.exists():
        raise DataError("there is no such file", where=str(source), mend="Name an archive or a folder")
    return _of_folder(source) if source.is_dir() else read_members(source)


def _of_folder(folder: Path) -> Iterator[Member]:
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir()]
    for name in sorted(names, key=lambda name: name != MANIFEST):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise _refuse(folder, f"{name!r} is no plain file")
        with path.open("rb") as content:
            yield Member(name, content)


def _copy(source: Path, content: IO[bytes], target: Path, size: int) -> str:
    """Copy at most one chunk more than `size`; the checksum of what was copied."""
    digest, num_bytes = hashlib.sha256(), 0
    with target.open("wb") as file:
        while num_bytes <= size:
            with reading(source):
                chunk = content.read(_CHUNK_BYTES)
            if not chunk:
                break
            file.write(chunk)
            digest.update(chunk)
            num_bytes += len(chunk)
    return digest.hexdigest()


def _header(name: str, size: int) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size = size
    return header


def _some(names: list[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(name[:80] for name in names[:_NUM_NAMED]) + more


def _refuse(source: Path, what: str, mend: str = "Copy it again, or make it anew") -> DataError:
    return archive.refusal(source, what, mend)
