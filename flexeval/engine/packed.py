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

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexeval.directio import CHUNK_BYTES
from flexeval.engine.memory.chunks import bytes_of
from flexeval.engine.memory.tier import page_aligned
from flexeval.errors import ModelError
from flexeval.prepared import REST, FileFacts, Manifest, check_content, check_digest, layer_file

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

    def __init__(self, directory: Path, manifest: Manifest):
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
            with safe_open(path, framework="pt") as file:
                names: list[str] = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
                tied = json.loads(file.metadata()[_TIED])
        except (SafetensorError, OSError) as error:
            raise ModelError(f"weights cannot be read: {error}", where=str(path), mend="Check the disk") from error
        return tensors | {name: tensors[first] for name, first in tied.items()}


def save_rest(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write what `PackedCheckpoint.rest` reads; tensors that share memory once."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    own, tied = {}, {}
    for name, tensor in tensors.items():
        seen = first.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
        if seen == name:
            own[name] = tensor.detach().contiguous()
        else:
            tied[name] = seen
    save_file(own, path, metadata={_TIED: json.dumps(tied)})


def _read(file: int, buffer: memoryview) -> None:
    """Fill a buffer with what comes next."""
    while buffer:
        if (num_read := os.readv(file, [buffer])) == 0:
            raise OSError(None, "the file ends too soon")
        buffer = buffer[num_read:]
