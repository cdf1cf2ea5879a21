"""Where memory ran out, the policy is made smaller: in what gives back most, and to an end."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import MIXED, OPT_6_7B, OPT_30B, T4, generating, scoring

from flexeval.policy.cost import CostModel
from flexeval.policy.policy import Policy, Split, Tier
from flexeval.policy.search import search
from flexeval.policy.splitting import LEAST_ROW_TOKENS, split, tell_split
from flexeval.policy.work import Workload

POLICY = Policy(row_tokens=2048, sweep_tokens=16384, group_sequences=16, num_groups=4)


def model(workload: Workload) -> CostModel:
    return CostModel(shape=OPT_6_7B, workload=workload, hardware=T4)


@pytest.mark.parametrize(
    ("policy", "workload", "full", "says"),
    [
        pytest.param(
            POLICY,
            scoring(1000),
            Tier.GPU,
            "rows of 1,024 tokens instead of 2,048, sweeps of 8,192 tokens instead of 16,384",
            id="what is computed",
        ),
        pytest.param(
            replace(POLICY, kv=Split(gpu=1.0)),
            generating(1000),
            Tier.GPU,
            "groups of 8 sequences instead of 16",
            id="keys and values on the gpu",
        ),
        pytest.param(POLICY, generating(1000), Tier.CPU, "2 groups at once instead of 4", id="the faster one"),
        pytest.param(
            replace(POLICY, kv=Split(disk=1.0), group_sequences=1),
            generating(1000),
            Tier.DISK,
            "2 groups at once instead of 4",
            id="groups of one",
        ),
        pytest.param(
            replace(POLICY, kv=Split(gpu=1.0), group_sequences=512),
            generating(100),
            Tier.GPU,
            "groups of 50 sequences instead of 512",
            id="more seats than sequences",
        ),
    ],
)
def test_what_gives_back_most_of_the_full_tier_is_halved(
    policy: Policy, workload: Workload, full: Tier, says: str
) -> None:
    smaller = split(policy, model(workload), full)
    assert smaller is not None
    assert tell_split(policy, smaller) == says
    assert model(workload).cost(smaller).peak_bytes[full] < model(workload).cost(policy).peak_bytes[full]


@settings(deadline=None, max_examples=40)
@given(
    row_tokens=st.integers(1, 20_000),
    sweep_tokens=st.integers(1, 200_000),
    group_sequences=st.integers(1, 5000),
    num_groups=st.integers(1, 20),
    workload=st.sampled_from([MIXED, generating(1), generating(77), scoring(40)]),
    full=st.sampled_from(list(Tier)),
)
def test_splitting_comes_to_an_end(full: Tier, workload: Workload, **sizes: int) -> None:
    policy, num_splits = Policy(**sizes, kv=Split(gpu=0.5, disk=0.5)), 0
    first = policy
    while (smaller := split(policy, model(workload), full)) is not None:
        assert all(getattr(smaller, name) <= getattr(policy, name) for name in sizes)
        assert (smaller.weights, smaller.kv, smaller.hidden) == (policy.weights, policy.kv, policy.hidden)
        assert tell_split(policy, smaller)
        policy, num_splits = smaller, num_splits + 1
    assert num_splits < 50
    first_bytes, last_bytes = (model(workload).cost(one).peak_bytes[full] for one in (first, policy))
    assert last_bytes <= first_bytes or not num_splits
    assert policy.row_tokens <= LEAST_ROW_TOKENS
    assert policy.sweep_tokens <= max(LEAST_ROW_TOKENS, workload.max_prompt_tokens)
    assert min(policy.block_sequences, workload.num_generating_sequences) <= 1


def test_a_policy_that_was_searched_splits_as_well() -> None:
    work = CostModel(shape=OPT_30B, workload=generating(200), hardware=T4)
    policy = search(work.shape, work.workload, work.hardware)
    smaller = split(policy, work, Tier.GPU)
    assert smaller is not None and work.cost(smaller).peak_bytes[Tier.GPU] < work.cost(policy).peak_bytes[Tier.GPU]


def test_rows_that_answers_depend_on_stay_as_they_are() -> None:
    policy, states = replace(POLICY, row_tokens=512), []
    while (smaller := split(policy, model(generating(1000)), Tier.GPU, keeps_rows=True)) is not None:
        states.append(smaller)
        policy = smaller
    assert {one.row_tokens for one in states} == {512}
    assert states[-1].block_sequences == 1 and states[-1].sweep_tokens == 512
