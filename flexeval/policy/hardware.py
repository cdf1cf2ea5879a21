"""The machine as the cost model sees it: capacities and rates. Knows no model, no workload and no policy.

How much memory of the host is free is `memory.py`'s question; how fast anything is `rates/`'s.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from flexeval.config import Limits
from flexeval.policy import profile
from flexeval.policy.memory import free_host_bytes
from flexeval.policy.policy import Tier
from flexeval.policy.rates.disk import no_folder
from flexeval.policy.rates.machine import measure
from flexeval.shelf import prepared_shelf

GPU_USABLE_SHARE = 31 / 32
"""The rest is left to fragmentation and to the workspaces of CUDA libraries."""
HOST_USABLE_SHARE = 0.9
"""The rest is left to Python itself and to the page cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Capacities and rates. The compute device is the GPU, or the CPU where `device` says so."""

    device: Literal["cuda", "cpu"]
    """What multiplies."""
    gpu_bytes: int
    """Usable GPU memory; 0 where the CPU computes."""
    cpu_bytes: int
    """Usable host memory."""
    disk_bytes: int
    """Usable room on disk; 0 keeps the engine off it."""
    to_gpu_bytes_per_s: float
    """Pinned copies from host to GPU; 0 where the CPU computes."""
    from_gpu_bytes_per_s: float
    """Pinned copies from GPU to host; 0 where the CPU computes."""
    disk_read_bytes_per_s: float
    """Reads from disk to host; 0 without a disk."""
    disk_write_bytes_per_s: float
    """Writes from host to disk; 0 without a disk."""
    flops_per_s: float
    """A large matrix product on the compute device, in the layer's number format; on a GPU, one of many in a row."""
    single_product_bytes_per_s: float
    """Matrices multiplied by one token, which is read faster than it is multiplied."""
    few_product_bytes_per_s: float
    """The same by few tokens."""
    product_s: float
    """Seconds that any product takes beside reading its matrix; 0 on a GPU, where a launch is counted for it."""
    attention_flops_per_s: float
    """Causal attention within a prompt on the compute device; on a GPU, pairs that it hides are counted as well."""
    attention_part_s: float
    """Seconds that a head takes with each token beside its pairs, for each part of a context; 0 on a GPU."""
    single_attention_flops_per_s: float
    """Attention to keys that are read for one token alone; on a GPU, where reading is counted for it, as of prompts."""
    elementwise_per_s: float
    """Numbers that a layer's operations between its products make: norms, rotary embedding, activation, residuals."""
    softmax_per_s: float
    """Logits that become log-probabilities."""
    ranking_per_s: float
    """Log-probabilities that are searched for the highest."""
    memory_bytes_per_s: float
    """Memory bandwidth of the compute device, reads and writes together."""
    launch_s: float
    """Seconds to start one small operation on the compute device."""
    host_attention_bytes_per_s: float
    """Keys and values that a CPU attends to beside a busy link; 0 where none does."""
    attended_link_share: float = 1.0
    """Of the copies to the GPU that the link makes at `to_gpu_bytes_per_s`, those that it makes while a CPU attends."""
    cold_speedup: float = 1.0
    """By how much a GPU multiplies faster than that where it rests now and then, and keeps below its limit of power."""
    unpacked_per_s: float = 0.0
    """Numbers of packed matrices that a CPU unpacks; 0 where the memory's bandwidth is all that matters."""

    @property
    def home(self) -> Tier:
        """The tier that the compute device works in: data resting there need not move."""
        return Tier.GPU if self.device == "cuda" else Tier.CPU

    @property
    def cold_flops_per_s(self) -> float:
        """A large matrix product on a compute device that keeps below its limit of power."""
        return self.cold_speedup * self.flops_per_s

    def capacity_bytes(self, tier: Tier) -> int:
        """Usable bytes of a tier."""
        return {Tier.GPU: self.gpu_bytes, Tier.CPU: self.cpu_bytes, Tier.DISK: self.disk_bytes}[tier]


_MEASURED = {field.name for field in fields(Hardware)} - {
    "device",
    "gpu_bytes",
    "cpu_bytes",
    "disk_bytes",
    "host_attention_bytes_per_s",
    "attended_link_share",
    "unpacked_per_s",
}
"""Rates that a profile must have, and no others."""


def detect(device: Literal["cuda", "cpu"], limits: Limits, dtype: torch.dtype) -> Hardware:
    """Measure this machine within `limits`, but for attention on the CPU beside a GPU. Raises `ConfigError`.

    Rates are those of the machine's profile, where there is one; else they are measured, once a process, so that all
    settings are planned for one machine.

    Args:
        device: What multiplies.
        limits: What the user gives.
        dtype: The number format of the layers.
    """
    rates = _rates(device, dtype, limits.disk_dir)
    gpu_bytes = _free_gpu_bytes() if device == "cuda" else 0
    return Hardware(
        device=device,
        gpu_bytes=int(GPU_USABLE_SHARE * _at_most(limits.gpu_bytes, gpu_bytes)),
        cpu_bytes=_at_most(limits.cpu_bytes, int(HOST_USABLE_SHARE * free_host_bytes())),
        disk_bytes=_at_most(limits.disk_bytes, _free_disk_bytes(limits.disk_dir)) if limits.disk_dir else 0,
        host_attention_bytes_per_s=0.0,
        **rates,
    )


@cache
def _rates(device: Literal["cuda", "cpu"], dtype: torch.dtype, disk_dir: Path | None) -> dict[str, float]:
    known = profile.load(machine_of(device, dtype, disk_dir))
    if known is None or known.rates.keys() != _MEASURED:
        return measure(device, dtype, disk_dir)
    return known.rates


def machine_of(device: str, dtype: torch.dtype, disk_dir: Path | None) -> dict[str, str]:
    """What a profile of this machine is of."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return profile.identity(device, str(dtype).removeprefix("torch."), disk_dir, gpu)


def _at_most(limit: int | None, num_bytes: int) -> int:
    return num_bytes if limit is None else min(limit, num_bytes)


def _free_gpu_bytes() -> int:
    """What the driver would still give, plus what torch has taken but not used."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _free_disk_bytes(directory: Path) -> int:
    """Room, prepared weights included: they give way or are what is wanted. Raises `ConfigError`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(directory).free + prepared_shelf(directory).num_bytes()
    except OSError as error:
        raise no_folder(directory, error) from error
