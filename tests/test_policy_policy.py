"""Splits add up and spread evenly; policies survive JSON; bad files and flags say what to mend."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexeval.errors import ConfigError
from flexeval.policy.policy import Policy, Split, Tier
from flexeval.policy.telling import tell_policy


@st.composite
def splits(draw):
    gpu, cpu, disk = draw(
        st.tuples(*[st.integers(0, 1000)] * 3).filter(any) | st.permutations([1, 0, 0]) | st.permutations([1, 2, 0])
    )
    total = gpu + cpu + disk
    return Split(gpu=gpu / total, cpu=cpu / total, disk=disk / total)


@given(splits(), st.integers(1, 200))
def test_spread_keeps_the_shares(split, num_items):
    tiers = split.spread(num_items)
    assert len(tiers) == num_items
    for tier in Tier:
        assert tiers.count(tier) == split.counts(num_items)[tier]
        assert abs(tiers.count(tier) - getattr(split, tier) * num_items) < 1 + 1e-6


@given(splits(), st.integers(1, 200))
def test_spread_is_even_over_the_depth(split, num_items):
    tiers = split.spread(num_items)
    for tier in Tier:
        share = tiers.count(tier) / num_items
        for depth in range(num_items + 1):
            assert abs(tiers[:depth].count(tier) - share * depth) <= 2


@given(st.integers(1, 120), st.data())
def test_whole_counts_come_back_exactly(num_items, data):
    gpu = data.draw(st.integers(0, num_items))
    cpu = data.draw(st.integers(0, num_items - gpu))
    disk = num_items - gpu - cpu
    split = Split(gpu=gpu / num_items, cpu=cpu / num_items, disk=disk / num_items)
    assert split.counts(num_items) == {Tier.GPU: gpu, Tier.CPU: cpu, Tier.DISK: disk}


def test_spread_by_example():
    assert Split(gpu=0.5, cpu=0.5).spread(4) == ["gpu", "cpu", "gpu", "cpu"]
    assert Split(gpu=0.2, cpu=0.8).spread(5) == ["cpu", "cpu", "gpu", "cpu", "cpu"]
    assert Split(cpu=1 / 3, disk=2 / 3).spread(1) == ["disk"]


@pytest.mark.parametrize(
    ("shares", "complaint"),
    [
        ({"gpu": 0.5, "cpu": 0.4}, "is 0.9"),
        ({"gpu": 1.5, "cpu": -0.5}, "gpu=1.5 is not a share"),
        ({"gpu": float("nan"), "cpu": 1.0}, "gpu=nan is not a share"),
        ({"cpu": "1"}, "cpu='1' is not a share"),
        ({"cpu": True}, "cpu=True is not a share"),
    ],
)
def test_split_refuses(shares, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Split(**shares)


@given(splits(), splits(), splits(), st.integers(1, 10**6), st.integers(1, 64), st.floats(0, 1))
def test_json_round_trip(weights, kv, hidden, tokens, count, host_attention):
    policy = Policy(
        weights=weights,
        kv=kv,
        hidden=hidden,
        row_tokens=tokens,
        sweep_tokens=2 * tokens,
        group_sequences=count,
        num_groups=count + 1,
        host_attention=host_attention,
    )
    assert Policy.from_json(json.loads(json.dumps(policy.to_json()))) == policy


def test_load(tmp_path):
    policy = Policy(weights=Split(gpu=0.25, cpu=0.75), num_groups=3)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy.to_json()))
    assert Policy.load(path) == policy


def _changed(**changes):
    return json.dumps(Policy().to_json() | changes)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "cannot read a policy"),
        ("[]", "not a policy: has list"),
        ("{}", "not a policy: has \\[\\]"),
        (_changed(gpu=1), "not a policy"),
        (_changed(weights=0.5), "weights=0.5 is not a split"),
        (_changed(weights={"tape": 1}), "is not a split"),
        (_changed(kv={"gpu": 0.5}), "is 0.5"),
        (_changed(kv={}), "is 0 "),
        (_changed(num_groups=0), "num_groups=0"),
        (_changed(row_tokens=1.5), "row_tokens=1.5"),
        (_changed(row_tokens="many"), "row_tokens='many'"),
        (_changed(host_attention=1.5), "host_attention=1.5 is not a share"),
        (_changed(host_attention=True), "host_attention=True is not a share"),
        (_changed(host_attention="0.5"), "host_attention='0.5' is not a share"),
    ],
)
def test_bad_file_is_named(tmp_path, text, complaint):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        Policy.load(path)
    assert str(path) in str(caught.value)
    assert caught.value.mend


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        Policy.load(tmp_path / "absent.json")


def test_parse():
    policy = Policy.parse("gpu-weights=0.2, disk-weights=0.3,cpu-kv=1,num-groups=3,row_tokens=512,host-attention=0.5")
    assert policy.weights == Split(gpu=0.2, cpu=0.5, disk=0.3)
    assert policy.kv == policy.hidden == Split(cpu=1.0)
    assert (policy.num_groups, policy.row_tokens, policy.host_attention) == (3, 512, 0.5)
    assert policy.group_sequences == Policy().group_sequences
    assert Policy.parse("") == Policy()


@pytest.mark.parametrize(
    "text",
    [
        "gpu-weights",
        "gpu-weights=much",
        "gpu-weights=1.5",
        "gpu-weights=nan",
        "gpu-weights=0.7,disk-weights=0.7",
        "gpu-weights=0.5,cpu-weights=0.2",
        "gpu-weights=0.5,gpu-weights=0.5",
        "tape-weights=1",
        "gpu-heads=1",
        "num-groups=0",
        "num-groups=2,num_groups=3",
        "group-sequences=1.5",
        "host-attention=2",
        "host-attention=nan",
        "host-attention=half",
        "host-attention=0.5,host_attention=0.5",
    ],
)
def test_parse_refuses(text):
    with pytest.raises(ConfigError) as caught:
        Policy.parse(text)
    assert "policy" in (caught.value.where or "")
    assert caught.value.mend


@given(
    shares=st.lists(st.integers(0, 8), min_size=3, max_size=3).filter(any),
    sizes=st.lists(st.integers(1, 100), max_size=40),
)
def test_no_tier_gets_more_of_unequal_rows_than_its_share_and_one(shares: list[int], sizes: list[int]) -> None:
    split = Split(**{tier: share / sum(shares) for tier, share in zip(Tier, shares, strict=True)})
    tiers = split.spread_sizes(sizes)
    for num in range(len(sizes) + 1):
        for tier in Tier:
            held = sum(size for size, place in zip(sizes[:num], tiers[:num], strict=True) if place is tier)
            share = getattr(split, tier)
            assert held <= share * sum(sizes[:num]) + (max(sizes) if share and sizes else 0) + 1e-6
    assert split.spread_sizes([7] * 12) == split.spread_sizes([1] * 12), "sizes that are equal do not matter"


@given(
    shares=st.lists(st.integers(0, 8), min_size=3, max_size=3).filter(any),
    part=st.floats(0.01, 1.0),
)
def test_a_part_of_the_whole_fills_the_faster_tiers_and_none_beyond_its_share(shares: list[int], part: float) -> None:
    split = Split(**{tier: share / sum(shares) for tier, share in zip(Tier, shares, strict=True)})
    of_part = split.of_part(part)
    for tier, slower in zip(Tier, (("cpu", "disk"), ("disk",), ()), strict=True):
        assert getattr(of_part, tier) * part <= getattr(split, tier) + 1e-9
        if any(getattr(of_part, name) > 1e-9 for name in slower):
            assert getattr(of_part, tier) * part == pytest.approx(getattr(split, tier)), "full before the next is used"


def test_a_policy_in_words():
    policy = Policy.parse("gpu-weights=0.25,row-tokens=2048,num-groups=3,host-attention=0.5")
    assert tell_policy(policy) == (
        "weights 25% gpu, 75% cpu; KV 100% cpu; hidden states 100% cpu; rows of 2,048 tokens, sweeps of 16,384; "
        "groups of 16 sequences, 3 at a time; the CPU attends to 50% of the KV in host memory"
    )
    assert "attends" not in tell_policy(Policy())
