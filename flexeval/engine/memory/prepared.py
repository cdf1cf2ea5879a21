"""Packed layers kept on disk from one run to the next. Knows slabs and files; not what the layers compute.

A layer's file is its slab, to the byte, so it is read where it lies as if it had just been written. It is written under
another name and takes its own when it is whole and its SHA-256 stands beside it; a run that finds it reads it once to
compare. The folder's name says what the bytes depend on: the weights, the codec and the layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from flexeval.directio import QUEUE_DEPTH, round_up
from flexeval.engine.memory.disk import DiskExtent, DiskTier
from flexeval.engine.memory.slab import SlabLayout
from flexeval.errors import ModelError
from flexeval.files import write_json, write_text
from flexeval.prepared import Content, FileFacts, check_content, layer_file
from flexeval.shelf import HeldFolder

_MANIFEST = "manifest.json"
_DIGEST = ".sha256"


class PreparedLayers:
    """The layers of one model under one codec."""

    def __init__(self, disk: DiskTier, weights: str, layouts: Sequence[SlabLayout]):
        """Look for what earlier runs kept. `weights` identifies them, as `Checkpoint.identity` does."""
        self._disk = disk
        self._layouts = layouts
        self._content = content_of(weights, layouts)
        self._folder: HeldFolder | None = None
        if disk.shelf.has(self._content.name):
            self._folder = disk.shelf.take(self._content.name)

    def find(self, layers: Iterable[int]) -> dict[int, DiskExtent | None]:
        """The slabs that an earlier run kept whole. Raises `ModelError` for one that is not what it was."""
        wanted = list(layers)
        with ThreadPoolExecutor(QUEUE_DEPTH) as pool:
            is_whole = dict(zip(wanted, pool.map(self._is_whole, wanted), strict=True))
        return {layer: self._find(layer) if is_whole[layer] else None for layer in wanted}

    def _find(self, layer: int) -> DiskExtent | None:
        assert self._folder is not None
        return self._disk.find(self._path(self._folder, layer), self._layouts[layer].num_bytes)

    def _is_whole(self, layer: int) -> bool:
        """Whether a layer's file is there in full length; its bytes are compared then."""
        if self._folder is None:
            return False
        path, num_bytes = self._path(self._folder, layer), round_up(self._layouts[layer].num_bytes)
        try:
            if path.stat().st_size != num_bytes:
                return False
            sha256 = path.with_suffix(_DIGEST).read_text(encoding="ascii")
            check_content(path, FileFacts(num_bytes=num_bytes, sha256=sha256))
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            what = f"layer {layer} cannot be read: {error}"
            raise ModelError(what, where=str(path), mend=f"Check the disk, or delete {path.parent}") from error
        return True

    def keep(self, layer: int, extent: DiskExtent, sha256: str) -> None:
        """Let a layer's slab, written to `extent`, serve later runs as well; `sha256` is of all of its file."""
        if self._folder is None:
            self._folder = self._disk.shelf.take(self._content.name)
            layer_bytes = [layout.num_bytes for layout in self._layouts]
            write_json(self._folder.path / _MANIFEST, asdict(self._content) | {"layer_bytes": layer_bytes})
        path = self._path(self._folder, layer)
        write_text(path.with_suffix(_DIGEST), sha256)
        extent.keep_as(path)

    def close(self) -> None:
        """Leave the folder to whoever needs room."""
        if self._folder is not None:
            self._folder.let_go()

    @staticmethod
    def _path(folder: HeldFolder, layer: int) -> Path:
        return folder.path / layer_file(layer)


def content_of(weights: str, layouts: Sequence[SlabLayout]) -> Content:
    """What layers of these weights are, laid out so."""
    return Content(
        weights=weights,
        layouts=hashlib.sha256(" ".join(layout.fingerprint for layout in layouts).encode()).hexdigest(),
        codec=layouts[0].codec.name if layouts[0].codec else None,
    )
