"""Archives from strangers: plain files come out, below the folder, within bounds; everything else is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexeval.benchmark.supply import archive
from flexeval.benchmark.supply.archive import decompress, read_members, unpack
from flexeval.errors import DataError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "tar.gz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
    "tar.zst": zstandard.compress,
}
FORMS = (*COMPRESS, "zip")
Item = tuple[str, bytes] | tuple[str, bytes, bytes]
"""Name, content, and a tar's type of member."""


def make(folder: Path, form: str, *items: Item) -> Path:
    """An archive whose name tells nothing."""
    out = folder / "archive"
    if form == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content, *_ in items:
                packed.writestr(name, content)
        return out
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, content, *kind in items:
            member = tarfile.TarInfo(name)
            member.size, member.type = len(content), kind[0] if kind else tarfile.REGTYPE
            if member.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                member.linkname, member.size = content.decode(), 0
            tar.addfile(member, io.BytesIO(content))
    out.write_bytes(COMPRESS[form](raw.getvalue()))
    return out


def unpacked(source: Path, folder: Path) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    unpack(source, folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", FORMS)
def test_plain_files_come_out(form: str, tmp_path: Path) -> None:
    files = {"a/one": b"1" * 3_000_000, "a/b/two": b"", "ümläut": b"3"}
    source = make(tmp_path, form, ("./", b"", tarfile.DIRTYPE), *files.items())
    assert unpacked(source, tmp_path / "out") == files


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("../evil", "wants to write to"),
        ("a/../../evil", "wants to write to"),
        ("/etc/evil", "wants to write to"),
        ("a//evil", "wants to write to"),
        ("a\\..\\evil", "wants to write to"),
        ("C:/evil", "wants to write to"),
        ("x" * 256, "a name in it is too long"),
    ],
)
def test_names_that_lead_elsewhere(form: str, name: str, what: str, tmp_path: Path) -> None:
    source = make(tmp_path, form, ("good", b"1"), (name, b"2"))
    with pytest.raises(DataError, match=what):
        unpacked(source, tmp_path / "out")
    assert {path.name for path in tmp_path.rglob("*")} == {"archive", "out", "good"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_of_a_tar(kind: bytes, tmp_path: Path) -> None:
    source = make(tmp_path, "tar.gz", ("a", b"/etc", kind), ("a/passwd", b"2"))
    with pytest.raises(DataError, match="'a' is no plain file"):
        unpacked(source, tmp_path / "out")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_of_a_zip(kind: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive", "w") as packed:
        info = zipfile.ZipInfo("a")
        info.external_attr = (kind | 0o777) << 16
        packed.writestr(info, "/etc")
    with pytest.raises(DataError, match="'a' is no plain file"):
        unpacked(tmp_path / "archive", tmp_path / "out")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("a", "./a"), "holds 'a' twice"),
        (("a", "a/b"), "'a/b' is a file and a folder in it"),
        (("a/b", "a"), "'a' is a file and a folder in it"),
    ],
)
def test_names_in_each_other_s_way(form: str, names: tuple[str, str], what: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=what):
        unpacked(make(tmp_path, form, *((name, b"") for name in names)), tmp_path / "out")


@pytest.mark.parametrize("form", [form for form in FORMS if form != "tar"])
def test_a_bomb_is_stopped(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "FREE_BYTES", 2**20)
    source = make(tmp_path, form, ("zeros", bytes(40 * 2**20)))
    monkeypatch.setattr(archive, "MAX_RATIO", 20)
    with pytest.raises(DataError, match="or 20 times its size"):
        unpacked(source, tmp_path / "out")
    written = (tmp_path / "out/zeros").stat().st_size if (tmp_path / "out/zeros").exists() else 0
    assert written <= 2**20 + 20 * source.stat().st_size, "and does not come out"


@pytest.mark.parametrize("form", FORMS)
def test_bounds_of_all_that_comes_out(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path, form, *((str(number), bytes(1000)) for number in range(30)))
    monkeypatch.setattr(archive, "MAX_FILES", 29)
    with pytest.raises(DataError, match="more than 29 files"):
        unpacked(source, tmp_path / "out")
    monkeypatch.setattr(archive, "MAX_FILES", 30)
    monkeypatch.setattr(archive, "MAX_BYTES", 20_000)
    with pytest.raises(DataError, match="it holds more than"):
        unpacked(source, tmp_path / "again")


def test_a_header_that_would_fill_the_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 2**32
    (tmp_path / "archive").write_bytes(header.tobuf() + bytes(10_000))
    with pytest.raises(DataError, match="cannot be read: a header of 4294967296 bytes"):
        list(read_members(tmp_path / "archive"))


def test_a_sparse_file(tmp_path: Path) -> None:
    """A few bytes that stand for terabytes of zeros."""
    member = tarfile.TarInfo("a")
    member.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**50)}
    member.size = 1
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(b"1"))
    (tmp_path / "archive").write_bytes(raw.getvalue())
    with pytest.raises(DataError, match="is no plain file"):
        unpacked(tmp_path / "archive", tmp_path / "out")


def test_an_encrypted_zip(tmp_path: Path) -> None:
    source = make(tmp_path, "zip", ("a", b"1"))
    whole = bytearray(source.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        whole[whole.index(magic) + offset] |= 1
    source.write_bytes(bytes(whole))
    with pytest.raises(DataError, match="'a' is encrypted"):
        unpacked(source, tmp_path / "out")


@pytest.mark.parametrize("form", FORMS)
def test_one_that_is_cut_off(form: str, tmp_path: Path) -> None:
    source = make(tmp_path, form, ("a", bytes(range(256)) * 400))
    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        unpacked(source, tmp_path / "out")


@pytest.mark.parametrize(
    "content", [b"", b"text", b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"]
)
def test_no_archive_at_all(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        unpacked(tmp_path / "archive", tmp_path / "out")


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress, bz2.compress, lzma.compress])
def test_one_compressed_file(
    compress: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(compress(b"text" * 500_000))
    decompress(source, target)
    assert target.read_bytes() == b"text" * 500_000
    monkeypatch.setattr(archive, "FREE_BYTES", 1000)
    monkeypatch.setattr(archive, "MAX_RATIO", 2)
    with pytest.raises(DataError, match="or 2 times its size"):
        decompress(source, target)
    source.write_bytes(source.read_bytes()[:-5])
    monkeypatch.undo()
    with pytest.raises(DataError, match="cannot be read"):
        decompress(source, target)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(data=st.data())
def test_damage_is_refused_in_one_line_or_does_no_harm(data: st.DataObject, tmp_path: Path) -> None:
    form = data.draw(st.sampled_from(FORMS))
    whole = bytearray(make(tmp_path, form, ("a/b", b"12" * 200), ("c", b"3")).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "archive").write_bytes(bytes(whole))
    folder = tmp_path / "each" / str(len(list((tmp_path / "each").glob("*"))))
    folder.mkdir(parents=True)
    before: Any = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "each")}
    try:
        unpack(tmp_path / "archive", folder)
    except DataError as error:
        assert "\n" not in str(error)
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "each")} == before
    assert not any(path.is_symlink() for path in folder.rglob("*"))
