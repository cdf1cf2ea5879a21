"""Bringing every layer's slab to where it rests. Knows checkpoints, layouts and tiers; not how slabs are used.

Beside what rests there, host memory never holds more than about two layers, and two slabs on their way to disk. What
goes to disk comes first, while the memory for the others is still free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from flexeval.engine.checkpoint import Checkpoint
from flexeval.engine.memory.disk import DiskExtent
from flexeval.engine.memory.packing import Packer
from flexeval.engine.memory.prepared import PreparedLayers
from flexeval.engine.memory.slab import SlabLayout
from flexeval.engine.memory.storing import Storing
from flexeval.engine.memory.tier import Extent, Tier
from flexeval.policy.policy import Tier as TierName


def load_layers(
    checkpoint: Checkpoint,
    layouts: Sequence[SlabLayout],
    tiers: Sequence[Tier],
    *,
    layers_name: str,
    prepared: PreparedLayers | None,
    device: torch.device,
    on_layer: Callable[[int], None],
) -> list[Extent]:
    """Put layer l's slab on `tiers[l]`, from an earlier run's files where there are any.

    Args:
        checkpoint: Where weights come from.
        layouts: Of every layer.
        tiers: Of every layer.
        layers_name: What the layers are called in the model.
        prepared: What earlier runs kept; takes what this one puts on disk. None keeps nothing.
        device: Where matrices are coded.
        on_layer: Told, for each layer that is in its place, how many were before it.

    Raises:
        CapacityError: A tier is full. Nothing stays allocated.
        ModelError: The checkpoint cannot be read, a matrix not be coded, or what was kept is damaged.
    """
    order = sorted(range(len(layouts)), key=lambda layer: tiers[layer].name is not TierName.DISK)
    found = prepared.find(order) if prepared else dict.fromkeys(order)
    missing = [layer for layer in order if found[layer] is None]
    extents: dict[int, Extent] = {}

    try:
        with (
            Packer(checkpoint, layouts, missing, layers_name=layers_name, device=device) as packer,
            Storing(prepared) as storing,
        ):
            for num_before, layer in enumerate(order):
                tier, ready = tiers[layer], found[layer]
                if ready is not None and tier is ready.tier:
                    extents[layer] = ready
                else:
                    extents[layer] = tier.allocate(layouts[layer].num_bytes)
                    _fill(layer, extents[layer], ready, packer, storing)
                found[layer] = None
                on_layer(num_before)
    except BaseException:
        for taken in {*extents.values(), *found.values()}:
            if taken is not None:
                taken.free()
        raise
    return [extents[layer] for layer in range(len(layouts))]


def _fill(layer: int, extent: Extent, ready: DiskExtent | None, packer: Packer, storing: Storing) -> None:
    """Put a slab into its place: as it is `ready` on disk, else packed."""
    memory = extent.memory()
    if ready is not None:
        assert memory is not None
        ready.read(memory)
        ready.free()
    elif memory is not None:
        packer.fill(layer, memory)
    else:
        assert isinstance(extent, DiskExtent)
        storing.store(layer, extent, partial(packer.fill, layer))
