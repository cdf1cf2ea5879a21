"""Weights that were packed before, in a prepared model's directory. Knows its files; not where the weights will rest.

Whatever is read is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flexeval.directio import CHUNK_BYTES
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.memory.chunks import bytes_of
from flexeval.engine.memory.page_lock import page_aligned
from flexeval.engine.weight_file import FileTensor
from flexeval.errors import DiskError, ModelError
from flexeval.files import parse_json
from flexeval.prepared import REST, FileFacts, Manifest, check_content, check_digest, layer_file
from flexeval.safetensors_header import read_header

_AGAIN = "Prepare the model again with flexeval prepare-model"
_TIED = "tied"
"""Names of tensors that share another one's numbers, in the file's metadata."""


class PackedLayer:
    """A layer's slab in a file."""

    def __init__(self, path: Path, facts: FileFacts):
        self._path = path
        self._facts = facts

    def read(self, slab: Tensor) -> None:
        """Fill a slab, uint8 `[num_bytes]` on any device. Raises `ModelError` for a file that is not what it was."""
        assert slab.numel() == self._facts.num_bytes, (self._path, slab.numel(), self._facts.num_bytes)
        host = slab if slab.device.type == "cpu" else page_aligned(slab.numel())
        digest = hashlib.sha256()
        try:
            with self._path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as beside:
                for chunk in host.split(CHUNK_BYTES):
                    _read(file.fileno(), bytes_of(chunk))
                    beside.submit(digest.update, bytes_of(chunk))
        except OSError as error:
            what = f"weights cannot be read: {error.strerror}"
            raise ModelError(what, where=str(self._path), mend="Check the disk, then run again") from error
        check_digest(self._path, self._facts, digest.hexdigest())
        if host is not slab:
            slab.copy_(host)


class PackedCheckpoint:
    """A prepared model's weights."""

    def __init__(self, anatomy: Anatomy, directory: Path, manifest: Manifest):
        self._anatomy = anatomy
        self._directory = directory
        self._files = manifest.files
        self.identity: str | None = manifest.content.weights

    def packed(self, layer: int) -> PackedLayer:
        """A layer's slab."""
        name = layer_file(layer)
        return PackedLayer(self._directory / name, self._files[name])

    def layer(self, layer: int) -> dict[str, Tensor]:
        """Never asked for: all layers are packed."""
        raise AssertionError(layer)

    def rest(self) -> Mapping[str, Tensor]:
        """Embedding, norms and head. Raises `ModelError` for a file that is not what it was."""
        path = self._directory / REST
        check_content(path, self._files[REST])
        try:
            header = read_header(path)
            tensors = {name: FileTensor(path, place)[...] for name, place in header.tensors.items()}
            tied = _read_tied(header.metadata)
        except (OSError, ValueError) as error:
            raise ModelError(f"weights cannot be read: {error}", where=str(path), mend=_AGAIN) from error
        tensors |= {name: tensors[first] for name, first in tied.items() if first in tensors}
        wanted = self._anatomy.model.state_dict(keep_vars=True)
        for name in sorted(wanted.keys() | tensors.keys()):
            _check_fit(name, tensors.get(name), wanted.get(name), self._anatomy.dtype, path)
        return tensors


def _read_tied(metadata: Mapping[str, str]) -> dict[str, str]:
    tied = parse_json(metadata.get(_TIED, ""))
    if not isinstance(tied, dict) or not all(isinstance(first, str) for first in tied.values()):
        raise ValueError("the names of tied tensors are none")
    return tied


def _check_fit(name: str, tensor: Tensor | None, wanted: Tensor | None, dtype: torch.dtype, path: Path) -> None:
    if tensor is None or wanted is None:
        what = f"it holds no {name}" if tensor is None else f"it holds {name}, which the model does not have"
    elif tensor.shape != wanted.shape or tensor.dtype not in (wanted.dtype, dtype):
        what = f"{name} is {list(tensor.shape)} of {tensor.dtype}, the model has {list(wanted.shape)} of {wanted.dtype}"
    else:
        return
    raise ModelError(what, where=str(path), mend=_AGAIN)


def save_rest(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write what `PackedCheckpoint.rest` reads; tensors that share memory once. Raises `DiskError`."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    own, tied = {}, {}
    for name, tensor in tensors.items():
        seen = first.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
        if seen == name:
            own[name] = tensor.detach().contiguous()
        else:
            tied[name] = seen
    try:
        save_file(own, path, metadata={_TIED: json.dumps(tied)})
    except SafetensorError as error:  # which it makes of a disk's errors, too
        mend = "Make room there, or name another place"
        raise DiskError(f"weights cannot be written: {error}", where=str(path), mend=mend) from error


def _read(file: int, buffer: memoryview) -> None:
    """Fill a buffer with what comes next."""
    while buffer:
        if (num_read := os.readv(file, [buffer])) == 0:
            raise OSError(None, "the file ends too soon")
        buffer = buffer[num_read:]
