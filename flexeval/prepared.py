"""What a prepared model's directory says of itself, and whether it is all there. Knows files; no layer, no tensor.

The manifest is written last, and the directory takes its name when all of it is on the disk. It names every file with
its length, which is looked at whenever the model is named, and its SHA-256, which is looked at when the file is read.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexeval import typed
from flexeval.errors import ModelError
from flexeval.files import is_plain_name, read_json, write_json

CACHE = "prepared"
"""The kind of cached directory that prepared models are."""
MANIFEST = "prepared.json"
REST = "rest.safetensors"
"""Embedding, norms and head."""
_NAME = re.compile(r"\w[\w.-]{0,200}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DTYPES = ("float32", "bfloat16", "float16")
FORMAT = 1
"""Raised when manifests or files come to mean something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """What a file must be."""

    num_bytes: int
    """Its length."""
    sha256: str
    """Of all of it, in hex."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What the bytes of packed layers depend on."""

    weights: str
    """Identifies the original's weights, as `Checkpoint.identity` does."""
    layouts: str
    """Identifies how layers are laid out, and in which types."""
    codec: str | None
    """The name of the codec; None where numbers rest as they are."""

    @property
    def name(self) -> str:
        """A short name for it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A prepared model."""

    model: str
    """The REF it was made of."""
    name: str
    """As `ModelSource.name`."""
    note: str
    """As `ModelSource.note`."""
    is_dummy: bool
    """As `ModelSource.is_dummy`."""
    setting: str
    """How weights are compressed: `w4-g128`."""
    dtype: str
    """The type that layers compute with: `bfloat16`."""
    content: Content
    """What its layers are."""
    files: dict[str, FileFacts]
    """By name, everything else in the directory."""

    def save(self, directory: Path) -> None:
        """Write it."""
        write_json(directory / MANIFEST, {"format": FORMAT} | asdict(self))


def layer_file(layer: int) -> str:
    """The name of a layer's file."""
    return f"layer-{layer:04d}.bin"


def facts_of(path: Path) -> FileFacts:
    """Read a file for what it is."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FileFacts(num_bytes=path.stat().st_size, sha256=sha256)


def is_prepared(directory: Path) -> bool:
    """Whether it is a prepared model's directory, whole or not."""
    return (directory / MANIFEST).is_file()


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest and check that all files are there in full length. Raises `ModelError`."""
    path = directory / MANIFEST
    try:
        data: Any = read_json(path)
        if not isinstance(data, dict) or "format" not in data:
            raise ValueError(f"it holds {typed.show(data)}, not an object that names its format")
        found = data.pop("format")
        if found != FORMAT:
            raise ModelError(
                f"prepared in format {typed.show(found)}, this flexeval reads format {FORMAT}",
                where=str(path),
                mend="Prepare the model again with flexeval prepare-model",
            )
        manifest = _checked(typed.read(Manifest, data))
    except (ValueError, OSError) as error:
        raise ModelError(f"not a manifest: {error}", where=str(path), mend=_mend(directory)) from error
    for name, facts in manifest.files.items():
        _check_length(directory / name, facts)
    return manifest


def _checked(manifest: Manifest) -> Manifest:
    """The manifest, unless it names what is no name. Raises `ValueError`."""
    if not _NAME.fullmatch(manifest.name):  # folders are called so
        raise ValueError(f"name is {typed.show(manifest.name)}")
    if manifest.dtype not in _DTYPES:
        raise ValueError(f"dtype is {typed.show(manifest.dtype)}, which is none of {', '.join(_DTYPES)}")
    for name, facts in manifest.files.items():
        if not is_plain_name(name) or name == MANIFEST:
            raise ValueError(f"it names {typed.show(name)}, which is no file of its own")
        if not _SHA256.fullmatch(facts.sha256):
            raise ValueError(f"the SHA-256 of {name} is {typed.show(facts.sha256)}")
    return manifest


def check_content(path: Path, facts: FileFacts) -> None:
    """Read a file and compare. Raises `ModelError`."""
    _check_length(path, facts)
    check_digest(path, facts, facts_of(path).sha256)


def check_digest(path: Path, facts: FileFacts, sha256: str) -> None:
    """Raise `ModelError` for a file that has been read and is another."""
    if sha256 != facts.sha256:
        raise ModelError(
            f"{_what(path)} is damaged: its SHA-256 begins with {sha256[:12]}, the manifest says {facts.sha256[:12]}",
            where=str(path),
            mend=_mend(path.parent),
        )


def _check_length(path: Path, facts: FileFacts) -> None:
    if not path.is_file():
        raise ModelError(f"{_what(path)} is missing", where=str(path), mend=_mend(path.parent))
    if (num_bytes := path.stat().st_size) != facts.num_bytes:
        raise ModelError(
            f"{_what(path)} is {num_bytes} bytes long, the manifest says {facts.num_bytes}",
            where=str(path),
            mend=_mend(path.parent),
        )


def _what(path: Path) -> str:
    """A file in words: `layer 3 (layer-0003.bin)`."""
    kind, _, number = path.stem.partition("-")
    return f"layer {int(number)} ({path.name})" if kind == "layer" and number.isdigit() else path.name


def _mend(directory: Path) -> str:
    return f"Copy it again from where it is whole, or delete {directory} and prepare the model again"
