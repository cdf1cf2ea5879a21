"""Folders on the shelf stay until there is no room, and never go while somebody uses them, dead or alive."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flexeval.shelf import HeldFolder, Shelf, discard

HOLD_AND_DIE = """
import os, sys
from pathlib import Path
from flexeval.shelf import HeldFolder
held = HeldFolder(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
os._exit(9)
"""


def put(shelf: Shelf, name: str, num_bytes: int, *, age_s: int) -> Path:
    folder = shelf.take(name)
    (folder.path / "file").write_bytes(os.urandom(num_bytes))
    folder.let_go()
    os.utime(folder.path, (1e9 - age_s, 1e9 - age_s))
    return folder.path


def test_the_folder_used_least_lately_goes_first(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    assert shelf.num_bytes() == 0 and not shelf.discard_oldest()
    put(shelf, "a", 1 << 16, age_s=10)
    put(shelf, "b", 1 << 17, age_s=30)
    put(shelf, "c", 1 << 16, age_s=20)
    assert shelf.num_bytes() >= 1 << 18
    shelf.take("b").let_go()  # used again
    for gone in ("c", "a", "b"):
        assert (shelf.directory / gone).is_dir()
        assert shelf.discard_oldest()
        assert not (shelf.directory / gone).exists()
    assert not shelf.discard_oldest()


def test_a_folder_in_use_is_passed_over(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    first, second = put(shelf, "first", 10, age_s=2), put(shelf, "second", 10, age_s=1)
    held, again = shelf.take("first"), shelf.take("first")
    os.utime(first, (1e8, 1e8))
    assert shelf.discard_oldest() and not second.exists()
    held.let_go()
    assert not shelf.discard_oldest() and (first / "file").is_file(), "two users"
    again.let_go()
    again.let_go()
    assert shelf.discard_oldest() and not first.exists()


def test_a_folder_is_held_by_a_living_process_only(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_AND_DIE, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    assert not discard(folder) and folder.is_dir()
    process.communicate()
    assert process.returncode == 9
    assert discard(folder) and not folder.exists()


def test_a_folder_can_be_taken_again_after_it_was_discarded(tmp_path: Path) -> None:
    HeldFolder(tmp_path / "x").let_go()
    assert discard(tmp_path / "x") and not discard(tmp_path / "x")
    held = HeldFolder(tmp_path / "x")
    assert (tmp_path / "x").is_dir() and not discard(tmp_path / "x")
    held.let_go()
