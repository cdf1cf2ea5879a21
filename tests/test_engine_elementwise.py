"""What a layer's operations make of a token is counted right, and the machine's rate is of things counted alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from policy_cases import LAPTOP, OPT_125M
from tiny_models import FAMILIES, tiny_config

from flexeval.config import Sparsity
from flexeval.engine import cpu_rates
from flexeval.engine.codecs.codec import IntegerCodec
from flexeval.engine.codecs.kv_format import KVShape
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.elementwise import _Count, results_per_token
from flexeval.engine.compute.experts import experts_per_token
from flexeval.policy.rates import machine

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_layer_is_counted_as_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexeval.engine.compute.fusion.has_passes", lambda: False)
    width, heads, kv_heads, inner = 64, 64, 32, 128
    norms = 2 * (3 * width + 3)  # squares, their mean, epsilon, root; scaled, weighted
    rotary = 4.5 * (heads + kv_heads)  # times cosines, half negated, put together, times sines, added
    anatomy = Anatomy(tiny_config("llama"), torch.float32)
    assert results_per_token(anatomy, CPU) == norms + rotary + 2 * inner + 2 * width


@pytest.mark.parametrize("on_cpu_as_well", [False, True])
def test_what_is_one_pass_is_counted_once(on_cpu_as_well: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And for the devices only that do it in one."""
    monkeypatch.setattr("flexeval.engine.compute.fusion.has_passes", lambda: on_cpu_as_well)
    width, heads, kv_heads, inner = 64, 64, 32, 128
    anatomy = Anatomy(tiny_config("llama"), torch.float32)
    on_cpu = results_per_token(anatomy, CPU)
    in_one = results_per_token(anatomy, GPU)
    assert in_one == 2 * width + heads + kv_heads + inner + 2 * width
    assert results_per_token(anatomy, CPU) == on_cpu
    assert (on_cpu == in_one) == on_cpu_as_well


@pytest.mark.parametrize(("has_passes", "least"), [(False, 8 * 64), (True, 7 * 64)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_counted(
    family: str, has_passes: bool, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexeval.engine.compute.fusion.has_passes", lambda: has_passes)
    anatomy = Anatomy(tiny_config(family), torch.float32)
    most = 64 * 64 * experts_per_token(anatomy.config)
    assert least < results_per_token(anatomy, CPU) < most


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_passes_are_timed_where_there_are_any(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    per_s = cpu_rates.cpu_elementwise_rate(dtype)
    assert per_s is not None and 1e8 < per_s < 1e12
    monkeypatch.setattr(cpu_rates, "has_passes", lambda: False)
    assert cpu_rates.cpu_elementwise_rate.__wrapped__(dtype) is None


@pytest.mark.parametrize("is_dense", [False, True])
def test_what_is_planned_with_is_what_the_engine_runs(is_dense: bool) -> None:
    """Chosen keys are attended to by torch."""
    shape = dataclasses.replace(OPT_125M, sparsity=None if is_dense else Sparsity(method="topk", percent=10))
    kv = (KVShape(12, 64, 64), torch.bfloat16, None)
    machine = cpu_rates.with_our_kernels(LAPTOP, shape, kv, IntegerCodec(4, 64))
    assert machine.elementwise_per_s != LAPTOP.elementwise_per_s and machine.softmax_per_s != LAPTOP.softmax_per_s
    assert machine.unpacked_per_s > 0
    assert (machine.single_attention_flops_per_s != LAPTOP.single_attention_flops_per_s) == is_dense
