"""Rates of this machine, timed in about a second: what it computes, moves and reads. Knows no model and no policy."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from flexeval.directio import CHUNK_BYTES, QUEUE_DEPTH, DirectIO, unnamed_file
from flexeval.errors import ConfigError
from flexeval.policy.profile import FEW_TOKENS

FAST_BUDGET_S = 0.05
"""For what takes well under a millisecond a time."""
PROBE_BYTES = 32 * 2**20
"""Bytes of a timed copy."""
PROBE_CHUNKS = 16
"""Chunks of the timed file: 256 MiB, a quarter of a second of a fast disk."""
MATMUL_SIZES = {"cpu": (256, 1024, 1024), "cuda": (4096, 4096, 4096)}
"""Tokens, inputs and outputs of the timed matrix product."""
SMALL_MATRIX = (256, 512)
"""Outputs and inputs of a matrix whose product takes a CPU mostly what any takes."""
MATRICES_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Of the matrices that few tokens are multiplied by in turns: more than caches hold, as a model's are."""
ATTENTION_SIZES = {"cpu": (8, 128, 64), "cuda": (32, 2048, 128)}
"""Heads, tokens and head size of timed attention."""
ELEMENTWISE_SIZES = {"cpu": (2048, 768, 64), "cuda": (4096, 8192, 128)}
"""Tokens, width and head size of timed operations: of a row's size, so that results lie in memory as a layer's do."""
LOGITS_SIZES = {"cpu": (32, 32768), "cuda": (512, 32768)}
"""Positions and vocabulary of the timed readings of logits."""
NUM_RANKED = 32
"""Tokens that the timed search for the most probable finds."""
SMALL_OPERATIONS = 16
"""Timed between two products."""
LAUNCH_REPEATS = 5
"""Times that they are timed, with and without."""


def measure(device: Literal["cuda", "cpu"], dtype: torch.dtype, disk_dir: Path | None) -> dict[str, float]:
    """The rates of `Hardware` by their names there, in about a second. Raises `ConfigError`."""
    to_gpu, from_gpu = _link_rates() if device == "cuda" else (0.0, 0.0)
    single, few, product_s, launch_s = _few_token_rates(device, dtype)
    softmax, ranking = _logits_rates(device, dtype)
    disk_read, disk_write = _disk_rates(disk_dir) if disk_dir else (0.0, 0.0)
    return {
        "to_gpu_bytes_per_s": to_gpu,
        "from_gpu_bytes_per_s": from_gpu,
        "disk_read_bytes_per_s": disk_read,
        "disk_write_bytes_per_s": disk_write,
        "flops_per_s": _matmul_rate(device, dtype),
        "single_product_bytes_per_s": single,
        "few_product_bytes_per_s": few,
        "product_s": product_s,
        "attention_flops_per_s": _attention_rate(device, dtype),
        "elementwise_per_s": _elementwise_rate(device, dtype),
        "softmax_per_s": softmax,
        "ranking_per_s": ranking,
        "memory_bytes_per_s": _memory_rate(device),
        "launch_s": launch_s,
    }


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


class _FewTokenRates(NamedTuple):
    """Of products whose time is that of reading matrices."""

    single_bytes_per_s: float
    few_bytes_per_s: float
    product_s: float
    launch_s: float


def _few_token_rates(device: str, dtype: torch.dtype) -> _FewTokenRates:
    """Bytes of matrices a second that one token is multiplied by, and few; what any product takes; a small operation.

    A product takes p + bytes / rate: a line through a large and a small matrix, on a CPU. On a GPU p is a launch.
    """
    _, inputs, outputs = MATMUL_SIZES[device]
    large = _matrices(device, dtype, outputs, inputs)
    num_bytes = large[0].numel() * large[0].element_size()
    single_s, few_s = (_product_seconds(large, num_tokens) for num_tokens in (1, FEW_TOKENS))
    launch_s = _launch_seconds(device)
    if device == "cuda":
        return _FewTokenRates(num_bytes / single_s, num_bytes / few_s, 0.0, launch_s)
    small = _matrices(device, dtype, *SMALL_MATRIX)
    small_share = small[0].numel() / large[0].numel()
    # Not all of the shortest is what any product takes: timings scatter.
    product_s = max(0.0, (_product_seconds(small, FEW_TOKENS) - small_share * few_s) / (1 - small_share))
    product_s = min(product_s, single_s / 2, few_s / 2)
    launch_s = max(launch_s, _launch_seconds_between(large))
    return _FewTokenRates(num_bytes / (single_s - product_s), num_bytes / (few_s - product_s), product_s, launch_s)


def _matrices(device: str, dtype: torch.dtype, outputs: int, inputs: int) -> list[torch.Tensor]:
    matrix = torch.randn(outputs, inputs, device=device).to(dtype)
    num = MATRICES_BYTES[device] // (matrix.numel() * matrix.element_size())
    return [matrix.clone() for _ in range(num)]


def _product_seconds(matrices: Sequence[torch.Tensor], num_tokens: int) -> float:
    """Of one product of so many tokens, with matrices in turns."""
    tokens = torch.randn(num_tokens, matrices[0].shape[1], device=matrices[0].device).to(matrices[0].dtype)

    def run() -> None:
        for right in matrices:
            linear(tokens, right)

    return _best_seconds(run, matrices[0].device.type, budget_s=FAST_BUDGET_S) / len(matrices)


def _launch_seconds_between(matrices: Sequence[torch.Tensor]) -> float:
    """Of a small operation between products: what a CPU knows of it has left its caches by then.

    The difference of two loops, which are timed in turns, so that whatever else the CPU does meets both.
    """
    tokens, number = torch.randn(1, matrices[0].shape[1]).to(matrices[0].dtype), torch.zeros(1)

    def seconds(num_operations: int) -> float:
        start = time.perf_counter()
        for right in matrices:
            linear(tokens, right)
            for _ in range(num_operations):
                number.add_(1)
        return time.perf_counter() - start

    differences = [seconds(SMALL_OPERATIONS) - seconds(0) for _ in range(LAUNCH_REPEATS)]
    return median(differences) / (len(matrices) * SMALL_OPERATIONS)


def _attention_rate(device: str, dtype: torch.dtype) -> float:
    heads, tokens, size = ATTENTION_SIZES[device]
    q, k, v = (torch.randn(1, heads, tokens, size, device=device).to(dtype) for _ in range(3))
    seconds = _best_seconds(
        lambda: scaled_dot_product_attention(q, k, v, is_causal=True), device, budget_s=FAST_BUDGET_S
    )
    return 4 * heads * size * tokens**2 / seconds


def _elementwise_rate(device: str, dtype: torch.dtype) -> float:
    """Numbers a second that a layer's operations between its products make: norm, rotary embedding, gate, residual.

    Written out as layers have them: single operations on lone tensors ran at more than twice the rate on a CPU.
    """
    num_tokens, width, head_size = ELEMENTWISE_SIZES[device]
    hidden_TD = torch.randn(num_tokens, width, device=device).to(dtype)
    cos_TH, sin_TH = (torch.randn(num_tokens, head_size, device=device).to(dtype) for _ in range(2))
    is_converted = dtype != torch.float32

    def run() -> object:
        wide_TD = hidden_TD.float()
        scaled_TD = wide_TD * torch.rsqrt(wide_TD.pow(2).mean(-1, keepdim=True) + 1e-6)
        normed_TD = hidden_TD[:1] * scaled_TD.to(dtype)
        heads_NTH = normed_TD.unflatten(1, (-1, head_size)).transpose(0, 1)
        left, right = heads_NTH.chunk(2, -1)
        turned_NTH = heads_NTH * cos_TH + torch.cat((-right, left), -1) * sin_TH
        return hidden_TD + silu(hidden_TD) * turned_NTH.transpose(0, 1).flatten(1)

    num_results = (10.5 + 2 * is_converted) * hidden_TD.numel()  # as `engine/compute/elementwise.py` counts them
    return num_results / _best_seconds(run, device, budget_s=FAST_BUDGET_S)


def _logits_rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Logits a second that become log-probabilities, and that are searched for the highest."""
    logits = torch.randn(*LOGITS_SIZES[device], device=device).to(dtype)
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    softmax_s, ranking_s = (
        _best_seconds(run, device, budget_s=FAST_BUDGET_S)
        for run in (lambda: logits.log_softmax(-1, dtype=torch.float32), lambda: logprobs.topk(NUM_RANKED))
    )
    return logits.numel() / softmax_s, logits.numel() / ranking_s


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
        with DirectIO(directory) as io, unnamed_file(directory) as path:
            chunks = [_noise(CHUNK_BYTES) for _ in range(QUEUE_DEPTH)]
            write_rate = _transfer_rate(io, path, os.O_WRONLY, io.write, chunks)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            return _transfer_rate(io, path, os.O_RDONLY, io.read, chunks), write_rate
    except OSError as error:
        raise no_folder(directory, error) from error


def no_folder(directory: Path, error: OSError) -> ConfigError:
    """What is said of a folder that cannot be written to."""
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
