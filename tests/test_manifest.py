"""What is remembered of files that came: sizes and checksums, and what has changed since."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexeval.benchmark.supply.manifest import Ledger, files_of, from_json


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, Path]:
    for name, text in {"cache/set/a": "one", "cache/set/b/c": "two", "cache/alone": "three", "outside": "x"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return {"cache": tmp_path / "cache"}


def test_what_came_is_remembered(roots: dict[str, Path], tmp_path: Path) -> None:
    cache, place = roots["cache"], tmp_path / "checksums.json"
    Ledger(place, roots).record([cache / "set", cache / "alone", tmp_path / "outside"])
    again = Ledger(place, roots)
    assert again.knows(cache / "set") and again.knows(cache / "alone")
    assert not again.knows(tmp_path / "outside"), "which lies below no root"
    assert again.damage_of(cache / "set", reads=True) == ""
    (cache / "set/a").write_text("0ne")
    assert again.damage_of(cache / "set", reads=False) == "", "sizes alone do not show it"
    assert again.damage_of(cache / "set", reads=True) == f"{cache}/set/a has another checksum than when it came"
    again.record([cache / "set"])
    assert again.damage_of(cache / "set", reads=True), "what is remembered stays"
    again.record([cache / "set"], anew=True)
    assert again.damage_of(cache / "set", reads=True) == ""
    (cache / "set/a").write_text("one")
    again.record([cache / "set"], anew=True)
    (cache / "set/a").write_text("longer")
    assert again.damage_of(cache / "set", reads=False) == f"{cache}/set/a has 6 bytes, 3 when it came"
    (cache / "set/a").write_text("one")
    (cache / "set/b/c").unlink()
    assert again.damage_of(cache / "set", reads=False) == f"{cache}/set/b/c is gone, which came with it"
    assert again.damage_of(cache / "alone", reads=True) == ""


def test_new_files_beside_are_no_damage(roots: dict[str, Path], tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "checksums.json", roots)
    ledger.record([roots["cache"] / "set"])
    (roots["cache"] / "set/derived").write_text("made since")
    assert ledger.damage_of(roots["cache"] / "set", reads=True) == ""
    assert not ledger.knows(roots["cache"] / "set")


def test_two_write_to_one(roots: dict[str, Path], tmp_path: Path) -> None:
    one, other = (Ledger(tmp_path / "checksums.json", roots) for _ in range(2))
    one.record([roots["cache"] / "set"])
    other.record([roots["cache"] / "alone"])
    both = Ledger(tmp_path / "checksums.json", roots)
    assert both.knows(roots["cache"] / "set") and both.knows(roots["cache"] / "alone")


def test_one_that_cannot_be_read_knows_nothing(roots: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "checksums.json").write_text("{")
    assert not Ledger(tmp_path / "checksums.json", roots).knows(roots["cache"] / "set")


def test_locks_and_what_is_unfinished_are_no_files_of_data(roots: dict[str, Path]) -> None:
    folder = roots["cache"] / "set"
    for name in ("a.lock", ".b.flexeval-unfinished.x/came", "c.incomplete"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    assert files_of(folder) == [folder / "a", folder / "b/c"]


@pytest.mark.parametrize("manifest", [None, [], {}, {"version": 1}, {"version": 1, "files": [{}]}, {"version": 2}, 1])
def test_other_json(manifest: object) -> None:
    with pytest.raises(ValueError, match=r"version|cannot be read"):
        from_json(manifest)
