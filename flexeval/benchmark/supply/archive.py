"""Archives from strangers, read within bounds. Knows zip, tar and what compresses them; must not know what is in them.

Whatever an archive says, only plain files come out of it, below the folder they are unpacked to. Links, devices,
paths that lead elsewhere, too many files and bytes out of all proportion to the archive's own are refused.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow

from flexeval.errors import DataError

MAX_FILES, MAX_BYTES = 500_000, 200 * 2**30
"""Of what an archive holds, unpacked."""
MAX_RATIO, FREE_BYTES = 200, 256 * 2**20
"""So many times an archive's own size may come out of it, and these bytes of any: text shrinks to a tenth at best."""
_MAX_HEADER_BYTES = 2**20  # of a tar's extended headers, which tarfile reads into memory
_MAX_NAME_BYTES = 255
_CHUNK_BYTES = 2**20
_ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")  # at its beginning: a tar may end with a zip
_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_READ_ERRORS = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,  # an encrypted zip
    TypeError,
    ValueError,
)
"""What the readers raise for bytes that are no archive."""


class Member(NamedTuple):
    """A file of an archive."""

    name: str
    """Its path below the folder that the archive is unpacked to, with `/`."""
    content: IO[bytes]
    """To be read before the next member."""


def read_members(source: Path) -> Iterator[Member]:
    """Yield the files of a zip or of a tar, compressed or not, in the archive's order.

    Raises:
        DataError: It cannot be read, or something in it is refused.
    """
    bound = _Bound(source)
    files = _zip_members(source) if _starts_with(source, _ZIP_MAGIC) else _tar_members(source)
    seen: set[str] = set()
    for name, content in files:
        name = checked_name(source, name)
        if name in seen:
            raise refusal(source, f"it holds {name!r} twice")
        seen.add(name)
        if len(seen) > MAX_FILES:
            raise refusal(source, f"it holds more than {MAX_FILES} files")
        yield Member(name, _Counted(content, bound))  # type: ignore[arg-type]


def unpack(source: Path, folder: Path) -> None:
    """Put all files of an archive below a folder that is empty. Raises `DataError`, as `read_members` does."""
    for name, content in read_members(source):
        target = folder / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            file = target.open("xb")
        except (FileExistsError, NotADirectoryError) as error:
            raise refusal(source, f"{name!r} is a file and a folder in it") from error
        with file, reading(source):
            shutil.copyfileobj(content, file, _CHUNK_BYTES)


def decompress(source: Path, target: Path) -> None:
    """Write what a .gz, .bz2, .xz or .zst holds to a file. Raises `DataError` if it is none, or a bomb."""
    bound = _Bound(source)
    with target.open("wb") as file, _decompressed(source) as content, reading(source):
        shutil.copyfileobj(_Counted(content, bound), file, _CHUNK_BYTES)


def checked_name(source: Path, name: str) -> str:
    """Return a member's path as it is below the folder it is unpacked to. Raises `DataError` if it leads elsewhere."""
    parts = [part for part in name.split("/") if part != "."]
    is_inside = all(part and part != ".." for part in parts) and not name.startswith("/")
    if not parts or not is_inside or "\0" in name or "\\" in name or ":" in parts[0]:
        raise refusal(source, f"it wants to write to {name!r}")
    try:
        is_short = len(name.encode()) < 8 * _MAX_NAME_BYTES and all(len(p.encode()) <= _MAX_NAME_BYTES for p in parts)
    except UnicodeEncodeError as error:
        raise refusal(source, f"it wants to write to {name!r}") from error
    if not is_short:
        raise refusal(source, f"a name in it is too long: {name[:60]!r}...")
    return "/".join(parts)


def refusal(source: Path, what: str, mend: str = "Get it anew") -> DataError:
    """Return the error for an archive that is not unpacked."""
    return DataError(f"the archive is refused: {what}", where=str(source), mend=mend)


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Refuse an archive when a reader fails for what it is made of; errors of the disk are raised as they are."""
    try:
        yield
    except _READ_ERRORS as error:
        raise refusal(source, f"it cannot be read: {error}") from error
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # a damaged zip says where to look for a file, before its beginning
            raise
        raise refusal(source, f"it cannot be read: {error}") from error


class _Bound:
    """How many bytes may still come out of an archive."""

    def __init__(self, source: Path):
        self._source = source
        self._left = min(MAX_BYTES, FREE_BYTES + MAX_RATIO * source.stat().st_size)

    def take(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise refusal(self._source, f"it holds more than {MAX_BYTES // 2**30} GiB, or {MAX_RATIO} times its size")


class _Counted:
    """What is read of it counts."""

    def __init__(self, content: IO[bytes], bound: _Bound):
        self._content = content
        self._bound = bound

    def read(self, size: int = _CHUNK_BYTES) -> bytes:
        chunk = self._content.read(min(size, _CHUNK_BYTES) if size >= 0 else _CHUNK_BYTES)
        self._bound.take(len(chunk))
        return chunk


def _zip_members(source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with reading(source), zipfile.ZipFile(source) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.is_dir():
                continue
            if kind not in (0, stat.S_IFREG) or info.flag_bits & 0x1:
                raise refusal(
                    source, f"{info.filename!r} is {'encrypted' if info.flag_bits & 0x1 else 'no plain file'}"
                )
            with archive.open(info) as content:
                yield info.filename, content


def _tar_members(source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with (
        reading(source),
        _decompressed(source) as stream,
        tarfile.open(fileobj=_Counted(stream, _Bound(source)), mode="r|", tarinfo=_TarInfo) as archive,  # type: ignore[call-overload]
    ):
        for member in archive:
            archive.members.clear()  # or it keeps all of them
            if member.isdir():
                continue
            content = archive.extractfile(member) if member.isreg() and not member.issparse() else None
            if content is None:
                raise refusal(source, f"{member.name!r} is no plain file")
            yield member.name, content


class _TarInfo(tarfile.TarInfo):
    """Refuses extended headers that would fill the memory."""

    def _proc_member(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _HEADERS and self.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tarfile_)  # type: ignore[misc, no-any-return]


def _decompressed(source: Path) -> AbstractContextManager[IO[bytes]]:
    """Open a file, or what it holds if it is compressed: known by how it begins, whatever it is called."""
    for magic, opener in _COMPRESSED.items():
        if _starts_with(source, (magic,)):
            opened: AbstractContextManager[IO[bytes]] = opener(source)
            return opened
    return source.open("rb")


def _starts_with(source: Path, magics: tuple[bytes, ...]) -> bool:
    with source.open("rb") as file:
        return file.read(_MAGIC_BYTES).startswith(magics)


_MAGIC_BYTES = 6
_COMPRESSED: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x28\xb5\x2f\xfd": partial(pyarrow.CompressedInputStream, compression="zstd"),
}
