"""Corrections from measured sweeps: of machines whose rates are off by known factors, and whether moving pays."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import LAPTOP, LAPTOP_DISK, MIXED, OPT_6_7B, OPT_30B, T4, generating, opt, scoring

from flexeval.policy import replanning
from flexeval.policy.correction import Correction
from flexeval.policy.cost import CostModel, Lane
from flexeval.policy.done import total
from flexeval.policy.measured import BOUNDS, MeasuredSweep, correct, seconds_of
from flexeval.policy.policy import Policy, Split, Tier
from flexeval.policy.replanning import LEAST_GAIN, better_policy, is_worth_a_search, tell_move
from flexeval.policy.search import search
from flexeval.policy.sweeps import COUNTS, Sweep, plan_sweeps

SPLIT_30B = Policy(
    weights=Split(gpu=0.2, cpu=0.6, disk=0.2),
    row_tokens=4096,
    sweep_tokens=16384,
    group_sequences=48,
    num_groups=3,
)


def measured(true: CostModel, policy: Policy, parts: list[Sweep], waiting: float = 1.0) -> MeasuredSweep:
    """A sweep on the true machine that does a part of each phase: weights come once, lanes are busy as they must."""
    placement = true.place(policy)
    hosted = replace(placement, counts={kind: {**tiers, Tier.DISK: 0} for kind, tiers in placement.counts.items()})
    busy: dict[Lane, float] = dict.fromkeys(Lane, 0.0)
    bounds = []
    for index, part in enumerate(parts):
        part = replace(part, weights_share=float(index == 0))
        all_lanes, link_lanes = (true.lane_seconds(policy, part, place) for place in (placement, hosted))
        bounds.append(list(true.sweep_bounds(part, all_lanes)))
        for lane in all_lanes:
            chosen = link_lanes if lane in (Lane.TO_GPU, Lane.FROM_GPU) else all_lanes
            busy[lane] += float(chosen[lane])
    return MeasuredSweep(
        done={part.phase: part for part in parts},
        elapsed_s=waiting * max(map(sum, zip(*bounds, strict=True))),
        compute_s=busy[Lane.COMPUTE],
        in_s=busy[Lane.TO_GPU] + busy[Lane.DISK_READ],
        out_s=busy[Lane.FROM_GPU] + busy[Lane.DISK_WRITE],
        host_attention_s=busy[Lane.HOST_ATTENTION],
    )


def one(sweep: Sweep, share: float = 1.0) -> Sweep:
    """One sweep as planned, or a part of one."""
    return replace(sweep, num_sweeps=1, **{name: share * getattr(sweep, name) for name in COUNTS})


def first_block(true: CostModel, policy: Policy, waiting: float = 1.0) -> list[MeasuredSweep]:
    """A sixteenth: prompts, prompts while others decode, decoding."""
    plan = plan_sweeps(policy, true.workload)
    prefill, decode = one(plan["prefill"]), plan.get("decode")
    if decode is None:
        return [measured(true, policy, [prefill], waiting) for _ in range(2)]
    num = max(2, decode.num_sweeps // 16)
    parts = [[prefill], [prefill, one(decode)], *[[one(decode, share)] for share in [0.98, 1.02] * (num // 2)]]
    return [measured(true, policy, part, waiting) for part in parts]


factors = st.floats(0.25, 4.0)
WORK = {"scoring": scoring(600), "generation": generating(600), "mixed": MIXED}
MACHINES = {
    "gpu": (OPT_30B, T4, SPLIT_30B),
    "gpu, all of it": (opt(24, 2048, 32), T4, Policy(weights=Split(gpu=1.0), kv=Split(gpu=1.0), hidden=Split(gpu=1.0))),
    "cpu": (OPT_6_7B, replace(LAPTOP, cpu_bytes=64 * 10**9), Policy(group_sequences=32)),
    "cpu and disk": (OPT_6_7B, replace(LAPTOP, **LAPTOP_DISK), Policy(weights=Split(cpu=0.5, disk=0.5))),
}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("machine", MACHINES)
@settings(max_examples=8, deadline=None)
@given(rates=st.tuples(*[factors] * 6), waiting=st.floats(1.0, 1.5))
def test_a_machine_whose_rates_are_off_is_corrected_within_5_percent(
    work: str, machine: str, rates: tuple[float, ...], waiting: float
) -> None:
    shape, hardware, policy = MACHINES[machine]
    names = ("flops_per_s", "few_product_bytes_per_s", "to_gpu_bytes_per_s", "from_gpu_bytes_per_s")
    names = (*names, "disk_read_bytes_per_s", "launch_s")
    truth = replace(hardware, **{n: getattr(hardware, n) * f for n, f in zip(names, rates, strict=True)})
    model, true = (CostModel(shape=shape, workload=WORK[work], hardware=one) for one in (hardware, truth))
    correction = correct(model, policy, first_block(true, policy, waiting))
    corrected = replace(model, correction=correction)
    # What comes from host memory and from disk over a link is one figure, so they share a factor.
    within = 0.1 if machine == "gpu" else 0.05
    assert corrected.cost(policy).total_s == pytest.approx(waiting * true.cost(policy).total_s, rel=within)


@pytest.mark.parametrize("factor", [0.2, 3.0])
@pytest.mark.parametrize("name", ["to_gpu_bytes_per_s", "flops_per_s"])
def test_the_lane_that_is_off_is_the_one_that_is_corrected(name: str, factor: float) -> None:
    policy = replace(SPLIT_30B, weights=Split(gpu=0.2, cpu=0.8))
    model = CostModel(shape=OPT_30B, workload=generating(600), hardware=T4)
    true = replace(model, hardware=replace(T4, **{name: factor * getattr(T4, name)}))
    found = correct(model, policy, first_block(true, policy)).lanes
    lane = Lane.TO_GPU if name == "to_gpu_bytes_per_s" else Lane.COMPUTE
    assert found["prefill", lane] == pytest.approx(1 / factor, rel=0.1)  # a part of computing is reading
    for (phase, other), seen in found.items():
        if other is not lane:
            assert seen == pytest.approx(1.0, rel=0.02), (phase, other)


def test_a_model_that_is_right_is_left_alone() -> None:
    model = CostModel(shape=OPT_30B, workload=generating(600), hardware=T4)
    correction = correct(model, SPLIT_30B, first_block(model, SPLIT_30B))
    assert all(factor == pytest.approx(1.0, rel=1e-3) for factor in correction.lanes.values())
    for phase in ("prefill", "decode"):
        assert correction.of_phase(phase) == pytest.approx(1.0, rel=1e-2)
    assert not is_worth_a_search(replace(model, correction=correction), SPLIT_30B, 1e6, 0.1)


def test_of_a_sweep_whose_seconds_tell_nothing_only_its_size_counts() -> None:
    shape, hardware, policy = MACHINES["gpu"]
    model = CostModel(shape=shape, workload=MIXED, hardware=hardware)
    plan = plan_sweeps(policy, MIXED)["prefill"]
    small = [measured(model, policy, [one(plan, 0.02)]) for _ in range(3)]
    late = replace(measured(model, policy, [one(plan)]), elapsed_s=1e3, compute_s=1e3)
    without, found = correct(model, policy, small), correct(model, policy, small, untimed=[late])
    assert (found.lanes, found.waiting) == (without.lanes, without.waiting)
    assert 1.0 < found.cutting["prefill"] < without.cutting["prefill"]


def test_a_sweep_that_something_else_held_up_counts_little() -> None:
    shape, hardware, policy = MACHINES["cpu"]
    model = CostModel(shape=shape, workload=generating(600), hardware=hardware)
    usual = first_block(model, policy) * 5
    held_up = replace(usual[0], elapsed_s=100 * usual[0].elapsed_s, compute_s=100 * usual[0].compute_s)
    corrected = replace(model, correction=correct(model, policy, [held_up, *usual]))
    assert corrected.cost(policy).total_s == pytest.approx(model.cost(policy).total_s, rel=0.3)


@pytest.mark.parametrize("seed", range(6))
def test_phases_that_share_every_sweep_do_not_take_each_others_seconds(seed: int) -> None:
    """A first block of few sweeps whose seconds scatter, as they do beside other work, and a model that is right."""
    shape, hardware, policy = MACHINES["cpu"]
    model = CostModel(shape=shape, workload=MIXED, hardware=hardware)
    plan, rng = plan_sweeps(policy, MIXED), random.Random(seed)
    sweeps = []
    for _ in range(8):
        sweep = measured(model, policy, [one(plan["prefill"], rng.uniform(0.02, 0.1)), one(plan["decode"])])
        held_up = rng.lognormvariate(0, 0.15)
        sweeps.append(replace(sweep, elapsed_s=held_up * sweep.elapsed_s, compute_s=held_up * sweep.compute_s))
    found = correct(model, policy, sweeps).lanes
    for phase in ("prefill", "decode"):
        assert found[phase, Lane.COMPUTE] == pytest.approx(1.0, rel=0.15), phase


def test_no_factor_leaves_its_bounds_and_little_evidence_moves_it_little() -> None:
    shape, hardware, policy = MACHINES["cpu"]
    model = CostModel(shape=shape, workload=generating(600), hardware=hardware)
    slow = replace(model, hardware=replace(hardware, flops_per_s=hardware.flops_per_s / 1000))
    found = correct(model, policy, first_block(slow, policy)).lanes
    assert 1 < found["prefill", Lane.COMPUTE] <= BOUNDS[1]
    decode = plan_sweeps(policy, model.workload)["decode"]
    brief = {"decode": replace(one(decode, 1e-4), num_calls=1)}
    told = MeasuredSweep(done=brief, elapsed_s=1.0, compute_s=1.0, in_s=0.0, out_s=0.0, host_attention_s=0.0)
    fast = replace(model, hardware=replace(hardware, flops_per_s=1e18, single_product_bytes_per_s=1e15))
    fast = replace(fast, hardware=replace(fast.hardware, launch_s=1e-9, memory_bytes_per_s=1e13))
    brief_s = fast.lane_seconds(policy, brief["decode"], fast.place(policy))[Lane.COMPUTE]
    assert brief_s < 1e-3
    assert correct(fast, policy, [told]).lanes["decode", Lane.COMPUTE] < 1.2


def test_smaller_sweeps_than_planned_are_foretold_of_the_rest_as_well() -> None:
    """Prompts that enter one by one read the weights again for each."""
    policy = replace(SPLIT_30B, weights=Split(cpu=1.0))
    model = CostModel(shape=OPT_30B, workload=generating(600), hardware=T4)
    plan = plan_sweeps(policy, model.workload)["prefill"]
    small = [measured(model, policy, [replace(one(plan, 0.02), num_calls=1)]) for _ in range(10)]
    corrected = replace(model, correction=correct(model, policy, small))
    work = total([sweep.done["prefill"] for sweep in small])
    assert seconds_of(corrected, policy, work) == pytest.approx(sum(sweep.elapsed_s for sweep in small), rel=0.05)
    assert seconds_of(model, policy, work) < 0.5 * sum(sweep.elapsed_s for sweep in small)


SHAPE, SMALL_T4 = opt(8, 4096, 32), replace(T4, gpu_bytes=4 * 10**9, disk_bytes=0)
ON_HOST = Policy(row_tokens=1024, sweep_tokens=4096, group_sequences=8, weights=Split(cpu=1.0), kv=Split(cpu=1.0))


def off(factor: float) -> CostModel:
    """A model that half fits, behind a link that takes so many times as long as was planned with."""
    lanes = {(phase, lane): factor for phase in ("prefill", "decode") for lane in (Lane.TO_GPU, Lane.FROM_GPU)}
    work = generating(24)
    return CostModel(shape=SHAPE, workload=work, hardware=SMALL_T4, correction=Correction(lanes=lanes))


def test_the_rest_is_placed_anew_exactly_when_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = off(5.0)
    best = better_policy(model, ON_HOST, moving_s=0.0)
    assert best == search(SHAPE, model.workload, SMALL_T4, correction=model.correction)
    monkeypatch.setattr(replanning, "search", lambda *_, **__: best)  # it takes seconds
    stay_s, go_s = (model.cost(one).total_s for one in (ON_HOST, best))
    assert best.weights.gpu > 0 and go_s < 0.8 * stay_s
    decode = plan_sweeps(ON_HOST, model.workload)["decode"]
    ending_s = 31 * max(model.lane_seconds(ON_HOST, decode, model.place(ON_HOST)).values())
    most_s = (1 - LEAST_GAIN) * stay_s - go_s
    assert most_s > ending_s
    assert better_policy(model, ON_HOST, moving_s=most_s - ending_s) == best
    assert better_policy(model, ON_HOST, moving_s=most_s) is None
    assert better_policy(model, ON_HOST, moving_s=0.0, num_computed_again=50 * model.workload.num_prompt_tokens) is None
    assert better_policy(model, best, moving_s=0.0) is None
    words = tell_move(ON_HOST, best)
    assert "weights" in words and "instead of 100% cpu" in words


def test_nothing_is_searched_for_where_nothing_can_come_of_it() -> None:
    model = off(5.0)
    policy = ON_HOST
    assert is_worth_a_search(model, policy, left_s=1000, search_s=2)
    assert not is_worth_a_search(model, policy, left_s=1000, search_s=100), "the search takes too long"
    even = {(phase, lane): 5.0 for phase in ("prefill", "decode") for lane in Lane}
    assert not is_worth_a_search(replace(model, correction=Correction(lanes=even)), policy, 1000, 2)
    shape, hardware, whole = MACHINES["cpu"]
    slow = Correction(lanes={("decode", Lane.COMPUTE): 3.0})
    at_home = CostModel(shape=shape, workload=generating(60), hardware=hardware, correction=slow)
    assert not is_worth_a_search(at_home, whole, 1000, 2), "nothing moves"
