"""Files that are there whole or not at all. Knows nothing of what is in them."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_LONGEST_NAME = 200
"""Bytes; file systems have room for 255, and names get endings."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; it takes `path`'s place when the block succeeds, and vanishes if it fails.

    It is there, whole, once the block is left: also where the power goes off then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        _discard(leftover)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as held:  # nor through a link that somebody has put there
            with suppress(OSError):  # a file system without locks
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename is None:  # a write knows none
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _discard(temporary: Path) -> None:
    """Delete what a killed process has left; a living one holds a lock on it."""
    with suppress(OSError):
        file = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would have us wait
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink(missing_ok=True)
        finally:
            os.close(file)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder outlive a loss of power, where its file system can promise that."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(file)


def is_plain_name(name: str) -> bool:
    """Whether a name that others chose is a file's in a directory, not a path out of it or into another."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0") and len(os.fsencode(name)) <= _LONGEST_NAME


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. Raises `OSError` and `ValueError`."""
    if path.is_fifo() or path.is_char_device():
        raise OSError(errno.EINVAL, "it is no file, and may never end", str(path))
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text stands for. Raises `ValueError`."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
