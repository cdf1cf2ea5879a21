"""Packed layers kept on disk from one run to the next. Knows slabs and files; not what the layers compute.

A layer's file is its slab, to the byte, so it is read where it lies as if it had just been written. It is written under
another name and takes its own when it is whole. The folder's name says what the bytes depend on: the weights, the codec
and the layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from flexeval.engine.memory.disk import DiskExtent, DiskTier
from flexeval.engine.memory.slab import SlabLayout
from flexeval.files import write_json
from flexeval.prepared import Content, layer_file
from flexeval.shelf import HeldFolder

_MANIFEST = "manifest.json"


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

    def find(self, layer: int) -> DiskExtent | None:
        """The layer's slab, if an earlier run kept it whole."""
        if self._folder is None:
            return None
        return self._disk.find(self._path(self._folder, layer), self._layouts[layer].num_bytes)

    def keep(self, layer: int, extent: DiskExtent) -> None:
        """Let a layer's slab, written to `extent`, serve later runs as well."""
        if self._folder is None:
            self._folder = self._disk.shelf.take(self._content.name)
            layer_bytes = [layout.num_bytes for layout in self._layouts]
            write_json(self._folder.path / _MANIFEST, asdict(self._content) | {"layer_bytes": layer_bytes})
        extent.keep_as(self._path(self._folder, layer))

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
