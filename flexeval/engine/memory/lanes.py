"""The engine's lanes by name, and which of them go first on the link they share. Knows neither threads nor streams."""

from __future__ import annotations

import torch

from flexeval.engine.memory.lane import InlineLane, Lane, ThreadLane

LANES = ("weights", "disk", "kv_in", "kv_out", "hidden", "host_attention")
FIRST = ("kv_in", "hidden")
"""What the row at hand or the next one waits for; weights are for the next layer."""


def make_lanes(device: torch.device, *, overlap: bool) -> dict[str, Lane]:
    """Every lane, at work beside the caller and each other, or without `overlap` in the caller's turn."""
    if not overlap:
        return {name: InlineLane() for name in LANES}
    lanes = {name: ThreadLane(name, device) for name in LANES if name != "weights"}
    return {"weights": ThreadLane("weights", device, goes_behind=[lanes[name] for name in FIRST]), **lanes}
