"""What our GPU kernels need to know of a device. Knows no kernel."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch


@cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton compiles for this device; torch's CUDA builds bring it."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; asked at every launch."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
