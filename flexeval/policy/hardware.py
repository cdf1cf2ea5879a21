"""The machine as the cost model sees it: capacities and rates, measured in about a second.

Knows how to ask and time this machine; the only module of this room that imports torch. Knows no model, no workload
and no policy. How much memory is free is `memory.py`'s question.
"""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

import torch

from flexeval.config import Limits
from flexeval.errors import ConfigError
from flexeval.policy.memory import free_host_bytes
from flexeval.policy.policy import Tier

GPU_USABLE_SHARE = 15 / 16
"""The rest is left to fragmentation and to the workspaces of CUDA libraries."""
HOST_USABLE_SHARE = 0.9
"""The rest is left to Python itself and to the page cache."""
PROBE_BYTES = 32 * 2**20
"""Bytes of a timed copy or file."""
MATMUL_SIZES = {"cpu": (256, 1024, 1024), "cuda": (4096, 4096, 4096)}
"""Tokens, inputs and outputs of the timed matrix product."""


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
    """A large matrix product on the compute device, in the layer's number format."""
    memory_bytes_per_s: float
    """Memory bandwidth of the compute device, reads and writes together."""
    launch_s: float
    """Seconds to start one small operation on the compute device."""

    @property
    def home(self) -> Tier:
        """The tier that the compute device works in: data resting there need not move."""
        return Tier.GPU if self.device == "cuda" else Tier.CPU

    def capacity_bytes(self, tier: Tier) -> int:
        """Usable bytes of a tier."""
        return {Tier.GPU: self.gpu_bytes, Tier.CPU: self.cpu_bytes, Tier.DISK: self.disk_bytes}[tier]


def detect(device: Literal["cuda", "cpu"], limits: Limits, dtype: torch.dtype) -> Hardware:
    """Measure this machine within `limits`; `dtype` is the number format of the layers. Raises `ConfigError`."""
    cpu_bytes = int(HOST_USABLE_SHARE * free_host_bytes())
    gpu_bytes = _free_gpu_bytes() if device == "cuda" else 0
    to_gpu, from_gpu = _link_rates() if device == "cuda" else (0.0, 0.0)
    disk_bytes, disk_read, disk_write = _probe_disk(limits.disk_dir) if limits.disk_dir else (0, 0.0, 0.0)
    return Hardware(
        device=device,
        gpu_bytes=int(GPU_USABLE_SHARE * _at_most(limits.gpu_bytes, gpu_bytes)),
        cpu_bytes=_at_most(limits.cpu_bytes, cpu_bytes),
        disk_bytes=_at_most(limits.disk_bytes, disk_bytes),
        to_gpu_bytes_per_s=to_gpu,
        from_gpu_bytes_per_s=from_gpu,
        disk_read_bytes_per_s=disk_read,
        disk_write_bytes_per_s=disk_write,
        flops_per_s=_matmul_rate(device, dtype),
        memory_bytes_per_s=_memory_rate(device),
        launch_s=_launch_seconds(device),
    )


def _at_most(limit: int | None, num_bytes: int) -> int:
    return num_bytes if limit is None else min(limit, num_bytes)


def _free_gpu_bytes() -> int:
    """What the driver would still give, plus what torch has taken but not used."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _best_seconds(run: Callable[[], object], device: str, *, budget_s: float = 0.1) -> float:
    """The shortest of several runs, at least two after a warm-up and no more than the budget asks for."""

    def timed() -> float:
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    seconds = [timed(), timed()]
    while sum(seconds) < budget_s:
        seconds.append(timed())
    return min(seconds)


def _matmul_rate(device: str, dtype: torch.dtype) -> float:
    tokens, inputs, outputs = MATMUL_SIZES[device]
    left = torch.ones(tokens, inputs, dtype=dtype, device=device)
    right = torch.ones(outputs, inputs, dtype=dtype, device=device)
    return 2 * tokens * inputs * outputs / _best_seconds(lambda: left @ right.T, device)


def _memory_rate(device: str) -> float:
    source = torch.zeros(8 * PROBE_BYTES if device == "cuda" else PROBE_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best_seconds(lambda: target.copy_(source), device)


def _launch_seconds(device: str, num_launches: int = 200) -> float:
    number = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(num_launches):
            number.add_(1)

    return _best_seconds(launch, device) / num_launches


def _link_rates() -> tuple[float, float]:
    host = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    gpu = torch.empty(PROBE_BYTES, dtype=torch.uint8, device="cuda")
    to_gpu_s = _best_seconds(lambda: gpu.copy_(host, non_blocking=True), "cuda")
    from_gpu_s = _best_seconds(lambda: host.copy_(gpu, non_blocking=True), "cuda")
    return PROBE_BYTES / to_gpu_s, PROBE_BYTES / from_gpu_s


def _probe_disk(directory: Path) -> tuple[int, float, float]:
    """Free bytes, and the rates of one file written through to the disk and read back past the page cache."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory, buffering=0) as file, mmap.mmap(-1, PROBE_BYTES) as buffer:
            buffer.write(os.urandom(2**20) * (PROBE_BYTES // 2**20))  # a compressing disk must not cheat
            start = time.perf_counter()
            written = os.write(file.fileno(), buffer)
            os.fsync(file.fileno())
            write_s = time.perf_counter() - start
            if sys.platform == "linux":  # elsewhere the page cache answers, and the read looks faster than it is
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            start = time.perf_counter()
            read = os.readv(file.fileno(), [buffer])
            read_s = time.perf_counter() - start
        assert written == read == PROBE_BYTES, (written, read)
        return shutil.disk_usage(directory).free, PROBE_BYTES / read_s, PROBE_BYTES / write_s
    except OSError as error:
        raise ConfigError(
            f"cannot write to the disk folder: {error.strerror or error}",
            where=str(directory),
            mend="Name a writable folder with --disk DIR",
        ) from error
