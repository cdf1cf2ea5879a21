"""What is said where memory runs out in the middle of the work. Knows how allocators say so; not what asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flexeval.errors import CapacityError

_SIGNS = ("DefaultCPUAllocator: ", "out of memory", "Cannot allocate memory")
"""In what torch's allocators say: on a host they raise a plain `RuntimeError`."""


@contextmanager
def memory_named(device: str) -> Iterator[None]:
    """Raise `CapacityError` for memory that runs out during the block, which computes on `device` (`cpu`, `cuda`)."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_gpu = isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error)
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in _SIGNS):
            raise
        place, option = ("gpu", "--gpu-memory") if is_gpu and device == "cuda" else ("cpu", "--cpu-memory")
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise CapacityError(
            f"{place} memory ran out: {first}",
            mend=f"Plan with less by {option} SIZE, or end what else fills it; then run again to go on",
        ) from error
