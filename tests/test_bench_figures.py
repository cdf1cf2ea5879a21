"""The arithmetic of a benchmark: phases, bounds, growth and the number of requests, all from plain numbers."""

from __future__ import annotations

import dataclasses

import pytest
from policy_cases import OPT_30B, T4, generating

from flexeval.bench.bounds import with_bounds
from flexeval.bench.figures import LaneFigures, PhaseFigures, ScalePoint, SystemFigures, TokenFigures
from flexeval.bench.phases import fit_exponent, split_phases
from flexeval.bench.sizing import largest_worthwhile
from flexeval.engine.trace import LaneTrace, SweepTrace
from flexeval.errors import CapacityError
from flexeval.policy.cost import CostModel
from flexeval.policy.policy import Policy

GIB = 2**30


def sweep(fresh: int, decode: int, elapsed_s: float, **lanes: tuple[int, float]) -> SweepTrace:
    traces = {name: LaneTrace(num_bytes, busy_s) for name, (num_bytes, busy_s) in lanes.items()}
    return SweepTrace(num_fresh_tokens=fresh, num_decode_tokens=decode, elapsed_s=elapsed_s, lanes=traces)


def test_a_sweep_that_does_both_is_prefill() -> None:
    phases = split_phases(
        [
            sweep(100, 0, 2.0, weights=(10, 0.5)),
            sweep(50, 4, 1.0, weights=(10, 0.5)),
            sweep(0, 8, 0.5, weights=(10, 0.5)),
            sweep(0, 6, 1.5, weights=(12, 0.1)),
        ]
    )
    prefill, decode = phases["prefill"], phases["decode"]
    assert (prefill.num_sweeps, prefill.num_fresh_tokens, prefill.num_decode_tokens) == (2, 150, 4)
    assert prefill.lanes["weights"] == LaneFigures(num_bytes=20, busy_s=1.0, utilization=pytest.approx(1 / 3))
    assert (decode.num_sweeps, decode.num_decode_tokens, decode.elapsed_s) == (2, 14, 2.0)
    assert decode.lanes["weights"] == LaneFigures(num_bytes=22, busy_s=0.6, utilization=pytest.approx(0.3))


def test_a_phase_without_sweeps_is_absent() -> None:
    assert list(split_phases([sweep(7, 0, 1.0)])) == ["prefill"]


def figures(phases: dict[str, PhaseFigures], num_generated: int) -> SystemFigures:
    return SystemFigures(
        system="flexeval",
        setting="none",
        num_requests=8,
        batch_size=8,
        load_s=1.0,
        elapsed_s=4.0,
        all_elapsed_s=[4.0],
        tokens=TokenFigures(
            num_asked=200, num_duplicate=20, num_shared=30, num_computed=150, num_generated=num_generated
        ),
        phases=phases,
        peak_bytes={},
    )


def test_rates_are_what_their_names_say() -> None:
    phases = split_phases([sweep(150, 0, 3.0), sweep(0, 8, 0.5), sweep(0, 8, 0.25)])
    system = figures(phases, 24)
    assert system.requests_per_s == 2.0
    assert system.prefill_tokens_per_s == 50.0
    assert system.decode_s_per_sweep == 0.375
    assert system.generated_tokens_per_s == pytest.approx(24 / 3.75), "prefill and decode, without planning"
    data = system.to_json()
    assert data["requests_per_s"] == 2.0 and data["phases"]["decode"]["bound"] is None
    scored = figures(split_phases([sweep(150, 0, 3.0)]), 0)
    assert (scored.generated_tokens_per_s, scored.decode_s_per_sweep) == (None, None)


def phase(elapsed_s: float, **num_bytes: int) -> PhaseFigures:
    lanes = dict.fromkeys(("weights", "kv_in", "kv_out", "hidden", "host_attention"), 0) | num_bytes
    return PhaseFigures(
        elapsed_s=elapsed_s,
        num_sweeps=2,
        num_fresh_tokens=0,
        num_decode_tokens=10,
        lanes={name: LaneFigures(num_bytes=n, busy_s=0.0, utilization=0.0) for name, n in lanes.items()},
    )


def test_bounds_are_bytes_at_the_measured_rates() -> None:
    model = CostModel(shape=OPT_30B, workload=generating(64), hardware=T4)
    policy = Policy.parse("gpu-weights=0.25,disk-weights=0.25,cpu-kv=1,cpu-hidden=1")
    moved = phase(10.0, weights=30 * GIB, kv_in=4 * GIB, kv_out=2 * GIB, hidden=8 * GIB)
    bounds = with_bounds({"decode": moved}, model, policy)["decode"].bounds
    assert bounds["to_gpu"].amount == (30 + 4 + 4) * GIB, "half of the hidden states' traffic"
    assert bounds["to_gpu"].bound_s == pytest.approx(38 * GIB / T4.to_gpu_bytes_per_s)
    assert bounds["from_gpu"].amount == (2 + 4) * GIB
    assert bounds["disk_read"].amount == 10 * GIB, "12 of the 36 layers that stream"
    assert bounds["disk_read"].bound_s == pytest.approx(10 * GIB / T4.disk_read_bytes_per_s)
    assert bounds["disk_write"].amount == 0
    flops = 2 * OPT_30B.layer_params * OPT_30B.num_layers * 10
    weights_s = 2 * OPT_30B.num_layers * OPT_30B.layer_bytes / T4.memory_bytes_per_s
    assert bounds["compute"].amount == flops
    assert bounds["compute"].bound_s == pytest.approx(max(flops / T4.flops_per_s, weights_s))
    predicted = model.cost(policy).lanes["decode"]
    assert {name: bound.predicted_s for name, bound in bounds.items()} == {str(k): v for k, v in predicted.items()}


def test_what_the_cpu_attends_to_is_bounded_by_its_rate() -> None:
    """It does not cross the link: of what does, the more is from disk."""
    machine = dataclasses.replace(T4, host_attention_bytes_per_s=10e9)
    model = CostModel(shape=OPT_30B, workload=generating(64), hardware=machine)
    policy = Policy.parse("gpu-weights=1,cpu-kv=0.5,disk-kv=0.5,host-attention=0.5")
    moved = phase(10.0, kv_in=9 * GIB, kv_out=4 * GIB, host_attention=3 * GIB)
    bounds = with_bounds({"decode": moved}, model, policy)["decode"].bounds
    assert bounds["host_attention"].amount == 3 * GIB
    assert bounds["host_attention"].bound_s == pytest.approx(3 * GIB / 10e9)
    assert bounds["host_attention"].predicted_s > 0
    assert bounds["to_gpu"].amount == 9 * GIB
    assert bounds["disk_read"].amount == pytest.approx(6 * GIB), "24 of 36 layers"
    assert bounds["disk_write"].amount == 2 * GIB, "24 of 48"


def test_the_highest_bound_is_the_one_that_counts() -> None:
    model = CostModel(shape=OPT_30B, workload=generating(64), hardware=T4)
    moved = phase(10.0, weights=48 * GIB, kv_in=4 * GIB)
    bounded = with_bounds({"decode": moved}, model, Policy.parse("cpu-weights=1"))["decode"]
    assert bounded.bound == "to_gpu"
    assert bounded.reached == pytest.approx(52 * GIB / T4.to_gpu_bytes_per_s / 10.0)


@pytest.mark.parametrize(("power", "factor"), [(1.0, 0.3), (0.5, 2.0), (2.0, 0.01)])
def test_the_exponent_of_a_power_is_found(power: float, factor: float) -> None:
    points = [ScalePoint(num_requests=n, elapsed_s=factor * n**power) for n in (8, 32, 128)]
    assert fit_exponent(points) == pytest.approx(power)
    assert points[1].s_per_request == pytest.approx(factor * 32 ** (power - 1))


@pytest.mark.parametrize(
    ("fixed_s", "each_s", "expected", "words"),
    [
        (10.0, 0.1, 1024, "save"),  # 10 s shared by all: at 1024 they are 0.0098 s of 0.11 each
        (0.0, 0.1, 256, "save"),  # 25.6 s: long enough
        (1e9, 0.1, 8, "twice as many would take"),
        (100.0, 0.001, 4096, "the most"),
    ],
)
def test_requests_are_added_while_that_makes_each_cheaper(
    fixed_s: float, each_s: float, expected: int, words: str
) -> None:
    chosen = largest_worthwhile(lambda num_requests: fixed_s + each_s * num_requests)
    assert chosen.num_requests == expected
    assert words in chosen.why


def test_no_more_requests_are_chosen_than_fit() -> None:
    def predict(num_requests: int) -> float:
        if num_requests > 20:
            raise CapacityError("too many")
        return 1.0

    assert largest_worthwhile(predict)[:1] == (16,)
