"""Which calls of a model are one launch instead of several. Knows devices; no operation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flexeval.engine.kernels import has_triton


class Fusion:
    """Of one model: on a GPU, operations that follow each other run as one; elsewhere everything stays as it is."""

    def __init__(self) -> None:
        self._is_counting = False

    def applies(self, x: Tensor) -> bool:
        """Whether what is computed from `x` is one launch; on `meta`, whether it counts as one."""
        return has_triton(x.device) or (self._is_counting and x.is_meta)

    @contextmanager
    def counting(self, device: torch.device) -> Iterator[None]:
        """Meanwhile calls without memory write as many numbers as on `device`."""
        self._is_counting = device.type == "cuda"
        try:
            yield
        finally:
            self._is_counting = False
