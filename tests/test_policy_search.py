"""The search against brute force, on the published models and machines, and where nothing fits."""

import random
from dataclasses import replace
from itertools import product

import pulp
import pytest
from policy_cases import (
    LAPTOP,
    LAPTOP_DISK,
    MIXED,
    OPT_6_7B,
    OPT_30B,
    OPT_125M,
    OPT_175B,
    T4,
    generating,
    opt,
    scoring,
)

from flexeval.policy.cost import HOST_WAIT_SHARE, CostModel, Lane
from flexeval.policy.policy import KINDS, Policy, Split, Tier
from flexeval.policy.program import best_placement, least_seconds
from flexeval.policy.search import TOLERANCE, _grid, _seconds_to_read, check, search
from flexeval.policy.work import SizeClass


def everything_on(tier):
    return Split(**{tier: 1.0})


def placements(num_items):
    """Every way to put whole items on three tiers."""
    for gpu, cpu in product(range(num_items + 1), repeat=2):
        if gpu + cpu <= num_items:
            disk = num_items - gpu - cpu
            yield Split(gpu=gpu / num_items, cpu=cpu / num_items, disk=disk / num_items)


def brute_force(model, sizes):
    """Least objective over all placements that `check` lets pass."""
    best = None
    num_items = model.num_items(sizes)
    for weights, kv, hidden in product(*(list(placements(num_items[kind])) for kind in KINDS)):
        policy = replace(sizes, weights=weights, kv=kv, hidden=hidden)
        cost = model.cost(policy)
        if all(peak <= model.hardware.capacity_bytes(tier) for tier, peak in cost.peak_bytes.items()):
            best = min(best or cost.objective_s, cost.objective_s)
    return best


def small_instance(seed):
    """Four layers, a few rows, and tiers that hold a random part of them."""
    rng = random.Random(seed)
    device = rng.choice(["cuda", "cuda", "cpu"])
    packed = rng.random() < 0.3
    shape = opt(4, 256, 4, weight_bits=4.5 if packed else 16)
    shape = replace(shape, hidden_bytes_per_token=rng.choice([512, 16384]))
    work = rng.choice([generating(12, 64, 16), scoring(12, 64), replace(MIXED, max_prompt_tokens=100)])
    row_tokens, sweep_tokens = rng.choice([(256, 768), (128, 768)])
    sizes = Policy(row_tokens=row_tokens, sweep_tokens=sweep_tokens, group_sequences=rng.choice([2, 6]), num_groups=2)
    machine = replace(T4, device=device)
    model = CostModel(shape=shape, workload=work, hardware=machine)
    at_home, on_disk = (
        model.cost(replace(sizes, **{kind: everything_on(tier) for kind in KINDS})).peak_bytes
        for tier in (machine.home, Tier.DISK)
    )
    least, most = sorted([on_disk[machine.home], at_home[machine.home]])
    home_bytes = int(least + rng.uniform(-0.2, 1.1) * (most - least))
    machine = replace(
        machine,
        gpu_bytes=home_bytes if device == "cuda" else 0,
        cpu_bytes=int(on_disk[Tier.DISK] * rng.uniform(0.3, 1.0)) if device == "cuda" else home_bytes,
        disk_bytes=int(on_disk[Tier.DISK] * rng.uniform(0.3, 1.0)),
        to_gpu_bytes_per_s=rng.uniform(1e9, 5e10),
        from_gpu_bytes_per_s=rng.uniform(1e9, 5e10),
    )
    return replace(model, hardware=machine), sizes


@pytest.mark.parametrize("seed", range(24))
def test_placement_equals_brute_force(seed):
    model, sizes = small_instance(seed)
    expected = brute_force(model, sizes)
    policy = best_placement(model, sizes)
    if expected is None:
        assert policy is None
        return
    check(policy, model.shape, model.workload, model.hardware)
    assert model.cost(policy).objective_s == pytest.approx(expected, rel=2e-4)
    assert least_seconds(model, sizes) <= expected * (1 + 1e-6)


def test_small_instances_cover_what_matters():
    found = [(model, best_placement(model, sizes)) for model, sizes in map(small_instance, range(24))]
    assert any(policy is None for _, policy in found)
    placed = [policy for _, policy in found if policy]
    for kind in KINDS:
        assert any(getattr(policy, kind).gpu not in (0, 1) or getattr(policy, kind).disk for policy in placed), kind
    assert {model.hardware.device for model, policy in found if policy} == {"cuda", "cpu"}


def test_search_equals_brute_force_over_the_grid():
    shape, work = opt(5, 256, 4), generating(3, 300, 8)
    machine = replace(T4, gpu_bytes=shape.resident_bytes + 17 * 10**6, cpu_bytes=5 * 10**6, disk_bytes=20 * 10**6)
    model = CostModel(shape=shape, workload=work, hardware=machine)
    bests = [best for sizes in _grid(model) if (best := brute_force(model, sizes)) is not None]
    found = search(shape, work, machine)
    assert 0 < found.kv.cpu < 1  # the machine is too small for everything
    assert found.weights.disk > 0
    assert model.cost(found).objective_s == pytest.approx(min(bests), rel=2 * TOLERANCE)


def ragged(num_large, num_small):
    """A few sequences are far larger than the others."""
    work = generating(num_large + num_small, 1500, 100)
    classes = (SizeClass(200, num_small, 99 * num_small), SizeClass(1600, num_large, 99 * num_large))
    return replace(work, size_classes=classes)


def test_search_equals_brute_force_over_the_grid_where_sizes_differ():
    classes = SizeClass(40, 5, 35), SizeClass(308, 1, 7)
    shape, work = opt(5, 256, 4), replace(generating(6, 300, 8), size_classes=classes)
    machine = replace(T4, gpu_bytes=shape.resident_bytes + 18 * 10**6, cpu_bytes=5 * 10**6, disk_bytes=20 * 10**6)
    model = CostModel(shape=shape, workload=work, hardware=machine)
    grid = list(_grid(model))
    assert any(sizes.group_tokens for sizes in grid) and not all(sizes.group_tokens for sizes in grid)
    bests = [best for sizes in grid if (best := brute_force(model, sizes)) is not None]
    assert model.cost(search(shape, work, machine)).objective_s == pytest.approx(min(bests), rel=2 * TOLERANCE)


def test_logs_are_for_all_but_the_largest_sequences_where_memory_is_short():
    work = ragged(100, 900)
    machine = replace(T4, cpu_bytes=80 * 10**9, disk_bytes=0)
    found = search(OPT_30B, work, machine)
    alike = search(OPT_30B, replace(work, size_classes=()), machine)
    model = CostModel(shape=OPT_30B, workload=work, hardware=machine)
    seconds = [model.cost(policy).total_s for policy in (found, alike)]
    assert 0 < found.group_tokens < found.group_sequences * work.max_own_tokens
    assert alike.group_tokens == 0 and seconds[0] < 0.7 * seconds[1]
    plenty = search(OPT_30B, ragged(10, 40), replace(T4, gpu_bytes=10**13, cpu_bytes=10**13))
    assert plenty.group_tokens == 0, "nothing is gained"


@pytest.mark.parametrize("seed", range(12))
def test_what_must_be_read_is_no_more_than_what_is_predicted(seed):
    model, sizes = small_instance(seed)
    if (policy := best_placement(model, sizes)) is not None:
        assert _seconds_to_read(model, sizes) <= model.cost(policy).total_s * (1 + 1e-9)


@pytest.fixture(scope="module")
def searched():
    """Searched policies with their predictions, by model name."""
    models = {"6.7b": OPT_6_7B, "30b": OPT_30B, "175b": OPT_175B, "175b-w4": opt(96, 12288, 96, weight_bits=4.5)}
    work = generating(1024)
    found = {name: search(shape, work, T4) for name, shape in models.items()}
    return {
        name: (policy, CostModel(shape=models[name], workload=work, hardware=T4).cost(policy))
        for name, policy in found.items()
    }


def test_opt_30b_on_a_t4_streams_most_weights_and_keeps_off_the_disk(searched):
    policy, cost = searched["30b"]
    assert policy.weights.cpu > 0.7
    assert policy.weights.gpu > 0
    assert policy.kv.cpu > 0.9
    assert policy.weights.disk == policy.kv.disk == policy.hidden.disk == 0
    assert policy.group_sequences >= 8  # not hundreds of groups of one
    assert policy.block_sequences >= 96
    assert cost.lanes["decode"][Lane.TO_GPU] == max(cost.lanes["decode"].values())


def test_opt_175b_on_a_t4_needs_the_disk_and_w4_hardly(searched):
    plain, packed = searched["175b"][0], searched["175b-w4"][0]
    assert plain.weights.disk > 0.4
    assert plain.kv.disk > 0.5
    assert packed.weights.disk == 0
    assert packed.weights.cpu > 0.8


def test_opt_6_7b_on_a_t4_keeps_its_weights_on_the_gpu(searched):
    policy, _ = searched["6.7b"]
    assert policy.weights == everything_on("gpu")


@pytest.mark.parametrize(("name", "published"), [("30b", 7.32), ("175b", 0.69), ("175b-w4", 1.12)])
def test_predictions_are_of_the_size_flexgen_measured(searched, name, published):
    # FlexGen, table 1 and section 6; another engine (it attends on the CPU, and runs max_tokens), so a factor of two.
    throughput = 1024 * 32 / searched[name][1].total_s
    assert published / 2 < throughput < published * 2


H100 = replace(
    T4,
    gpu_bytes=24 * 10**9,
    to_gpu_bytes_per_s=55e9,
    from_gpu_bytes_per_s=55e9,
    disk_bytes=0,
    flops_per_s=700e12,
    memory_bytes_per_s=2.5e12,
    host_attention_bytes_per_s=44e9,
    attended_link_share=0.85,
)
"""A GPU of which the user gives 24 GB, a link of 55 GB/s, and a CPU that attends at 44 GB/s beside it."""


def test_the_share_that_the_cpu_attends_to_is_the_best_one():
    sizes = Policy(group_sequences=64, num_groups=8, sweep_tokens=2**15)
    model = CostModel(shape=OPT_30B, workload=generating(512), hardware=replace(H100, cpu_bytes=10**12))
    policy = best_placement(model, sizes)
    assert policy.kv.cpu > 0.9 and 0.2 < policy.host_attention < 0.8
    found = model.cost(policy)
    shares = [number / 20 for number in range(21)]
    others = [model.cost(replace(policy, host_attention=share)).objective_s for share in shares]
    assert found.objective_s <= min(others) * (1 + TOLERANCE) < others[0] * 0.9
    assert least_seconds(model, sizes) <= found.objective_s
    link_s, host_s = (found.lanes["decode"][lane] for lane in (Lane.TO_GPU, Lane.HOST_ATTENTION))
    assert link_s + 0.15 * host_s == pytest.approx(host_s + HOST_WAIT_SHARE * link_s, rel=0.01), "both end together"


def test_the_cpu_attends_only_where_it_and_the_link_have_work_at_the_same_time():
    model = CostModel(shape=OPT_30B, workload=generating(96), hardware=replace(H100, cpu_bytes=10**12))
    for num_groups in (1, 2, 3, 4):
        policy = best_placement(model, Policy(group_sequences=96 // num_groups, num_groups=num_groups))
        assert (policy.host_attention > 0) == (num_groups >= 3)


def test_kv_on_the_gpu_or_on_disk_is_never_attended_to_by_the_cpu():
    everything_fits = search(OPT_125M, generating(100), H100)
    assert everything_fits.kv == everything_on("gpu") and everything_fits.host_attention == 0
    model = CostModel(shape=OPT_125M, workload=generating(100), hardware=replace(H100, **LAPTOP_DISK))
    for tier in (Tier.GPU, Tier.DISK):
        policy = Policy(kv=everything_on(tier))
        assert model.cost(policy).lanes == model.cost(replace(policy, host_attention=1.0)).lanes


def test_the_search_has_the_cpu_attend_where_that_is_faster():
    work = generating(1024)
    found = search(OPT_30B, work, H100)
    assert found.host_attention > 0
    slow_cpu = replace(H100, host_attention_bytes_per_s=1e9)
    assert search(OPT_30B, work, slow_cpu).host_attention < 0.1
    alone = search(OPT_30B, work, replace(H100, host_attention_bytes_per_s=0))
    model = CostModel(shape=OPT_30B, workload=work, hardware=H100)
    assert model.cost(found).total_s < 0.9 * model.cost(alone).total_s


@pytest.mark.parametrize("work", [generating(100), scoring(100), MIXED])
def test_what_fits_stays_on_the_compute_device(work):
    big_gpu = replace(T4, gpu_bytes=80 * 10**9)
    for machine in (big_gpu, LAPTOP, replace(LAPTOP, **LAPTOP_DISK)):
        policy = search(OPT_125M, work, machine)
        assert policy.weights == policy.kv == policy.hidden == everything_on(machine.home)


def test_cpu_device_spills_to_disk_what_does_not_fit():
    machine = replace(LAPTOP, **LAPTOP_DISK)
    policy = search(OPT_30B, MIXED, machine)
    assert policy.weights.gpu == policy.kv.gpu == policy.hidden.gpu == 0
    assert 0 < policy.weights.cpu < 0.3
    assert policy.weights.disk > 0.7


def test_scoring_reads_streamed_weights_few_times():
    policy = search(OPT_30B, scoring(1000), T4)
    model = CostModel(shape=OPT_30B, workload=scoring(1000), hardware=T4)
    lanes = model.cost(policy).lanes["prefill"]
    assert policy.weights.cpu > 0.5
    assert lanes[Lane.COMPUTE] == max(lanes.values())  # weights stream behind the arithmetic


@pytest.mark.parametrize("machine", [T4, LAPTOP])
def test_equal_input_gives_equal_answer(machine):
    answers = [search(OPT_125M, MIXED, replace(machine, cpu_bytes=16 * 10**9)) for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0].to_json() == answers[1].to_json()


def test_search_never_exceeds_a_tier():
    for gpu_gb, cpu_gb in [(8, 200), (24, 61)]:
        machine = replace(T4, gpu_bytes=gpu_gb * 10**9, cpu_bytes=cpu_gb * 10**9, disk_bytes=0)
        policy = search(OPT_30B, generating(200), machine)
        check(policy, OPT_30B, generating(200), machine)


def test_a_lone_tier_needs_no_program_and_gets_what_one_would_give(monkeypatch):
    model = CostModel(shape=OPT_125M, workload=MIXED, hardware=replace(LAPTOP, cpu_bytes=3 * 10**9))
    every_tenth = list(_grid(model))[::10]
    direct = [(least_seconds(model, sizes), best_placement(model, sizes)) for sizes in every_tenth]
    assert {bound is None for bound, _ in direct} == {True, False}, "some fit, and some do not"
    monkeypatch.setattr("flexeval.policy.program._is_home_alone", lambda model: False)
    for sizes, (bound, policy) in zip(every_tenth, direct, strict=True):
        assert least_seconds(model, sizes) == (None if bound is None else pytest.approx(bound, rel=1e-6))
        assert best_placement(model, sizes) == policy


def test_cbc_takes_over_where_highs_is_missing(monkeypatch):
    model, sizes = small_instance(0)
    with_highs = model.cost(best_placement(model, sizes)).objective_s
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    assert not pulp.HiGHS().available()
    assert model.cost(best_placement(model, sizes)).objective_s == pytest.approx(with_highs, rel=2e-4)


def test_solver_prints_nothing(capfd):
    model, sizes = small_instance(0)
    best_placement(model, sizes)
    assert capfd.readouterr() == ("", "")


def test_solver_is_bounded(monkeypatch):
    used = {}
    solve = pulp.LpProblem.solve

    def record(problem, solver):
        used["seconds"] = solver.timeLimit
        return solve(problem, solver)

    monkeypatch.setattr(pulp.LpProblem, "solve", record)
    model, sizes = small_instance(0)
    best_placement(model, sizes)
    assert 0 < used["seconds"] <= 5
