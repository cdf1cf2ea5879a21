"""Rates of this machine, timed in about a second: what it computes, moves and reads. Knows no model and no policy."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch.nn.functional import silu

from flexeval.policy.rates.attention import HEAD_SIZE, attention_rates
from flexeval.policy.rates.disk import disk_rates
from flexeval.policy.rates.products import launch_seconds, matmul_rates, reading_rates
from flexeval.policy.rates.timing import FAST_BUDGET_S, best_seconds

PROBE_BYTES = 32 * 2**20
"""Bytes of a timed copy."""
ELEMENTWISE_SIZES = {"cpu": (2048, 768), "cuda": (4096, 8192)}
"""Tokens and width of timed operations: of a row's size, so that results lie in memory as a layer's do."""
LOGITS_SIZES = (512, 32768)
"""Positions and vocabulary of the timed readings of logits: many, for memory that is asked for anew takes its time."""
NUM_RANKED = 32
"""Tokens that the timed search for the most probable finds."""


def measure(device: Literal["cuda", "cpu"], dtype: torch.dtype, disk_dir: Path | None) -> dict[str, float]:
    """The rates of `Hardware` by their names there, in about a second. Raises `ConfigError`."""
    flops_per_s, cold_flops_per_s = matmul_rates(device, dtype)
    to_gpu, from_gpu = _link_rates() if device == "cuda" else (0.0, 0.0)
    reading = reading_rates(device, dtype)
    attention, (softmax, ranking) = attention_rates(device, dtype), _logits_rates(device, dtype)
    disk_read, disk_write = disk_rates(disk_dir) if disk_dir else (0.0, 0.0)
    return {
        "to_gpu_bytes_per_s": to_gpu,
        "from_gpu_bytes_per_s": from_gpu,
        "disk_read_bytes_per_s": disk_read,
        "disk_write_bytes_per_s": disk_write,
        "flops_per_s": flops_per_s,
        "cold_speedup": max(1.0, cold_flops_per_s / flops_per_s),
        "single_product_bytes_per_s": reading.single_bytes_per_s,
        "few_product_bytes_per_s": reading.few_bytes_per_s,
        "product_s": reading.product_s,
        "attention_flops_per_s": attention.flops_per_s,
        "attention_part_s": attention.part_s,
        "single_attention_flops_per_s": attention.single_flops_per_s,
        "elementwise_per_s": _elementwise_rate(device, dtype),
        "softmax_per_s": softmax,
        "ranking_per_s": ranking,
        "memory_bytes_per_s": _memory_rate(device),
        "launch_s": launch_seconds(device, dtype),
    }


def _elementwise_rate(device: str, dtype: torch.dtype) -> float:
    """Numbers a second that a layer's operations between its products make: norm, rotary embedding, gate, residual.

    On a CPU written out as layers have them: single operations on lone tensors ran at more than twice the rate. On a
    GPU each of them is one launch (see `engine/compute/fusion.py`), which reads a tensor or two and writes one.
    """
    hidden_TD = torch.randn(ELEMENTWISE_SIZES[device], device=device).to(dtype)
    if device == "cuda":
        return 2 * hidden_TD.numel() / best_seconds(lambda: hidden_TD + silu(hidden_TD), device, budget_s=FAST_BUDGET_S)
    cos_TH, sin_TH = (torch.randn(len(hidden_TD), HEAD_SIZE[device]).to(dtype) for _ in range(2))
    is_converted = dtype != torch.float32

    def run() -> object:
        wide_TD = hidden_TD.float()
        scaled_TD = wide_TD * torch.rsqrt(wide_TD.pow(2).mean(-1, keepdim=True) + 1e-6)
        normed_TD = hidden_TD[:1] * scaled_TD.to(dtype)
        heads_NTH = normed_TD.unflatten(1, (-1, HEAD_SIZE[device])).transpose(0, 1)
        left, right = heads_NTH.chunk(2, -1)
        turned_NTH = heads_NTH * cos_TH + torch.cat((-right, left), -1) * sin_TH
        return hidden_TD + silu(hidden_TD) * turned_NTH.transpose(0, 1).flatten(1)

    num_results = (10.5 + 2 * is_converted) * hidden_TD.numel()  # as `engine/compute/elementwise.py` counts them
    return num_results / best_seconds(run, device, budget_s=FAST_BUDGET_S)


def _logits_rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Logits a second that become log-probabilities, and that are searched for the highest.

    On a GPU those in 16 bits are read once and nothing is written (`engine/compute/softmax_kernel.py`).
    """
    logits = torch.randn(*LOGITS_SIZES, device=device).to(dtype)
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    is_read_once = device == "cuda" and dtype != torch.float32
    softmax_s, ranking_s = (
        best_seconds(run, device, budget_s=FAST_BUDGET_S)
        for run in (
            lambda: logits.amax(-1) if is_read_once else logits.log_softmax(-1, dtype=torch.float32),
            lambda: logprobs.topk(NUM_RANKED),
        )
    )
    return logits.numel() / softmax_s, logits.numel() / ranking_s


def _memory_rate(device: str) -> float:
    num_bytes = 8 * PROBE_BYTES if device == "cuda" else PROBE_BYTES
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / best_seconds(lambda: target.copy_(source), device)


def _link_rates() -> tuple[float, float]:
    host = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    gpu = torch.empty(PROBE_BYTES, dtype=torch.uint8, device="cuda")
    to_gpu_s = best_seconds(lambda: gpu.copy_(host, non_blocking=True), "cuda")
    from_gpu_s = best_seconds(lambda: host.copy_(gpu, non_blocking=True), "cuda")
    return PROBE_BYTES / to_gpu_s, PROBE_BYTES / from_gpu_s
