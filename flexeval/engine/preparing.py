"""Writing all layers of a model as they rest, once. Knows layouts and files; not what they are kept for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from flexeval.engine.checkpoint import Checkpoint
from flexeval.engine.memory.chunks import bytes_of
from flexeval.engine.memory.packing import Packer
from flexeval.engine.memory.page_lock import page_aligned
from flexeval.engine.memory.slab import SlabLayout
from flexeval.engine.packed import save_rest
from flexeval.prepared import REST, FileFacts, facts_of, layer_file


def write_model(
    directory: Path,
    checkpoint: Checkpoint,
    layouts: Sequence[SlabLayout],
    *,
    layers_name: str,
    device: torch.device,
    on_layer: Callable[[int], None],
) -> dict[str, FileFacts]:
    """Write each layer's slab, and embedding, norms and head, into a directory that nobody reads yet.

    Args:
        directory: Where to.
        checkpoint: Where weights come from.
        layouts: Of every layer.
        layers_name: What the layers are called in the model.
        device: Where matrices are coded.
        on_layer: Told, for each layer that is written, how many were before it.

    Returns:
        What was written, by name.

    Raises:
        ModelError: The checkpoint cannot be read, or a matrix not be coded.
    """
    written: dict[str, FileFacts] = {}
    room = page_aligned(max(layout.num_bytes for layout in layouts))
    with Packer(checkpoint, layouts, range(len(layouts)), layers_name=layers_name, device=device) as packer:
        for layer, layout in enumerate(layouts):
            slab = room[: layout.num_bytes].zero_()  # gaps are equal, too, wherever it is prepared
            packer.fill(layer, slab)
            (directory / layer_file(layer)).write_bytes(bytes_of(slab))
            digest = hashlib.sha256(bytes_of(slab)).hexdigest()
            written[layer_file(layer)] = FileFacts(num_bytes=layout.num_bytes, sha256=digest)
            on_layer(layer)
    save_rest(checkpoint.rest(), directory / REST)
    return written | {REST: facts_of(directory / REST)}
