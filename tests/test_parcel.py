"""Archives of data: what was packed comes back, and nothing else is ever written."""

from __future__ import annotations

import errno
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexeval.benchmark.supply import archive as bounds
from flexeval.benchmark.supply.parcel import MANIFEST, pack, unpack
from flexeval.errors import DataError


def roots_below(folder: Path) -> dict[str, Path]:
    return {"cache": folder / "cache", "nltk": folder / "nltk"}


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, Path]:
    roots = roots_below(tmp_path / "here")
    for path, text in {
        "cache/a/one.csv": "1,2",
        "cache/a/b/zwei": "é" * 9000,
        "cache/other": "no",
        "nltk/p": "",
    }.items():
        file = tmp_path / "here" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return roots


@pytest.fixture
def archive(roots: dict[str, Path], tmp_path: Path) -> Path:
    out = tmp_path / "data.tar.gz"
    pack([roots["cache"] / "a", roots["nltk"] / "p"], roots, out)
    return out


def counts(source: Path, there: dict[str, Path]) -> tuple[int, int]:
    """Import; files that are new, and that lay there."""
    done = unpack(source, there)
    return len(done.entries) - done.num_there, done.num_there


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_packed_comes_back(archive: Path, roots: dict[str, Path], tmp_path: Path) -> None:
    there = roots_below(tmp_path / "there")
    assert counts(archive, there) == (3, 0)
    expected = {name: content for name, content in files(tmp_path / "here").items() if name != "cache/other"}
    assert files(tmp_path / "there") == expected
    assert counts(archive, there) == (0, 3), "once more"
    assert files(tmp_path / "there") == expected


def test_a_folder_that_it_was_unpacked_to_will_do(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "folder")
    assert counts(tmp_path / "folder", roots_below(tmp_path / "there")) == (3, 0)


@pytest.mark.parametrize("above", ["", "./", "copied/"])
@pytest.mark.parametrize("form", ["w", "w:gz", "w:bz2", "w:xz", "zst", "zip"])
def test_so_will_a_folder_that_was_packed_again(archive: Path, tmp_path: Path, above: str, form: str) -> None:
    items = sorted(members(archive), key=lambda item: item[0].name, reverse=True)  # the manifest not in front
    again = tmp_path / "again"
    if form == "zip":
        with zipfile.ZipFile(again, "w") as packed:
            for member, content in items:
                packed.writestr(above + member.name, content)
    else:
        with tarfile.open(again, "w" if form == "zst" else form) as tar:  # type: ignore[call-overload]
            for member, content in items:
                member.name = above + member.name
                tar.addfile(member, io.BytesIO(content))
    if form == "zst":
        again.write_bytes(zstandard.compress(again.read_bytes()))
    assert counts(again, roots_below(tmp_path / "there")) == (3, 0)
    assert (tmp_path / "there/cache/a/one.csv").read_text() == "1,2"


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_has_nothing_to_do_with_it_is_said(is_folder: bool, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(5):
        (photos / f"{number}.jpg").write_bytes(b"x")
    source = photos if is_folder else Path(shutil.make_archive(str(tmp_path / "photos"), "zip", photos))
    with pytest.raises(DataError, match=rf"holds no {MANIFEST}, only 0.jpg, 1.jpg, 2.jpg and 2 more"):
        unpack(source, roots_below(tmp_path / "there"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=rf"holds no {MANIFEST}, nothing"):
        unpack(tmp_path / "empty", roots_below(tmp_path / "there"))
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(DataError, match="cannot be read"):
        unpack(tmp_path / "text", roots_below(tmp_path / "there"))
    assert not files(tmp_path / "there")


def test_another_file_in_the_place_of_one_is_left_alone(archive: Path, tmp_path: Path) -> None:
    there = roots_below(tmp_path / "there")
    mine = there["cache"] / "a/one.csv"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(DataError, match=r"another file lies at .*one\.csv"):
        unpack(archive, there)
    assert files(tmp_path / "there") == {"cache/a/one.csv": b"mine"}


def test_one_that_fails_in_the_middle_is_taken_back(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, told = [], []
    move = shutil.move

    def fill_the_disk(source: Path, target: Path) -> None:
        if len(moved) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        moved.append(move(source, target))

    monkeypatch.setattr(shutil, "move", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        unpack(archive, roots_below(tmp_path / "there"), before=told.extend)
    assert len(moved) == 2 and not files(tmp_path / "there")
    assert [entry.path for entry in told] == ["a/b/zwei", "a/one.csv", "p"], "and was told beforehand"


def members(archive: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(archive) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def write(archive: Path, items: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        for member, content in items:
            tar.addfile(member, io.BytesIO(content))


def with_manifest(items: list[tuple[tarfile.TarInfo, bytes]], change: Callable[[Any], None]) -> Any:
    manifest = json.loads(items[0][1])
    change(manifest)
    text = json.dumps(manifest).encode()
    items[0][0].size = len(text)
    return [(items[0][0], text), *items[1:]]


def renamed(path: str) -> Callable[[Any], Any]:
    """The first file under another name, in the manifest as well."""

    def change(items: Any) -> Any:
        items[1][0].name = f"cache/{path}"
        return with_manifest(items, lambda manifest: manifest["files"][0].update(path=path))

    return change


def link(items: Any) -> Any:
    items[1][0].type, items[1][0].linkname, items[1][0].size = tarfile.SYMTYPE, "/etc/passwd", 0
    return items


def damaged(items: Any) -> Any:
    return [items[0], (items[1][0], b"x" * items[1][0].size), *items[2:]]


def longer(items: Any) -> Any:
    items[1][0].size += 1
    return [items[0], (items[1][0], items[1][1] + b"!"), *items[2:]]


def surplus(items: Any) -> Any:
    header = tarfile.TarInfo("cache/evil")
    header.size = 1
    return [*items, (header, b"!")]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (renamed("../evil"), "wants to write to"),
        (renamed("/etc/evil"), "wants to write to"),
        (renamed("a/../../evil"), "wants to write to"),
        (renamed("a\0b"), "wants to write to"),
        (renamed(""), "wants to write to"),
        (link, "is no plain file"),
        (damaged, "is damaged"),
        (longer, "is damaged"),
        (surplus, "its manifest does not name cache/evil"),
        (lambda items: items[:-1], "its manifest names nltk/p, not in it"),
        (lambda items: items[1:], f"holds no {MANIFEST}, only cache/a/b/zwei, cache/a/one.csv, nltk/p"),
        (lambda items: [*items, items[1]], "holds 'cache/a/b/zwei' twice"),
        (lambda items: with_manifest(items, lambda m: m.update(version=2)), "its form has version 2"),
        (lambda items: with_manifest(items, lambda m: m.pop("files")), "its manifest cannot be read"),
        (lambda items: with_manifest(items, lambda m: m["files"].append(m["files"][0])), "names a file twice"),
        (lambda items: with_manifest(items, lambda m: m["files"][0].update(root="home")), "wants to write to"),
        (lambda items: with_manifest(items, lambda m: m["files"][0].update(size=2**50)), "holds more than"),
        (lambda items: with_manifest(items, lambda m: m["files"][0].update(size=-1)), "without a size"),
        (lambda items: with_manifest(items, lambda m: m["files"][0].update(size="1")), "without a size"),
    ],
)
def test_a_hostile_archive_writes_nothing(
    change: Callable[[Any], Any], what: str, archive: Path, tmp_path: Path
) -> None:
    write(archive, change(members(archive)))
    with pytest.raises(DataError, match=what) as caught:
        unpack(archive, roots_below(tmp_path / "there"))
    assert str(archive) in str(caught.value)
    assert not files(tmp_path / "there")
    assert not (tmp_path / "evil").exists()


def test_a_link_in_the_place_of_a_folder_is_not_followed(archive: Path, tmp_path: Path) -> None:
    there = roots_below(tmp_path / "there")
    (tmp_path / "outside").mkdir()
    there["cache"].mkdir(parents=True)
    (there["cache"] / "a").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match=r"a link leads .* out of its folder"):
        unpack(archive, there)
    assert not files(tmp_path / "outside")


def test_too_many_files_are_refused_before_any_is_read(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MAX_FILES", 2)
    with pytest.raises(DataError, match="holds more than 2 files"):
        unpack(archive, roots_below(tmp_path / "there"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(data=st.data())
def test_no_damage_puts_a_wrong_file_in_place(data: st.DataObject, archive: Path, tmp_path: Path) -> None:
    whole = archive.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = tmp_path / "damaged.tar.gz"
    keep = data.draw(st.integers(0, len(whole)))
    flipped = whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :]
    damaged.write_bytes(flipped if data.draw(st.booleans()) else whole[:keep])
    target = tmp_path / "each" / str(len(list((tmp_path / "each").glob("*"))))
    try:
        unpack(damaged, roots_below(target))
    except DataError:
        assert not files(target)
        return
    expected = {name: content for name, content in files(tmp_path / "here").items() if name != "cache/other"}
    assert files(target) == expected


def test_what_lies_elsewhere_is_not_packed(roots: dict[str, Path], tmp_path: Path) -> None:
    stray = tmp_path / "stray"
    stray.write_text("x")
    with pytest.raises(DataError, match="lies in no folder of data"):
        pack([stray], roots, tmp_path / "out.tar.gz")
    with pytest.raises(DataError, match="nothing to pack"):
        pack([], roots, tmp_path / "out.tar.gz")
    assert not (tmp_path / "out.tar.gz").exists()
