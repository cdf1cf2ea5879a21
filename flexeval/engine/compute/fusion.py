"""Which calls of a model are one pass instead of several. Knows devices; no operation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flexeval.engine.compute.host_kinds import KINDS
from flexeval.engine.compute.host_passes import has_passes
from flexeval.engine.kernels import has_triton


class Fusion:
    """Of one model: operations that follow each other run as one, where there is a kernel for them."""

    def __init__(self) -> None:
        self._counted: str | None = None  # the device for which calls without memory count

    def applies(self, x: Tensor) -> bool:
        """Whether what is computed from `x` is one pass; on `meta`, whether it counts as one."""
        return self.is_on_gpu(x) or (self._device_of(x) == "cpu" and x.dtype in KINDS and has_passes())

    def is_on_gpu(self, x: Tensor) -> bool:
        """Whether that is for Triton to do; on `meta`, whether it counts so."""
        return has_triton(x.device) or (x.is_meta and self._counted == "cuda")

    @contextmanager
    def counting(self, device: torch.device) -> Iterator[None]:
        """Meanwhile calls without memory write as many numbers as on `device`."""
        self._counted = device.type
        try:
            yield
        finally:
            self._counted = None

    def _device_of(self, x: Tensor) -> str | None:
        return self._counted if x.is_meta else x.device.type
