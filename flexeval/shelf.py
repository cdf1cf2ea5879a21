"""Folders kept between runs as long as there is room, and folders that a killed run left behind. Knows files and locks.

Whoever uses a folder holds a shared lock on it (`flock`), which ends with the process, however that ends. So a folder
that can be locked alone is in nobody's use.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path


class HeldFolder:
    """A folder in use: nobody discards it until it is let go."""

    def __init__(self, path: Path):
        """Make the folder if it is not there, and hold it. Raises `OSError`."""
        self.path = path
        self._file: int | None = None
        while self._file is None:
            path.mkdir(parents=True, exist_ok=True)
            try:
                file = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue
            fcntl.flock(file, fcntl.LOCK_SH)
            if _is_at(path, file):
                self._file = file
            else:  # discarded between the two calls
                os.close(file)
        os.utime(path)

    def let_go(self) -> None:
        """Leave the folder where it is; it may be discarded from now on."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def discard(path: Path) -> bool:
    """Delete a folder unless somebody holds it; whether it is gone."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(path, file):
            shutil.rmtree(path)
        return True
    except OSError:
        return False
    finally:
        os.close(file)


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


class Shelf:
    """Named folders in one directory; those used least lately go when room is needed."""

    def __init__(self, directory: Path):
        self.directory = directory

    def num_bytes(self) -> int:
        """Room that all folders take on the disk."""
        num_blocks = 0
        for path in self.directory.rglob("*"):
            with suppress(FileNotFoundError):  # another run discards what it likes
                num_blocks += path.stat().st_blocks
        return 512 * num_blocks

    def has(self, name: str) -> bool:
        """Whether a folder of that name is here now."""
        return (self.directory / name).is_dir()

    def take(self, name: str) -> HeldFolder:
        """A folder, new or as an earlier run left it. Raises `OSError`."""
        return HeldFolder(self.directory / name)

    def discard_oldest(self) -> bool:
        """Delete the folder that was taken the longest ago and is in nobody's use; whether there was one."""
        if not self.directory.is_dir():
            return False
        folders = sorted(self.directory.iterdir(), key=lambda path: path.stat().st_mtime)
        return any(discard(folder) for folder in folders)


def prepared_shelf(directory: Path) -> Shelf:
    """The shelf of prepared weights in the folder for offloaded data."""
    return Shelf(directory / "prepared")
