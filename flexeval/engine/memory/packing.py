"""Packing a checkpoint's layers into slabs, in a given order. Knows checkpoints and layouts; not where slabs rest.

While one layer is packed, the next one's tensors are read: host memory never holds those of more than about two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexeval.engine.checkpoint import Checkpoint
from flexeval.engine.memory.lane import ThreadLane, ahead
from flexeval.engine.memory.slab import SlabLayout
from flexeval.errors import ModelError


class Packer:
    """Fills slabs. Close it, or use it in a `with` block."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layouts: Sequence[SlabLayout],
        layers: Sequence[int],
        *,
        layers_name: str,
        device: torch.device,
    ):
        """Begin to read.

        Args:
            checkpoint: Where weights come from.
            layouts: Of every layer.
            layers: Which will be asked for, in that order.
            layers_name: What the layers are called in the model.
            device: Where matrices are coded.
        """
        self._layouts = layouts
        self._layers_name = layers_name
        self._device = device
        self._packed = {layer: ready for layer in layers if (ready := checkpoint.packed(layer)) is not None}
        self._lane = ThreadLane("loading", device)
        self._tensors = ahead(self._lane, checkpoint.layer, [layer for layer in layers if layer not in self._packed])

    def __enter__(self) -> Packer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fill(self, layer: int, slab: Tensor) -> None:
        """Fill the next layer's slab, uint8 `[num_bytes]` on any device.

        Raises:
            ModelError: The checkpoint cannot be read, or a matrix not be coded.
        """
        if layer in self._packed:
            return self._packed[layer].read(slab)
        tensors = next(self._tensors)
        try:
            self._layouts[layer].pack_into(tensors, slab, device=self._device)
        except ModelError as error:
            raise ModelError(error.what, where=f"{self._layers_name}.{layer}.{error.where}", mend=error.mend) from error

    def close(self) -> None:
        """End the reading."""
        self._lane.close()
