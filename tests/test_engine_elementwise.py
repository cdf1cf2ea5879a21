"""What a layer's operations make of a token is counted right, and the machine's rate is of things counted alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import FAMILIES, tiny_config

from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.elementwise import _Count, results_per_token
from flexeval.engine.compute.experts import experts_per_token
from flexeval.policy.rates import machine

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_layer_is_counted_as_by_hand() -> None:
    width, heads, kv_heads, inner = 64, 64, 32, 128
    norms = 2 * (3 * width + 3)  # squares, their mean, epsilon, root; scaled, weighted
    rotary = 4.5 * (heads + kv_heads)  # times cosines, half negated, put together, times sines, added
    anatomy = Anatomy(tiny_config("llama"), torch.float32)
    assert results_per_token(anatomy, CPU) == norms + rotary + 2 * inner + 2 * width


def test_what_is_one_launch_on_a_gpu_is_counted_once() -> None:
    """And for a GPU only."""
    width, heads, kv_heads, inner = 64, 64, 32, 128
    anatomy = Anatomy(tiny_config("llama"), torch.float32)
    on_cpu = results_per_token(anatomy, CPU)
    assert results_per_token(anatomy, GPU) == 2 * width + heads + kv_heads + inner + 2 * width
    assert results_per_token(anatomy, CPU) == on_cpu


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_counted(family: str) -> None:
    anatomy = Anatomy(tiny_config(family), torch.float32)
    most = 64 * 64 * experts_per_token(anatomy.config)
    assert 8 * 64 < results_per_token(anatomy, CPU) < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_timed_makes_as_many_as_it_says(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def count(run: Callable[[], object], device: str, *, budget_s: float) -> float:
        with _Count() as found:
            run()
        counted.append(found.num_results)
        return 1.0

    monkeypatch.setattr(machine, "best_seconds", count)
    assert machine._elementwise_rate("cpu", dtype) == pytest.approx(counted[0], rel=0.01)
