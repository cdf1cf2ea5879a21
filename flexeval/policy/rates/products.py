"""How fast matrices are multiplied, by one token, by few and by many. Knows no model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from flexeval.policy.profile import FEW_TOKENS
from flexeval.policy.rates.timing import FAST_BUDGET_S, RESTING_S, best_seconds, sustained_seconds

MATMUL_SIZES = {"cpu": (256, 1024, 1024), "cuda": (8192, 8192, 8192)}
"""Tokens, inputs and outputs of the timed matrix product."""
LARGE_MATRIX = {"cpu": (1024, 1024), "cuda": (8192, 8192)}
"""Outputs and inputs of matrices that few tokens are multiplied by: reading one takes far longer than a launch."""
SMALL_MATRIX = (256, 512)
"""Outputs and inputs of a matrix whose product takes a CPU mostly what any takes."""
MATRICES_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Of the matrices that few tokens are multiplied by in turns: more than caches hold, as a model's are."""
SMALL_OPERATIONS = 16
"""Timed between two products."""
LAUNCH_REPEATS = 5
"""Times that they are timed, with and without."""


class _ProductRates(NamedTuple):
    """Of large products, in operations a second."""

    flops_per_s: float
    cold_flops_per_s: float


def matmul_rates(device: str, dtype: torch.dtype) -> _ProductRates:
    """Of a large product; on a GPU, of one that goes on, and of one after a rest."""
    tokens, inputs, outputs = MATMUL_SIZES[device]
    # Random numbers: on ones or zeros a GPU draws less power, and runs faster than it ever does at work.
    left = torch.randn(tokens, inputs, device=device).to(dtype)
    right = torch.randn(outputs, inputs, device=device).to(dtype)
    if device == "cuda":
        time.sleep(RESTING_S)
    seconds = cold_s = best_seconds(lambda: left @ right.T, device)
    if device == "cuda":
        seconds = sustained_seconds(lambda: left @ right.T, once_s=cold_s)
    num_operations = 2 * tokens * inputs * outputs
    return _ProductRates(num_operations / seconds, num_operations / cold_s)


class ReadingRates(NamedTuple):
    """Of products whose time is that of reading matrices."""

    single_bytes_per_s: float
    """By one token."""
    few_bytes_per_s: float
    """By `FEW_TOKENS`."""
    product_s: float
    """What any product takes besides."""


Multiply = Callable[[torch.Tensor, torch.Tensor], object]
"""`x @ W.T` of tokens `[T, I]` and a matrix `[O, I]`."""


def reading_rates(
    device: str, dtype: torch.dtype, multiply: Multiply = linear, *, budget_s: float = FAST_BUDGET_S
) -> ReadingRates:
    """How few tokens are multiplied: a product takes p + bytes / rate, a line through a large matrix and a small.

    On a GPU p is a launch.
    """
    large = _matrices(device, dtype, *LARGE_MATRIX[device])
    num_bytes = large[0].numel() * large[0].element_size()
    single_s, few_s = (_product_seconds(large, multiply, num_tokens, budget_s) for num_tokens in (1, FEW_TOKENS))
    if device == "cuda":
        return ReadingRates(num_bytes / single_s, num_bytes / few_s, 0.0)
    small = _matrices(device, dtype, *SMALL_MATRIX)
    small_share = small[0].numel() / large[0].numel()
    # Not all of the shortest is what any product takes: timings scatter.
    small_s = _product_seconds(small, multiply, FEW_TOKENS, budget_s)
    product_s = max(0.0, (small_s - small_share * few_s) / (1 - small_share))
    product_s = min(product_s, single_s / 2, few_s / 2)
    return ReadingRates(num_bytes / (single_s - product_s), num_bytes / (few_s - product_s), product_s)


def launch_seconds(device: str, dtype: torch.dtype) -> float:
    """What a small operation takes; on a CPU, between products."""
    launch_s = _launch_seconds(device)
    if device == "cpu":
        launch_s = max(launch_s, _launch_seconds_between(_matrices(device, dtype, *LARGE_MATRIX[device])))
    return launch_s


def _matrices(device: str, dtype: torch.dtype, outputs: int, inputs: int) -> list[torch.Tensor]:
    matrix = torch.randn(outputs, inputs, device=device).to(dtype)
    num = MATRICES_BYTES[device] // (matrix.numel() * matrix.element_size())
    return [matrix.clone() for _ in range(num)]


def _product_seconds(matrices: Sequence[torch.Tensor], multiply: Multiply, num_tokens: int, budget_s: float) -> float:
    """Of one product of so many tokens, with matrices in turns."""
    tokens = torch.randn(num_tokens, matrices[0].shape[1], device=matrices[0].device).to(matrices[0].dtype)

    def run() -> None:
        for right in matrices:
            multiply(tokens, right)

    return best_seconds(run, matrices[0].device.type, budget_s=budget_s) / len(matrices)


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


def _launch_seconds(device: str, num_launches: int = 200) -> float:
    number = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(num_launches):
            number.add_(1)

    return best_seconds(launch, device) / num_launches
