"""Where nothing fits: which tier lacks how much, and what would fit."""

from dataclasses import replace

import pytest
from policy_cases import LAPTOP, OPT_6_7B, OPT_30B, OPT_125M, OPT_175B, T4, generating, opt

from flexeval.errors import CapacityError
from flexeval.policy.policy import Policy, Split
from flexeval.policy.search import check, search


@pytest.mark.parametrize(
    ("shape", "machine", "says", "says_not"),
    [
        pytest.param(
            OPT_30B,
            replace(T4, cpu_bytes=30 * 10**9, disk_bytes=0),
            ["cpu has 27.9 GiB and lacks", "Raise --cpu-memory to ", "--disk DIR (", "use --setting w4"],
            ["gpu has", "halve"],
            id="host memory",
        ),
        pytest.param(
            OPT_175B,
            replace(T4, cpu_bytes=30 * 10**9, disk_bytes=100 * 10**9),
            ["disk has 93.1 GiB and lacks", "--disk DIR:SIZE", "use --setting w4"],
            ["gpu has", "cpu has"],
            id="disk",
        ),
        pytest.param(
            OPT_30B,
            replace(T4, gpu_bytes=10**9),
            ["gpu has 953.7 MiB and lacks", "Raise --gpu-memory"],
            ["--disk", "w4", "cpu has"],
            id="gpu",
        ),
        pytest.param(
            OPT_30B,
            LAPTOP,
            ["cpu has 14.9 GiB and lacks", "Raise --cpu-memory", "--disk DIR ("],
            ["gpu", "w4"],
            id="cpu device",
        ),
        pytest.param(
            opt(48, 7168, 56, weight_bits=4.5),
            LAPTOP,
            ["cpu has 14.9 GiB and lacks", "--disk DIR ("],
            ["w4"],
            id="already packed",
        ),
    ],
)
def test_what_does_not_fit_says_what_would(shape, machine, says, says_not):
    with pytest.raises(CapacityError) as caught:
        search(shape, generating(100), machine)
    message = str(caught.value)
    assert "\n" not in message
    for words in says:
        assert words in message
    for words in says_not:
        assert words not in message


def test_long_sequences_that_do_not_fit_are_named():
    work = generating(4, 30_000, 2_000)
    with pytest.raises(CapacityError, match="halve the longest prompt and max_tokens"):
        search(OPT_6_7B, work, replace(T4, gpu_bytes=3 * 10**9))


def test_what_the_mend_names_does_mend():
    machine = replace(T4, cpu_bytes=30 * 10**9, disk_bytes=0)
    with pytest.raises(CapacityError) as caught:
        search(OPT_30B, generating(100), machine)
    lacking_gib = float(str(caught.value).split("lacks ")[1].split(" GiB")[0])
    enough = replace(machine, cpu_bytes=machine.cpu_bytes + int((lacking_gib + 0.1) * 2**30))
    check(search(OPT_30B, generating(100), enough), OPT_30B, generating(100), enough)
    packed = opt(48, 7168, 56, weight_bits=4.5)
    check(search(packed, generating(100), machine), packed, generating(100), machine)


def test_check_names_the_tier():
    policy = Policy(weights=Split(gpu=1.0), kv=Split(cpu=1.0), hidden=Split(cpu=1.0))
    with pytest.raises(CapacityError, match=r"needs .* GiB of gpu memory, 14.0 GiB are usable") as caught:
        check(policy, OPT_30B, generating(10), T4)
    assert "--gpu-memory" in str(caught.value)
    check(replace(policy, weights=Split(cpu=1.0)), OPT_30B, generating(10), T4)
    with pytest.raises(CapacityError, match="of gpu memory"):
        check(replace(policy, weights=Split(gpu=0.5, cpu=0.5)), OPT_125M, generating(10), LAPTOP)
