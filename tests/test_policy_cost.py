"""The cost model against FlexGen's formulas written out by hand, and against what must hold of any such model."""

from dataclasses import replace

import pytest
from policy_cases import LAPTOP, LAPTOP_DISK, MIXED, OPT_6_7B, OPT_30B, OPT_125M, T4, generating, opt, scoring

from flexeval.config import Setting
from flexeval.policy.computing import (
    KERNELS_PER_CALL,
    OPERATIONS_PER_RECORDED_STEP,
    OPERATIONS_PER_STEP,
    OPERATIONS_PER_SWEEP,
    OPERATIONS_TO_RECORD,
    OTHERS_POWER,
    PACKED_EXPERTS_RATE,
    PACKED_RATE,
    RECORDED_KERNEL_S,
    attention_seconds,
    product_seconds,
)
from flexeval.policy.cost import HOST_WAIT_SHARE, OPERATIONS_PER_HOST_ROW, OPERATIONS_PER_LOAD, CostModel, Lane
from flexeval.policy.hardware import Hardware
from flexeval.policy.policy import Policy, Split, Tier
from flexeval.policy.room import ATTENTION_COPIES, HIDDEN_COPIES, call_bytes_per_token
from flexeval.policy.sweeps import plan_sweeps
from flexeval.policy.work import ModelShape, Workload

FLEXGEN_30B = Policy(
    weights=Split(gpu=0.2, cpu=0.8),
    kv=Split(cpu=1.0),
    hidden=Split(cpu=1.0),
    row_tokens=8192,
    sweep_tokens=144 * 512,
    group_sequences=48,
    num_groups=3,
)
"""FlexGen's published policy (table 2 and appendix): 20/80, 0/100, 0/100, 48 x 3."""
TOPK = Setting.parse("topk10").sparsity
UNRECORDED_S = (OPERATIONS_PER_STEP - OPERATIONS_PER_RECORDED_STEP) * T4.launch_s
"""What Python takes longer for a row that decodes at a layer whose launches are not recorded, ..."""
LAUNCHED_S = KERNELS_PER_CALL * (T4.launch_s - RECORDED_KERNEL_S)
"""... and the GPU."""


def cost_of(policy: Policy, shape: ModelShape, workload: Workload, hardware: Hardware):
    return CostModel(shape=shape, workload=workload, hardware=hardware).cost(policy)


def test_lanes_are_flexgens_formulas():
    # Sheng et al., section 4.3 and appendix A.3: s prompt tokens, n generated, l layers, b sequences, h1 and h2 widths.
    s, n, l, b, h1, h2 = 512, 32, 48, 144, 7168, 4 * 7168  # noqa: E741
    layer = 8 * h1**2 + 4 * h1 * h2
    on_gpu = 10  # 0.2 * 48 layers, rounded
    cost = cost_of(FLEXGEN_30B, OPT_30B, generating(b, s, n), T4)
    prefill, decode = cost.lanes["prefill"], cost.lanes["decode"]
    hidden = 2 * h1 * b * l
    assert prefill[Lane.TO_GPU] * 12e9 == pytest.approx(layer * (l - on_gpu) + hidden * s)
    assert prefill[Lane.FROM_GPU] * 12e9 == pytest.approx(4 * s * h1 * b * l + hidden * s)
    assert decode[Lane.TO_GPU] * 12e9 == pytest.approx(
        (n - 1) * (layer * (l - on_gpu) + 4 * b * (s + n / 2) * h1 * l)
    )  # unlike FlexGen's, hidden states of rows that decode stay on the GPU
    assert decode[Lane.FROM_GPU] * 12e9 == pytest.approx((n - 1) * 4 * b * h1 * l)
    assert prefill[Lane.DISK_READ] == prefill[Lane.DISK_WRITE] == decode[Lane.DISK_READ] == 0
    flops = b * l * (8 * s * h1**2 + 4 * s * h1 * h2 + 4 * s**2 * h1)
    assert prefill[Lane.COMPUTE] == pytest.approx(flops / 21.24e12, rel=0.05)  # memory and launches are little here
    assert prefill[Lane.COMPUTE] > flops / 21.24e12
    assert cost.total_s == pytest.approx(max(prefill.values()) + max(decode.values()))


def test_weights_come_once_for_a_sweep_that_scores_and_decodes():
    """What only scores comes last, while long texts are still continued: 40 of the 60 sweeps with prompts."""
    policy = replace(FLEXGEN_30B, row_tokens=1000, sweep_tokens=1200, group_sequences=100, num_groups=1)
    work = replace(MIXED, num_prompt_tokens=72_000, num_scoring_tokens=48_000)
    sweeps = plan_sweeps(policy, work)
    assert sweeps["prefill"].num_sweeps == 60 and sweeps["decode"].num_sweeps == 399
    cost = cost_of(policy, OPT_30B, work, T4)
    num_kv = 399 * sweeps["decode"].num_kv_read
    kv_bytes = num_kv * OPT_30B.kv_bytes_per_token * 48
    weight_bytes = (399 - 40) * 38 * OPT_30B.layer_bytes
    assert cost.lanes["decode"][Lane.TO_GPU] * 12e9 == pytest.approx(weight_bytes + kv_bytes)
    alone = cost_of(policy, OPT_30B, replace(work, num_scoring_tokens=0), T4)
    assert alone.lanes["decode"][Lane.TO_GPU] > cost.lanes["decode"][Lane.TO_GPU]


def test_disk_shares_cross_both_links():
    policy = replace(FLEXGEN_30B, weights=Split(cpu=0.5, disk=0.5), kv=Split(disk=1.0), hidden=Split(disk=1.0))
    on_cpu = cost_of(replace(policy, weights=Split(cpu=1.0)), OPT_30B, generating(144), T4).lanes["decode"]
    lanes = cost_of(policy, OPT_30B, generating(144), T4).lanes["decode"]
    assert lanes[Lane.TO_GPU] == on_cpu[Lane.TO_GPU]
    layer_reads_s = 31 * 24 * OPT_30B.layer_bytes / T4.disk_read_bytes_per_s
    assert lanes[Lane.DISK_READ] - on_cpu[Lane.DISK_READ] == pytest.approx(layer_reads_s)
    assert lanes[Lane.DISK_WRITE] == pytest.approx(lanes[Lane.FROM_GPU] * 12)


def test_what_the_cpu_attends_to_does_not_cross_the_link():
    """Each row that it attends for takes it a while beside its reading."""
    machine = replace(T4, host_attention_bytes_per_s=10e9)
    half = replace(FLEXGEN_30B, kv=Split(gpu=0.25, cpu=0.5, disk=0.25), host_attention=0.5)
    policies = (replace(half, host_attention=0.0), half)
    by_link, shared = (cost_of(policy, OPT_30B, generating(144), machine) for policy in policies)
    host_bytes = 31 * 12 * 144 * (512 + 16) * OPT_30B.kv_bytes_per_token  # half of the 24 layers on the cpu
    lanes = shared.lanes["decode"]
    assert (by_link.lanes["decode"][Lane.TO_GPU] - lanes[Lane.TO_GPU]) * 12e9 == pytest.approx(host_bytes)
    rows_s = 31 * 12 * 3 * OPERATIONS_PER_HOST_ROW * T4.launch_s  # three groups of 48
    assert lanes[Lane.HOST_ATTENTION] == pytest.approx(host_bytes / 10e9 + rows_s)
    assert by_link.lanes["decode"][Lane.HOST_ATTENTION] == shared.lanes["prefill"][Lane.HOST_ATTENTION] == 0
    for lane in (Lane.COMPUTE, Lane.FROM_GPU, Lane.DISK_READ, Lane.DISK_WRITE):
        assert lanes[lane] == by_link.lanes["decode"][lane]
    one_more_slab = {Tier.GPU: OPT_30B.layer_bytes, Tier.CPU: 0, Tier.DISK: 0}
    assert {tier: peak - by_link.peak_bytes[tier] for tier, peak in shared.peak_bytes.items()} == one_more_slab


def test_what_sequences_share_crosses_the_link_where_the_cpu_attends() -> None:
    """It reads their own contexts; a header is brought once for all of the nine calls."""
    machine, own, header = replace(T4, host_attention_bytes_per_s=10e9), 64, 512
    work = replace(generating(144, own), num_prompt_tokens=header + 144 * own, mean_context_tokens=header + own)
    work = replace(work, num_shared_tokens=header)
    policy = Policy(
        weights=Split(gpu=1.0),
        kv=Split(cpu=1.0),
        group_sequences=16,
        num_groups=9,
        sweep_tokens=10**6,
        host_attention=1,
    )
    decode = plan_sweeps(policy, work)["decode"]
    assert 9 * header * 0.98 < decode.num_kv_read - decode.num_own_read < 9 * header
    lanes, layer_bytes = cost_of(policy, OPT_30B, work, machine).lanes["decode"], 48 * OPT_30B.kv_bytes_per_token
    assert lanes[Lane.TO_GPU] * machine.to_gpu_bytes_per_s == pytest.approx(31 * header * layer_bytes)
    rows_s = 31 * 48 * 9 * OPERATIONS_PER_HOST_ROW * T4.launch_s
    own_bytes = 31 * decode.num_own_read * layer_bytes
    assert lanes[Lane.HOST_ATTENTION] == pytest.approx(own_bytes / 10e9 + rows_s)


@pytest.mark.parametrize("host_bytes_per_s", [10e9, 1e9])
def test_the_cpu_and_the_link_hinder_each_other(host_bytes_per_s: float):
    """Copies are slower while the CPU reads the same memory; and the CPU waits for what the link brings."""
    machine = replace(T4, host_attention_bytes_per_s=host_bytes_per_s, attended_link_share=0.8)
    half = replace(FLEXGEN_30B, kv=Split(gpu=0.5, cpu=0.5), host_attention=0.5)
    cost = cost_of(half, OPT_30B, generating(144), machine)
    lanes = cost.lanes["decode"]
    link_s, host_s = lanes[Lane.TO_GPU], lanes[Lane.HOST_ATTENTION]
    is_link_longest = host_bytes_per_s == 10e9
    assert link_s > host_s > 0 if is_link_longest else host_s > link_s > 0
    longest_s = link_s + 0.2 * host_s if is_link_longest else host_s + HOST_WAIT_SHARE * link_s
    assert cost.phase_s["decode"] == pytest.approx(longest_s)
    assert cost.total_s == sum(cost.phase_s.values())


@pytest.mark.parametrize("machine", [T4, replace(LAPTOP, host_attention_bytes_per_s=10e9)])
def test_the_cpu_attends_only_beside_a_gpu_that_has_one(machine):
    policy = Policy(host_attention=1.0)
    alone = cost_of(replace(policy, host_attention=0.0), OPT_125M, generating(4), machine)
    assert cost_of(policy, OPT_125M, generating(4), machine).lanes == alone.lanes
    assert Lane.HOST_ATTENTION not in alone.lanes["decode"]


def test_sequences_that_decode_keep_their_hidden_states_on_the_device():
    one, three = (
        cost_of(replace(FLEXGEN_30B, num_groups=num_groups), OPT_30B, generating(144), T4).peak_bytes
        for num_groups in (1, 3)
    )
    assert three[Tier.GPU] - one[Tier.GPU] == 2 * FLEXGEN_30B.group_sequences * OPT_30B.hidden_bytes_per_token


def test_equal_lengths_take_n_minus_1_sweeps_a_block():
    policy = Policy(group_sequences=4, num_groups=3, sweep_tokens=10**6)
    sweeps = plan_sweeps(policy, generating(60, 100, 8))
    assert (sweeps["prefill"].num_sweeps, sweeps["prefill"].num_tokens) == (5, 1200)
    assert (sweeps["decode"].num_sweeps, sweeps["decode"].num_tokens, sweeps["decode"].num_calls) == (35, 12, 3)


def test_refill_ends_with_the_longest_sequence():
    work = replace(generating(10, 100, 8), num_generated_tokens=10 + 99, max_generated_tokens=100)
    decode = plan_sweeps(Policy(group_sequences=10), work)["decode"]
    assert decode.num_sweeps == 99
    assert decode.num_sweeps * decode.num_tokens == pytest.approx(99)


def test_every_token_is_computed_once():
    policy = Policy(row_tokens=512, sweep_tokens=7000, group_sequences=8, num_groups=2)
    sweeps = plan_sweeps(policy, MIXED)
    assert sweeps["prefill"].num_sweeps * sweeps["prefill"].num_tokens == pytest.approx(60_000)
    assert sweeps["prefill"].num_sweeps * sweeps["prefill"].num_kv_written == pytest.approx(20_000)
    assert sweeps["decode"].num_sweeps * sweeps["decode"].num_tokens == pytest.approx(20_000 - 100)


def test_scoring_keeps_no_kv():
    policy = Policy(weights=Split(gpu=1.0), kv=Split(cpu=1.0), hidden=Split(gpu=1.0), sweep_tokens=10**6)
    cost = cost_of(policy, OPT_125M, scoring(100), T4)
    assert list(cost.lanes) == ["prefill"]
    assert cost.lanes["prefill"][Lane.FROM_GPU] == 0
    assert cost.peak_bytes[Tier.CPU] == 0


def test_many_groups_of_one_cost_more_than_one_group_of_many():
    one = cost_of(replace(FLEXGEN_30B, group_sequences=1, num_groups=144), OPT_30B, generating(144), T4)
    many = cost_of(replace(FLEXGEN_30B, group_sequences=144, num_groups=1), OPT_30B, generating(144), T4)
    weight_reads_s = 31 * 48 * 143 * OPT_30B.layer_compute_bytes / T4.memory_bytes_per_s
    excess_s = one.lanes["decode"][Lane.COMPUTE] - many.lanes["decode"][Lane.COMPUTE]
    assert excess_s > weight_reads_s
    read_s = 144 * (512 + 16) * OPT_30B.kv_bytes_per_token / T4.to_gpu_bytes_per_s
    waiting_s = 31 * 48 * (144 * OPERATIONS_PER_LOAD * T4.launch_s - read_s)
    assert waiting_s > 0
    assert one.lanes["decode"][Lane.TO_GPU] - many.lanes["decode"][Lane.TO_GPU] == pytest.approx(waiting_s)


def test_cpu_device_has_no_link():
    policy = Policy(weights=Split(cpu=0.5, disk=0.5))
    lanes = cost_of(policy, OPT_125M, generating(4), replace(LAPTOP, **LAPTOP_DISK)).lanes["decode"]
    assert set(lanes) == {Lane.COMPUTE, Lane.DISK_READ, Lane.DISK_WRITE}
    assert lanes[Lane.DISK_READ] == pytest.approx(31 * 6 * OPT_125M.layer_bytes / 2e9)
    assert set(cost_of(Policy(), OPT_125M, generating(4), LAPTOP).lanes["decode"]) == {Lane.COMPUTE}


def test_few_tokens_read_packed_weights_as_they_rest():
    """16 sequences decode; the kernel reads 4.5 bits a weight instead of writing and reading 16 more."""
    unpacked = opt(48, 7168, 56, weight_bits=4.5)
    as_it_rests = replace(unpacked, few_tokens=16)
    policy = replace(FLEXGEN_30B, group_sequences=16, num_groups=1)
    before, after = (cost_of(policy, shape, generating(16), T4) for shape in (unpacked, as_it_rests))
    unpacking_bytes = unpacked.layer_bytes + 2 * unpacked.layer_compute_bytes
    saved_s = 31 * 48 * (unpacking_bytes - unpacked.layer_bytes / PACKED_RATE) / T4.memory_bytes_per_s
    saved_s += 31 * 48 * (UNRECORDED_S + LAUNCHED_S)
    saved = before.lanes["decode"][Lane.COMPUTE] - after.lanes["decode"][Lane.COMPUTE]
    assert saved == pytest.approx(saved_s, rel=1e-6)
    assert before.lanes["prefill"] == after.lanes["prefill"]
    experts = cost_of(policy, replace(as_it_rests, num_experts=2, experts_per_token=2), generating(16), T4)
    more_s = 31 * 48 * unpacked.layer_bytes * (1 / PACKED_EXPERTS_RATE - 1 / PACKED_RATE) / T4.memory_bytes_per_s
    assert experts.lanes["decode"][Lane.COMPUTE] - after.lanes["decode"][Lane.COMPUTE] == pytest.approx(more_s)


def test_a_short_sweep_moves_and_reads_only_the_experts_its_tokens_choose():
    """Nine tenths of a layer are 64 experts, of which a token meets 8: 4 tokens meet 41 % of them, 16 too many."""
    dense, unpacked = OPT_30B, opt(48, 7168, 56, weight_bits=4.5)
    policy = replace(FLEXGEN_30B, weights=Split(cpu=1.0), group_sequences=16, num_groups=1)
    for shape in (dense, unpacked):
        experts = replace(shape, num_experts=64, experts_per_token=8, expert_share=0.9)
        for num_sequences, is_short in ((4, True), (16, False)):
            whole, by_need = (cost_of(policy, one, generating(num_sequences), T4) for one in (shape, experts))
            unmet = 0.9 * (1 - 8 / 64) ** num_sequences
            moved = [cost.lanes["decode"][Lane.TO_GPU] * T4.to_gpu_bytes_per_s for cost in (whole, by_need)]
            saved_bytes = 31 * 48 * shape.layer_bytes * unmet if is_short else 0
            assert moved[0] - moved[1] == pytest.approx(saved_bytes)
            read_bytes = 31 * 48 * shape.layer_compute_bytes * unmet
            if shape.is_packed and is_short:
                read_bytes += 31 * 48 * (shape.layer_bytes + shape.layer_compute_bytes) * unmet
            saved_s = whole.lanes["decode"][Lane.COMPUTE] - by_need.lanes["decode"][Lane.COMPUTE]
            waits = is_short and not shape.is_packed  # what is unpacked is not recorded anyway
            waited_s = 31 * 48 * UNRECORDED_S if waits else 0
            assert saved_s == pytest.approx(read_bytes / T4.memory_bytes_per_s - waited_s)
            assert whole.peak_bytes[Tier.CPU] == by_need.peak_bytes[Tier.CPU], "all rest somewhere"


def test_a_token_is_copied_for_each_expert_that_it_meets():
    dense = replace(OPT_30B, intermediate_size=4096)
    mixture = replace(dense, num_experts=64, experts_per_token=8, expert_share=0.9)
    dense_bytes, bytes_of_mixture = call_bytes_per_token(dense), call_bytes_per_token(mixture)
    assert dense_bytes == ATTENTION_COPIES * 7168 * 2
    assert bytes_of_mixture == (HIDDEN_COPIES * 7168 + 8 * 7168 + 2 * 4096) * 2


def test_packed_weights_move_less_and_unpack_once_a_layer():
    packed = opt(48, 7168, 56, weight_bits=4.5)
    plain, w4 = (cost_of(FLEXGEN_30B, shape, generating(144), T4) for shape in (OPT_30B, packed))
    saved_bytes = 31 * 38 * (OPT_30B.layer_bytes - packed.layer_bytes)
    lanes = plain.lanes["decode"], w4.lanes["decode"]
    assert (lanes[0][Lane.TO_GPU] - lanes[1][Lane.TO_GPU]) * 12e9 == pytest.approx(saved_bytes)
    unpack_s = 31 * 48 * (packed.layer_bytes + packed.layer_compute_bytes) / T4.memory_bytes_per_s
    unrecorded_s = 31 * 48 * 3 * (UNRECORDED_S + LAUNCHED_S)  # groups of 48
    assert lanes[1][Lane.COMPUTE] - lanes[0][Lane.COMPUTE] == pytest.approx(unpack_s + unrecorded_s)
    saved_room = 12 * (OPT_30B.layer_bytes - packed.layer_bytes)  # ten layers and two buffers
    assert plain.peak_bytes[Tier.GPU] - w4.peak_bytes[Tier.GPU] == saved_room - packed.layer_compute_bytes


def test_peak_bytes_are_what_rests_there_and_two_buffers():
    work = generating(144)
    everything_home = Policy(weights=Split(gpu=1.0), kv=Split(gpu=1.0), hidden=Split(gpu=1.0), row_tokens=512)
    home = cost_of(everything_home, OPT_30B, work, T4).peak_bytes
    assert home[Tier.CPU] == home[Tier.DISK] == 0
    weights_away = cost_of(replace(everything_home, weights=Split(cpu=1.0)), OPT_30B, work, T4).peak_bytes
    assert weights_away[Tier.CPU] == 48 * OPT_30B.layer_bytes
    assert home[Tier.GPU] - weights_away[Tier.GPU] == 46 * OPT_30B.layer_bytes
    on_disk = cost_of(replace(everything_home, weights=Split(disk=1.0)), OPT_30B, work, T4).peak_bytes
    assert on_disk[Tier.DISK] == 48 * OPT_30B.layer_bytes
    assert on_disk[Tier.CPU] == 2 * OPT_30B.layer_bytes
    assert on_disk[Tier.GPU] == weights_away[Tier.GPU]
    kv_away = cost_of(replace(everything_home, kv=Split(cpu=1.0)), OPT_30B, work, T4).peak_bytes
    assert kv_away[Tier.CPU] == 48 * 16 * 544 * OPT_30B.kv_bytes_per_token  # one group of 16 is in flight
    assert home[Tier.GPU] - kv_away[Tier.GPU] == 46 * 16 * 544 * OPT_30B.kv_bytes_per_token


def test_shared_prefixes_are_stored_once():
    alone = generating(64)
    shared = replace(alone, num_shared_tokens=500, max_own_tokens=44, num_prompt_tokens=500 + 64 * 12)
    policy = Policy(kv=Split(cpu=1.0), group_sequences=64)
    stored = [cost_of(policy, OPT_30B, work, LAPTOP).peak_bytes[Tier.CPU] for work in (alone, shared)]
    assert stored[0] - stored[1] > 48 * OPT_30B.kv_bytes_per_token * (64 * 544 - (500 + 64 * 44)) * 0.99


def test_descendants_keep_one_layer_of_their_ancestors_on_the_device():
    alone = scoring(100)
    tree = replace(alone, mean_context_tokens=700.0)  # more is attended to than is computed: prefixes are shared
    policy = Policy(weights=Split(gpu=1.0), kv=Split(gpu=1.0), hidden=Split(gpu=1.0), sweep_tokens=4096)
    flat, deep = (cost_of(policy, OPT_125M, work, T4).peak_bytes[Tier.GPU] for work in (alone, tree))
    assert deep - flat == 4096 * OPT_125M.kv_bytes_per_token


@pytest.mark.parametrize("num_copies", [0, 1, 5])
def test_decode_attention_has_room_for_its_copies(num_copies: int):
    policy = Policy(weights=Split(cpu=1.0), kv=Split(disk=1.0), hidden=Split(cpu=1.0), group_sequences=8)
    gathered_bytes = 8 * 544 * OPT_125M.kv_bytes_per_token
    hardware = replace(LAPTOP, **LAPTOP_DISK)
    shapes = replace(OPT_125M, decode_copies=num_copies), replace(OPT_125M, decode_copies=0)
    with_copies, without = (cost_of(policy, shape, generating(8), hardware).peak_bytes for shape in shapes)
    assert with_copies[Tier.CPU] - without[Tier.CPU] == num_copies * gathered_bytes


def test_a_shared_prefix_is_read_once_a_call():
    own, header = 12, 500
    shared = replace(generating(64, own), num_prompt_tokens=header + 64 * own, mean_context_tokens=header + own)
    policy = Policy(group_sequences=16, num_groups=4, sweep_tokens=10**6)
    read = plan_sweeps(policy, shared)["decode"].num_kv_read
    least = 64 * (own + 16) + 4 * header
    assert least <= read <= least + header, "it is stored once as well, which counts with the sequences"
    assert plan_sweeps(policy, generating(64, own))["decode"].num_kv_read == 64 * (own + 16)


def test_products_take_what_was_measured_with_one_token_and_with_few():
    """Between them lies a line; further tokens are multiplied at the peak rate."""
    one, few, some, many = (product_seconds(LAPTOP, tokens, 1e6, num_bytes=2e6) for tokens in (1, 16, 8.5, 1016))
    assert (one, few) == pytest.approx((2e6 / 20e9, 2e6 / 10e9))
    assert some == pytest.approx((one + few) / 2)
    assert many - few == pytest.approx(2 * 1e6 * 1000 / 0.1e12)


def test_a_step_on_the_gpu_alone_is_one_recording_where_there_can_be_one():
    """Where there is none, everything is launched one by one wherever it rests; where keys are chosen, halves are."""
    work, everything = generating(48), Split(gpu=1.0)
    policy = Policy(weights=everything, kv=everything, hidden=everything, group_sequences=48)
    alone = opt(8, 1024, 16)
    slow = replace(T4, launch_s=10 * T4.launch_s)
    for shape, num_operations in (
        (alone, OPERATIONS_TO_RECORD / 31),
        (replace(alone, is_recordable=False), OPERATIONS_PER_STEP + KERNELS_PER_CALL),
        (
            replace(alone, sparsity=Setting.parse("topk10").sparsity, value_bytes_per_token=2048),
            OPERATIONS_PER_RECORDED_STEP,
        ),
    ):
        one, other = (cost_of(policy, shape, work, hardware).lanes["decode"][Lane.COMPUTE] for hardware in (T4, slow))
        launches = (other - one) / (31 * 8 * 9 * T4.launch_s)
        assert launches == pytest.approx(num_operations + OPERATIONS_PER_SWEEP / 8, rel=0.01)


def test_a_gpu_at_its_limit_of_power_takes_as_long_as_the_energy_of_all():
    """What comes between products takes time of its own where they are no faster for the rest that it is."""
    work, policy = scoring(256, 512), replace(FLEXGEN_30B, row_tokens=4096)
    products_s = 48 * 2 * OPT_30B.layer_params * (256 * 512 - 32 * 16) / T4.flops_per_s  # of 32 calls of 4,096 tokens

    def seconds(**rates: float) -> float:
        return cost_of(policy, OPT_30B, work, replace(T4, **rates)).lanes["prefill"][Lane.COMPUTE]

    others_s = seconds() - products_s
    assert 0 < others_s < 0.1 * products_s
    assert seconds(cold_speedup=1.02) == pytest.approx(products_s / 1.02 + others_s)
    assert seconds(cold_speedup=1.5) == pytest.approx(products_s + OTHERS_POWER * others_s)


def test_a_cpu_unpacks_a_layer_once_a_sweep_at_its_own_rate():
    """A model of packed weights, half as many of them unpacked in a second."""
    packed = replace(OPT_6_7B, layer_bytes=OPT_6_7B.layer_bytes // 4)
    policy, work = Policy(group_sequences=16), generating(32)

    def seconds(unpacked_per_s: float, phase: str) -> float:
        hardware = replace(LAPTOP, cpu_bytes=64 * 10**9, unpacked_per_s=unpacked_per_s)
        return cost_of(policy, packed, work, hardware).lanes[phase][Lane.COMPUTE]

    num_values = packed.num_layers * packed.layer_compute_bytes / packed.dtype_bytes
    for phase, plan in plan_sweeps(policy, work).items():
        assert seconds(1e9, phase) - seconds(2e9, phase) == pytest.approx(plan.num_sweeps * num_values / 2e9), phase


def test_a_layer_on_a_cpu_takes_its_operations_its_attention_and_python():
    """A rate that doubles saves half of the seconds that its formula gives."""
    work, shape = scoring(4, 100), replace(OPT_125M, num_layers=1)
    cost = {
        "elementwise_per_s": 400 * (8 + 3 + 2) * 768 / 2e9,
        "attention_flops_per_s": 4 * 768 * 4 * 100 * 101 / 2 / 0.05e12,
    }
    before = cost_of(Policy(), shape, work, LAPTOP).total_s
    for rate, seconds in cost.items():
        faster = replace(LAPTOP, **{rate: 2 * getattr(LAPTOP, rate)})
        assert before - cost_of(Policy(), shape, work, faster).total_s == pytest.approx(seconds / 2)
    slow = cost_of(Policy(), shape, work, replace(LAPTOP, launch_s=2 * LAPTOP.launch_s)).total_s
    assert slow - before == pytest.approx((OPERATIONS_PER_STEP + OPERATIONS_PER_SWEEP) * LAPTOP.launch_s)
    of_seven = cost_of(Policy(), replace(shape, num_matrices=7), work, LAPTOP).total_s
    assert of_seven - before == pytest.approx(7 * LAPTOP.product_s), "one call, and no product is free"


def test_attention_on_a_cpu_takes_its_parts_its_pairs_and_the_reading_of_keys():
    """A prompt's pairs are those seen; of a shared key that one call reads, the first query takes the longest."""
    prefill = plan_sweeps(Policy(), scoring(4, 100))["prefill"]
    pair_s = 4 * 64 / LAPTOP.attention_flops_per_s
    assert attention_seconds(OPT_125M, LAPTOP, prefill) == pytest.approx(
        12 * (4 * 100 * 101 / 2 * pair_s + 400 * LAPTOP.attention_part_s)
    )
    shared = replace(generating(8, 10), mean_context_tokens=100)
    decode = plan_sweeps(Policy(group_sequences=8), shared)["decode"]
    num_own, num_header = 8 * (10 + 16), 90
    assert (decode.num_kv_read, decode.num_parts) == (num_own + num_header, 16)
    single_s = 4 * 64 / LAPTOP.single_attention_flops_per_s
    assert attention_seconds(OPT_125M, LAPTOP, decode) == pytest.approx(
        12 * ((num_own + num_header) * single_s + 7 * num_header * pair_s + 16 * LAPTOP.attention_part_s)
    )
    on_gpu = attention_seconds(OPT_125M, T4, prefill)
    assert on_gpu == pytest.approx(12 * 4 * 100**2 * 4 * 64 / T4.attention_flops_per_s), "as FlexGen has it"


def test_logits_cost_their_head_and_what_is_read_off_them():
    few, many = scoring(4), replace(scoring(4), num_logits_rows=2_004)
    logits = 2_000 * OPT_125M.vocab_size

    def seconds(**wanted: bool) -> float:
        costs = [cost_of(Policy(), OPT_125M, replace(work, **wanted), LAPTOP).total_s for work in (few, many)]
        return (costs[1] - costs[0]) / logits

    head_s = 2 * OPT_125M.hidden_size / LAPTOP.flops_per_s
    assert seconds() == pytest.approx(head_s + 1 / LAPTOP.softmax_per_s, rel=0.02)  # the first rows are few
    assert seconds(has_top=True) - seconds() == pytest.approx(1 / LAPTOP.ranking_per_s)
    kept_s = 2 / LAPTOP.ranking_per_s + 3 / LAPTOP.elementwise_per_s
    assert seconds(is_kept=True) - seconds() == pytest.approx(kept_s)
