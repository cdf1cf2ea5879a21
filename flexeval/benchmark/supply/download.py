"""Files from the network, there whole or not at all. Knows addresses and archives; must not know what is in them.

HELM downloads to where a file belongs and unpacks it there; one that is cut off counts as whole ever after. Here all
of it happens in a folder beside, and the last step is a rename.
"""

from __future__ import annotations

import re
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request

from filelock import FileLock

from flexeval.benchmark.supply.archive import MAX_BYTES, decompress, unpack
from flexeval.cache import settle, unfinished_beside
from flexeval.errors import DataError

_CHUNK_BYTES = 2**20
_TIMEOUT_S = 60.0
_DRIVE = "drive.google.com"
_COMPRESSED = (".gz", ".zst")
_CAUSE = re.compile(r"\(Caused by (?P<cause>.+)\)$")  # as urllib3 says it


def download(url: str, target: Path, *, is_archive: bool = False) -> None:
    """Bring the file or folder that HELM would make of an address; what is there already stays.

    Args:
        url: Its address.
        target: Where it belongs. Of a `.gz` or `.zst`, the content comes here unless the target is called so, too.
        is_archive: Unpack it: `target` is the one thing in it, or a folder of all that is in it.

    Raises:
        DataError: It cannot be had, or is not what it should be; nothing is left behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # HELM's own
        if target.exists():
            return
        with unfinished_beside(target) as scratch:
            came = scratch / "came"
            try:
                _get(url, came)
                settle(_make(url, came, scratch, target, is_archive=is_archive), target)
            except DataError as error:  # which names a file in the scratch folder that nobody will find
                raise DataError(f"{url}: {error.what}", where=str(target), mend=error.mend) from error


def remote_size(url: str) -> int | None:
    """Ask for the size of what lies at an address, in bytes; None where there is no answer."""
    if urlsplit(url).hostname == _DRIVE:
        return None  # it answers with a page of its own
    try:
        with urllib.request.urlopen(Request(url, method="HEAD"), timeout=_TIMEOUT_S) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, HTTPException, TypeError, ValueError):
        return None


def _make(url: str, came: Path, scratch: Path, target: Path, *, is_archive: bool) -> Path:
    """Make of what came what HELM would: the same rules as its `ensure_file_downloaded`."""
    if is_archive:
        folder = scratch / "unpacked"
        folder.mkdir()
        unpack(came, folder)
        inside = list(folder.iterdir())
        if not inside:
            raise DataError("the archive is empty")
        return inside[0] if len(inside) == 1 else folder
    if any(url.endswith(suffix) and target.suffix != suffix for suffix in _COMPRESSED):
        decompress(came, scratch / "content")
        return scratch / "content"
    return came


def _get(url: str, to: Path) -> None:
    if urlsplit(url).hostname == _DRIVE:
        _get_from_drive(url, to)
        return
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer, to.open("wb") as file:
            if answer.headers.get_content_type() == "text/html" and not urlsplit(url).path.endswith((".html", ".htm")):
                raise DataError("a web page came in the place of the file", mend="Sign in to the network, or try later")
            num_bytes = 0
            while chunk := answer.read(_CHUNK_BYTES):
                num_bytes += len(chunk)
                if num_bytes > MAX_BYTES:
                    raise DataError(f"it is larger than {MAX_BYTES // 2**30} GiB")
                file.write(chunk)
            expected = answer.headers["Content-Length"]
    except (URLError, HTTPException, TimeoutError, ConnectionError, ValueError) as error:
        raise DataError(_words(error), mend="Try again, or carry it over with flexeval data export") from error
    if expected is not None and num_bytes != int(expected):
        raise DataError(f"cut off: {num_bytes} of {expected} bytes came", mend="Try again")


def _get_from_drive(url: str, to: Path) -> None:
    """Get a file of Google Drive, which asks a question before it gives a large one."""
    import gdown

    try:
        gdown.download(url, str(to), quiet=True)
    except Exception as error:  # its own kinds of errors, those of requests, and of what it parses
        raise DataError(_words(error), mend="Try again, or carry it over with flexeval data export") from error
    if not to.is_file():
        raise DataError("Google Drive gave no file", mend="Try again later")


def _words(error: Exception) -> str:
    """The first line of an error, or of the one inside that of a library."""
    if isinstance(error, URLError) and not isinstance(error, HTTPError):
        return str(error.reason)
    lines = str(error).strip().splitlines() or ["no answer"]
    inner = _CAUSE.search(lines[0])
    return inner["cause"] if inner else f"{type(error).__name__}: {lines[0]}"
