"""A Triton kernel that reads page-locked host memory itself. Needs Triton: import it only where a CUDA device computes.

A copy is done by an engine that takes copies in the order in which they were enqueued, by whatever stream: a few
kilobytes that somebody waits for stand behind gigabytes that nobody needs yet. A kernel's reads go between them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Numbers that a program reads."""


def fetch(host: Tensor, device: torch.device) -> Tensor:
    """A copy of `host` (page-locked, contiguous) on `device`; it must stay as it is until the device has come by."""
    assert host.is_pinned() and host.is_contiguous()
    out = torch.empty_like(host, device=device, pin_memory=False)
    _fetch_kernel[(triton.cdiv(host.numel(), BLOCK),)](host, out, host.numel(), BLOCK=BLOCK)
    return out


@triton.jit
def _fetch_kernel(host, out, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, tl.load(host + place, mask=place < size), mask=place < size)
