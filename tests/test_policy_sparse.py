"""A sparse setting in the cost model: values that stay, a CPU that does not attend, memory for the choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from policy_cases import LAPTOP, LAPTOP_DISK, OPT_30B, T4, generating

from flexeval.config import SparseMethod, Sparsity
from flexeval.errors import ConfigError
from flexeval.policy.cost import Cost, CostModel, Lane
from flexeval.policy.hardware import Hardware
from flexeval.policy.policy import Policy, Split, Tier, check_sparse
from flexeval.policy.search import search
from flexeval.policy.sparse import GATHERED_NUMBERS, SHEET_SCORES, fetched_share, num_kept
from flexeval.policy.work import ModelShape

TOP10 = Sparsity(method=SparseMethod.TOPK, percent=10)
QUEST10 = Sparsity(method=SparseMethod.QUEST, percent=10)
WORK = generating(64)
POLICY = Policy(weights=Split(gpu=1.0), hidden=Split(gpu=1.0), group_sequences=64)


def under(sparsity: Sparsity | None, shape: ModelShape = OPT_30B) -> ModelShape:
    return replace(shape, sparsity=sparsity, value_bytes_per_token=shape.kv_bytes_per_token // 2)


def cost_of(shape: ModelShape, policy: Policy = POLICY, machine: Hardware = T4) -> Cost:
    return CostModel(shape=shape, workload=WORK, hardware=machine).cost(policy)


def test_the_share_of_a_context_that_a_query_keeps() -> None:
    assert [num_kept(TOP10, n) for n in (1, 10, 11, 528)] == [1, 1, 2, 53]
    assert [num_kept(QUEST10, n) for n in (1, 100, 160, 161, 528)] == [1, 8.5, 8.5, 24.5, 56.5]
    assert fetched_share(TOP10, 500, heads_per_kv=1) == pytest.approx(0.1)
    assert fetched_share(TOP10, 500, heads_per_kv=4) == pytest.approx(1 - 0.9**4)


def test_keys_and_a_tenth_of_the_values_cross_the_link() -> None:
    dense, sparse = (cost_of(under(sparsity)).lanes["decode"][Lane.TO_GPU] for sparsity in (None, TOP10))
    assert sparse == pytest.approx(dense * (1 + num_kept(TOP10, 528) / 528) / 2)


@pytest.mark.parametrize("machine", [T4, replace(LAPTOP, **LAPTOP_DISK)])
def test_a_disk_is_read_whole(machine: Hardware) -> None:
    policy = replace(POLICY, kv=Split(disk=1.0), weights=Split(cpu=1.0), hidden=Split(cpu=1.0))
    dense, sparse = (cost_of(under(sparsity), policy, machine).lanes["decode"] for sparsity in (None, TOP10))
    lanes = (Lane.DISK_READ, Lane.DISK_WRITE, Lane.TO_GPU)
    assert [sparse.get(lane) for lane in lanes] == [dense.get(lane) for lane in lanes]


def test_the_computation_waits_for_chosen_values_and_writes_scores_out() -> None:
    at_home = replace(POLICY, kv=Split(gpu=1.0))
    dense, sparse = (cost_of(under(sparsity), at_home).lanes["decode"] for sparsity in (None, TOP10))
    far = cost_of(under(TOP10)).lanes["decode"]
    assert sparse[Lane.COMPUTE] > dense[Lane.COMPUTE]
    values_s = far[Lane.TO_GPU] * num_kept(TOP10, 528) / (528 + num_kept(TOP10, 528))
    assert far[Lane.COMPUTE] - sparse[Lane.COMPUTE] == pytest.approx(values_s)


def test_the_cpu_is_never_asked_to_attend() -> None:
    machine = replace(T4, host_attention_bytes_per_s=50e9)
    for sparsity, is_asked in ((None, True), (TOP10, False)):
        model = CostModel(shape=under(sparsity), workload=WORK, hardware=machine)
        assert model.can_attend_on_host is is_asked
        assert (Lane.HOST_ATTENTION in model.cost(POLICY).lanes["decode"]) is is_asked
    check_sparse(search(under(TOP10), generating(256), machine))
    with pytest.raises(ConfigError, match=r"host_attention=0\.25 .*Set host_attention to 0"):
        check_sparse(replace(POLICY, host_attention=0.25))


def test_memory_for_the_choice_is_bounded() -> None:
    sizes = [replace(POLICY, row_tokens=tokens) for tokens in (1, 2**15)]
    shapes = under(None), replace(under(TOP10), decode_copies=1)
    small, large = (
        cost_of(shapes[1], policy).peak_bytes[Tier.GPU] - cost_of(shapes[0], policy).peak_bytes[Tier.GPU]
        for policy in sizes
    )
    assert 0 < small < large == 32 * SHEET_SCORES + 12 * GATHERED_NUMBERS
