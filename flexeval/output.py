"""The directory of a run: one run at a time, and not left behind if it came to nothing. Knows not what is in it."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from flexeval.errors import ConfigError
from flexeval.files import sync_folder

_HOLDER = ".holder"
"""File that says who holds a directory; it is the lock that counts, for a killed process leaves the file."""
_LONGEST_HOLDER = 200


@contextmanager
def output_directory(out: Path, *, kept: str, notes: Sequence[str] = ()) -> Iterator[None]:
    """Make the directory and hold it during the block.

    Args:
        out: The directory; its parents are made as well.
        kept: Pattern of the files worth keeping. If the block fails without any, what was made is taken away again.
        notes: Files that are worth nothing without those.

    Raises:
        ConfigError: It cannot be written to, or another run holds it; then it says which.
    """
    missing = [path for path in (out, *out.parents) if not path.exists()]
    with ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            for made in missing:
                sync_folder(made.parent)
            folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise _unusable(out, error.strerror) from error
        stack.callback(os.close, folder)
        if not os.access(out, os.W_OK | os.X_OK):
            raise _unusable(out, "Permission denied")
        _lock(folder, out)
        try:
            with _named(out / _HOLDER):
                yield
        except BaseException:
            if any(out.glob(kept)):
                raise
            for note in notes:
                (out / note).unlink(missing_ok=True)
            if missing:
                shutil.rmtree(out, ignore_errors=True)
                for parent in missing[1:]:
                    with suppress(OSError):  # not empty: somebody else's
                        parent.rmdir()
            raise


def _lock(folder: int, out: Path) -> None:
    """Lock the open directory until it is closed or the process ends, however it does. Raises `ConfigError`."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        what = f"another run writes here: {_holder(out)}"
        raise ConfigError(what, where=str(out), mend="Wait for it, or name another place with --out") from error
    except OSError:
        return  # a file system without locks


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say in a file who holds its directory, during the block."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        with suppress(OSError):  # the lock holds without it
            path.unlink(missing_ok=True)  # it may be a link to anything
            with path.open("x", encoding="utf-8") as file:
                file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
        yield
    finally:
        path.unlink(missing_ok=True)


def _holder(out: Path) -> str:
    with suppress(OSError, ValueError), (out / _HOLDER).open(encoding="utf-8") as file:
        return file.read(_LONGEST_HOLDER) or "it does not say which"
    return "it does not say which"


def _unusable(out: Path, why: str | None) -> ConfigError:
    return ConfigError(f"cannot write to the output directory: {why}", where=str(out), mend="Name another with --out")
