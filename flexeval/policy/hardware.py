"""The machine as the cost model sees it: capacities and rates, measured in about a second.

Knows how to ask and time this machine; the only module of this room that imports torch. Knows no model, no workload
and no policy. How much memory is free is `memory.py`'s question.
"""

from __future__ import annotations

import mmap
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Literal

import torch

from flexeval.config import Limits
from flexeval.directio import CHUNK_BYTES, QUEUE_DEPTH, DirectIO
from flexeval.errors import ConfigError
from flexeval.policy import profile
from flexeval.policy.memory import free_host_bytes
from flexeval.policy.policy import Tier
from flexeval.shelf import prepared_shelf

GPU_USABLE_SHARE = 31 / 32
"""The rest is left to fragmentation and to the workspaces of CUDA libraries."""
HOST_USABLE_SHARE = 0.9
"""The rest is left to Python itself and to the page cache."""
PROBE_BYTES = 32 * 2**20
"""Bytes of a timed copy."""
PROBE_CHUNKS = 16
"""Chunks of the timed file: 256 MiB, a quarter of a second of a fast disk."""
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
    host_attention_bytes_per_s: float
    """Keys and values that a CPU attends to beside a busy link; 0 where none does."""

    @property
    def home(self) -> Tier:
        """The tier that the compute device works in: data resting there need not move."""
        return Tier.GPU if self.device == "cuda" else Tier.CPU

    def capacity_bytes(self, tier: Tier) -> int:
        """Usable bytes of a tier."""
        return {Tier.GPU: self.gpu_bytes, Tier.CPU: self.cpu_bytes, Tier.DISK: self.disk_bytes}[tier]


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
    return measure(device, dtype, disk_dir) if known is None else known.rates


def machine_of(device: str, dtype: torch.dtype, disk_dir: Path | None) -> dict[str, str]:
    """What a profile of this machine is of."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return profile.identity(device, str(dtype).removeprefix("torch."), disk_dir, gpu)


def measure(device: Literal["cuda", "cpu"], dtype: torch.dtype, disk_dir: Path | None) -> dict[str, float]:
    """The rates of `Hardware` by their names there, in about a second. Raises `ConfigError`."""
    to_gpu, from_gpu = _link_rates() if device == "cuda" else (0.0, 0.0)
    disk_read, disk_write = _disk_rates(disk_dir) if disk_dir else (0.0, 0.0)
    return {
        "to_gpu_bytes_per_s": to_gpu,
        "from_gpu_bytes_per_s": from_gpu,
        "disk_read_bytes_per_s": disk_read,
        "disk_write_bytes_per_s": disk_write,
        "flops_per_s": _matmul_rate(device, dtype),
        "memory_bytes_per_s": _memory_rate(device),
        "launch_s": _launch_seconds(device),
    }


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
    # Random numbers: on ones or zeros a GPU draws less power, and runs faster than it ever does at work.
    left = torch.randn(tokens, inputs, device=device).to(dtype)
    right = torch.randn(outputs, inputs, device=device).to(dtype)
    return 2 * tokens * inputs * outputs / _best_seconds(lambda: left @ right.T, device)


def _memory_rate(device: str) -> float:
    num_bytes = 8 * PROBE_BYTES if device == "cuda" else PROBE_BYTES
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
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


def _disk_rates(directory: Path) -> tuple[float, float]:
    """Reading and writing, as the engine moves files. Raises `ConfigError`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with DirectIO(directory) as io, NamedTemporaryFile(dir=directory) as file:
            chunks = [_noise(CHUNK_BYTES) for _ in range(QUEUE_DEPTH)]
            write_rate = _transfer_rate(io, Path(file.name), os.O_WRONLY, io.write, chunks)
            os.fsync(file.fileno())
            return _transfer_rate(io, Path(file.name), os.O_RDONLY, io.read, chunks), write_rate
    except OSError as error:
        raise _no_folder(directory, error) from error


def _free_disk_bytes(directory: Path) -> int:
    """Room, prepared weights included: they give way or are what is wanted. Raises `ConfigError`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(directory).free + prepared_shelf(directory).num_bytes()
    except OSError as error:
        raise _no_folder(directory, error) from error


def _no_folder(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write to the disk folder: {error.strerror or error}",
        where=str(directory),
        mend="Name a writable folder with --disk DIR",
    )


def _noise(num_bytes: int) -> mmap.mmap:
    """Page-aligned memory with bytes that a compressing disk cannot shrink."""
    chunk = mmap.mmap(-1, num_bytes)
    chunk.write(os.urandom(2**20) * (num_bytes // 2**20))
    return chunk


def _transfer_rate(
    io: DirectIO, path: Path, flags: int, transfer: Callable[[int, mmap.mmap, int], None], chunks: list[mmap.mmap]
) -> float:
    """Bytes per second of `PROBE_CHUNKS` chunks of one file, as many at once as the engine moves."""

    def run(file: int, lane: int) -> None:
        for chunk in range(lane, PROBE_CHUNKS, len(chunks)):
            transfer(file, chunks[lane], chunk * CHUNK_BYTES)

    with io.opened(path, flags) as file:
        start = time.perf_counter()
        running = [io.submit(run, file, lane) for lane in range(len(chunks))]
        for one in running:
            one.result()
        if flags == os.O_WRONLY:
            os.fdatasync(file)
        return PROBE_CHUNKS * CHUNK_BYTES / (time.perf_counter() - start)
