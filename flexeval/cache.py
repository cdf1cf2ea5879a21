"""Folders that are made once and kept: whole or not at all, by one process at a time. Knows not what is in them."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from flexeval.errors import ConfigError
from flexeval.shelf import HeldFolder, discard


def cache_root() -> Path:
    """`$FLEXEVAL_CACHE`, or `flexeval` in the user's cache folder (`$XDG_CACHE_HOME`, `~/.cache`).

    Raises `ConfigError` where that lies in the home of nobody known.
    """
    if chosen := os.environ.get("FLEXEVAL_CACHE"):
        return _at_home(chosen)
    return _at_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "flexeval"


def _at_home(path: str) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except RuntimeError as error:
        mend = "Name a folder in FLEXEVAL_CACHE"
        raise ConfigError("there is no such home directory for the cache", where=path, mend=mend) from error


def cached_directory(kind: str, name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder `kind/name` of the cache, made by `build` if it is not there.

    Args:
        kind: What sort of thing it is: `assets`, `models`.
        name: Must change whenever the content would: put a hash or a version in it.
        build: Fills an empty folder. If it fails, nothing is left behind.

    Raises:
        ConfigError: The cache cannot be written.
    """
    directory = cache_root() / kind / name
    if directory.is_dir():
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.with_name(f".{name}.lock")):
            if not directory.is_dir():
                build_whole(directory, build)
    except OSError as error:
        raise ConfigError(
            f"cannot write the cache: {error.strerror or error}",
            where=str(directory),
            mend="Make room there, or name another folder in FLEXEVAL_CACHE",
        ) from error
    return directory


def build_whole(directory: Path, build: Callable[[Path], None]) -> None:
    """Make a folder that is not there, or empty: all that `build` fills it with is on the disk before it has its name.

    What a killed process has left of an earlier try goes. Raises `OSError`, and what `build` raises.
    """
    with unfinished_beside(directory) as unfinished:
        build(unfinished)
        settle(unfinished, directory)


@contextmanager
def unfinished_beside(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside a path, for what is to come there; it goes when the block ends.

    What a killed process has left of an earlier try goes at once. Raises `OSError`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.flexeval-unfinished."
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*"):
        discard(leftover)
    unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
    hold = HeldFolder(unfinished)
    try:
        yield unfinished
    finally:
        hold.let_go()
        shutil.rmtree(unfinished, ignore_errors=True)


def settle(source: Path, target: Path) -> None:
    """Give a file or folder its name, once all of it is on the disk and others may read it. Raises `OSError`."""
    for path in (*source.rglob("*"), source):  # made private by mkdtemp and safetensors; caches are shared
        path.chmod(0o755 if path.is_dir() else 0o644)
        _sync(path)
    source.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
