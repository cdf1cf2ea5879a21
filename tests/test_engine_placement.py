"""Everything rests where the policy says, to the byte, and everything is given back, also when something fails."""

from __future__ import annotations

import dataclasses
import gc
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import LAPTOP
from tiny_models import assert_equal_results, tiny_case, tiny_config, tiny_model

from flexeval.backends.transformers import answer
from flexeval.engine.checkpoint import StateDictCheckpoint
from flexeval.engine.codecs.kv_format import KVCoding
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.host_attention import Attending, HostAttention
from flexeval.engine.executor import Executor
from flexeval.engine.memory.disk import DiskExtent, DiskTier
from flexeval.engine.memory.hidden import HiddenStore
from flexeval.engine.memory.kv import KVCache
from flexeval.engine.memory.lanes import LANES
from flexeval.engine.memory.tier import MemoryExtent, MemoryTier
from flexeval.engine.sizes import measure_workload, model_shape
from flexeval.errors import CapacityError
from flexeval.policy.cost import CostModel
from flexeval.policy.policy import Policy, Split
from flexeval.policy.policy import Tier as TierName
from flexeval.request import TokenRequest, TokenResult

CPU = torch.device("cpu")
REQUEST = TokenRequest(prompt_ids=tuple(range(5, 35)), max_tokens=5)
NUM_KEPT = 30 + 5 - 1
SMALL = Policy(row_tokens=24, sweep_tokens=80, group_sequences=2, num_groups=2)
ALL_ON_DISK = dataclasses.replace(SMALL, weights=Split(disk=1.0), kv=Split(disk=1.0), hidden=Split(disk=1.0))


@contextmanager
def loaded(
    policy: Policy, folder: Path | None, *, device: torch.device = CPU, family: str = "llama", **options: Any
) -> Iterator[Executor]:
    anatomy = Anatomy(tiny_config(family), torch.float32)
    checkpoint = StateDictCheckpoint(anatomy, tiny_model(family).state_dict())
    disk = None if folder is None else DiskTier(folder)
    with Executor(anatomy, checkpoint, policy, codec=None, device=device, disk_tier=disk, **options) as executor:
        yield executor


def assert_nothing_is_left(folder: Path) -> None:
    assert list(folder.iterdir()) == [], "files or folders"
    assert [t.name for t in threading.enumerate() if t.name.startswith(LANES)] == [], "threads"
    links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert [link for link in links if link.is_relative_to(folder)] == [], "open files"


def used_bytes(executor: Executor) -> int:
    return sum(tier.used_bytes for tier in executor.tiers.values())


@pytest.mark.parametrize(
    ("policy", "num_slabs_on_disk", "num_logs_on_disk"),
    [
        (Policy(), 0, 0),
        (Policy(weights=Split(cpu=0.5, disk=0.5)), 2, 0),
        (Policy(weights=Split(disk=1.0)), 4, 0),
        (Policy(kv=Split(cpu=0.75, disk=0.25)), 0, 1),
        (Policy(weights=Split(cpu=0.25, disk=0.75), kv=Split(disk=1.0)), 3, 4),
    ],
)
def test_each_tier_holds_what_the_policy_puts_there(
    policy: Policy, num_slabs_on_disk: int, num_logs_on_disk: int, tmp_path: Path
) -> None:
    shape = model_shape(Anatomy(tiny_config("llama"), torch.float32), None, CPU)
    slab, log = shape.layer_bytes, NUM_KEPT * shape.kv_bytes_per_token
    buffers = 2 * slab if num_slabs_on_disk else 0
    with loaded(policy, tmp_path) as executor:
        assert used_bytes(executor) == 4 * slab + buffers
        executor.execute([REQUEST])
        assert used_bytes(executor) == 4 * slab + buffers, "the cache goes with the batch"
        peak = executor.peak_bytes()
        staging = executor.tiers[TierName.DISK].staging.num_bytes
    assert (staging > 0) == (num_slabs_on_disk + num_logs_on_disk > 0)
    assert peak["disk"] == num_slabs_on_disk * slab + num_logs_on_disk * log
    resting = (4 - num_slabs_on_disk) * slab + (4 - num_logs_on_disk) * log + shape.resident_bytes
    assert peak["cpu"] == resting + buffers + staging
    assert used_bytes(executor) == 0
    assert_nothing_is_left(tmp_path)


HALF_ON_DISK = dataclasses.replace(SMALL, kv=Split(cpu=0.5, disk=0.5))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("policy", [SMALL, ALL_ON_DISK, HALF_ON_DISK], ids=["small", "on disk", "KV half on disk"])
def test_what_a_batch_held_does_not_wait_for_the_garbage_collector(
    policy: Policy, overlap: bool, tmp_path: Path
) -> None:
    """A GPU would hold one batch's buffers beside the next one's."""
    with loaded(policy, tmp_path, overlap=overlap) as executor:
        gc.collect()
        gc.disable()
        try:
            executor.execute(coming_and_going(num_steps=4))
            left = [one for one in gc.get_objects() if type(one) in (KVCache, HiddenStore)]
        finally:
            gc.enable()
    assert left == []


@pytest.mark.parametrize("coding", [None, KVCoding(8, 64), KVCoding(4, 64), KVCoding(2, 8)], ids=str)
def test_the_cache_of_a_long_batch_is_bounded_by_the_sequences_in_flight(
    coding: KVCoding | None, tmp_path: Path
) -> None:
    anatomy = Anatomy(tiny_config("llama"), torch.float32)
    shape, plain = (model_shape(anatomy, None, CPU, kv_coding=kv_coding) for kv_coding in (coding, None))
    group_size = 16 if coding is None else min(coding.group_size, 16)  # the head's size
    assert shape.kv_bytes_per_token == plain.kv_bytes_per_token / 32 * (
        32 if coding is None else coding.bits + 32 / group_size
    )
    assert shape.kv_compute_bytes_per_token == plain.kv_bytes_per_token
    policy = Policy(kv=Split(disk=1.0), group_sequences=2, num_groups=2)
    requests = [dataclasses.replace(REQUEST, prompt_ids=(100 + n, *REQUEST.prompt_ids[1:])) for n in range(11)]
    with loaded(policy, tmp_path, kv_coding=coding) as executor:
        executor.execute(requests)
        assert executor.peak_bytes()["disk"] == 4 * policy.block_sequences * NUM_KEPT * shape.kv_bytes_per_token


@pytest.mark.parametrize("kind", ["weights", "kv", "hidden"])
@pytest.mark.parametrize(("place", "mend"), [("disk", "--disk"), ("gpu", "without a GPU share")])
def test_a_policy_for_another_machine_is_refused_before_anything_is_loaded(
    kind: str, place: str, mend: str, tmp_path: Path
) -> None:
    policy = dataclasses.replace(Policy(), **{kind: Split(**{"cpu": 0.9, place: 0.1})})
    told: list[int] = []
    with (
        pytest.raises(CapacityError, match=f"puts data on {place}.*{mend}"),
        loaded(policy, None, on_layer=told.append),
    ):
        pass
    assert told == []
    assert_nothing_is_left(tmp_path)


def test_a_disk_that_fills_up_while_weights_are_loaded_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = DiskTier.allocate
    tiers: list[DiskTier] = []

    def allocate_two(self: DiskTier, num_bytes: int) -> DiskExtent:
        tiers.append(self)
        if len(tiers) > 2:
            raise CapacityError("no room")
        return allocate(self, num_bytes)

    monkeypatch.setattr(DiskTier, "allocate", allocate_two)
    with pytest.raises(CapacityError, match="no room"), loaded(ALL_ON_DISK, tmp_path):
        pass
    assert tiers[0].used_bytes == 0
    assert_nothing_is_left(tmp_path)


class Trouble(Exception):
    """What goes wrong in these tests."""


def fail_in_a_layer(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    run_layer = Anatomy.run_layer
    calls: list[int] = []

    def fail_late(self: Anatomy, layer: int, *rest: Any) -> torch.Tensor:
        calls.append(layer)
        if len(calls) > 30 and layer == 2:
            raise Trouble
        return run_layer(self, layer, *rest)

    monkeypatch.setattr(Anatomy, "run_layer", fail_late)
    return {}


def fail_in_the_head(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(Anatomy, "head", _raise)
    return {}


def fail_with_the_results(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"on_results": _raise}


def fail_to_read_weights(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(executor._weights, "load", _raise)
    return {}


def _raise(*_: object) -> None:
    raise Trouble


FAILURES = (fail_in_a_layer, fail_in_the_head, fail_with_the_results, fail_to_read_weights)
ON_HOST = dataclasses.replace(SMALL, host_attention=1.0)
HALF_ON_HOST = dataclasses.replace(ALL_ON_DISK, kv=Split(cpu=0.5, disk=0.5), host_attention=0.5)


def fail_on_the_host(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    begin = HostAttention.begin
    calls: list[object] = []

    def fail_late(self: HostAttention, *rest: Any) -> Attending:
        calls.append(rest)
        if len(calls) > 4:
            raise Trouble
        return begin(self, *rest)

    monkeypatch.setattr(HostAttention, "begin", fail_late)
    return {}


@pytest.mark.parametrize("overlap", [False, True], ids=["inline", "threads"])
@pytest.mark.parametrize("fail", FAILURES, ids=[fail.__name__ for fail in FAILURES])
def test_a_failure_inside_a_sweep_leaves_nothing_and_the_engine_usable(
    fail: Any, overlap: bool, tmp_path: Path
) -> None:
    case = tiny_case("llama")
    with loaded(ALL_ON_DISK, tmp_path, overlap=overlap) as executor:
        weights = used_bytes(executor)
        with pytest.MonkeyPatch.context() as monkeypatch:
            options = fail(executor, monkeypatch)
            with pytest.raises(Trouble):
                executor.execute(case.requests, **options)
        assert used_bytes(executor) == weights
        assert_equal_results(executor.execute(case.requests), case.expected)
    assert used_bytes(executor) == 0
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize("overlap", [False, True], ids=["inline", "threads"])
@pytest.mark.parametrize("fail", [fail_on_the_host, fail_in_a_layer], ids=lambda fail: fail.__name__)
@pytest.mark.parametrize("policy", [ON_HOST, HALF_ON_HOST], ids=["all", "half"])
def test_a_failure_while_the_cpu_attends_leaves_nothing_and_the_engine_usable(
    policy: Policy, fail: Any, overlap: bool, tmp_path: Path
) -> None:
    case = tiny_case("llama")
    with loaded(policy, tmp_path, overlap=overlap) as executor:
        weights = used_bytes(executor)
        with pytest.MonkeyPatch.context() as monkeypatch:
            fail(executor, monkeypatch)
            with pytest.raises(Trouble):
                executor.execute(case.requests)
        assert used_bytes(executor) == weights
        assert_equal_results(executor.execute(case.requests), case.expected)
    assert used_bytes(executor) == 0
    assert_nothing_is_left(tmp_path)


def test_logs_are_given_back_only_when_the_cpu_has_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[bool] = []
    close = KVCache.close

    def check(self: KVCache) -> None:
        done.append(attended.is_set())
        close(self)

    attended = threading.Event()
    with loaded(ON_HOST, tmp_path, overlap=True) as executor:
        monkeypatch.setattr(KVCache, "close", check)
        monkeypatch.setattr(executor._sweeper.anatomy, "embed", _raise)
        executor._lanes["host_attention"].submit(lambda: (time.sleep(0.03), attended.set()))
        with pytest.raises(Trouble):
            executor.execute(tiny_case("llama").requests)
    assert done == [True]


def test_stores_are_closed_only_when_nothing_is_in_flight(tmp_path: Path) -> None:
    done: list[str] = []
    with loaded(ALL_ON_DISK, tmp_path, overlap=True) as executor:
        for store, names in (
            (executor._make_cache({}, coding=None), ("kv_in", "kv_out")),
            (executor._make_hidden(HiddenStore, [], prompt_tokens=1), ("hidden",)),
        ):
            for name in names:
                executor._lanes[name].submit(lambda name=name: (time.sleep(0.03), done.append(name)))
            store.close()
            assert set(done) >= set(names)


@pytest.mark.gpu
@pytest.mark.parametrize("fail", FAILURES, ids=[fail.__name__ for fail in FAILURES])
def test_a_failure_inside_a_sweep_on_a_gpu_leaves_nothing_and_the_engine_usable(fail: Any, tmp_path: Path) -> None:
    case = tiny_case("llama")
    thirds = Split(gpu=0.25, cpu=0.5, disk=0.25)
    policy = dataclasses.replace(SMALL, weights=thirds, kv=thirds, hidden=thirds)
    with loaded(policy, tmp_path, device=torch.device("cuda", 0)) as executor:
        with pytest.MonkeyPatch.context() as monkeypatch:
            options = fail(executor, monkeypatch)
            with pytest.raises(Trouble):
                executor.execute(case.requests, **options)
        assert_equal_results(executor.execute(case.requests), case.expected)
    assert used_bytes(executor) == 0
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize("overlap", [False, True], ids=["inline", "threads"])
@pytest.mark.parametrize("operation", ["write", "read"])
@pytest.mark.parametrize("kind", ["kv", "hidden"])
def test_a_transfer_that_fails_is_never_passed_over(
    kind: str, operation: str, overlap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever one fails: the batch fails too, rather than go on with what the disk happened to hold."""
    case = tiny_case("llama")
    done = getattr(DiskExtent, operation)
    num_done, failing = 0, -1

    def fail_once(self: DiskExtent, data: torch.Tensor, offset: int = 0) -> None:
        nonlocal num_done
        num_done += 1
        if num_done == failing:
            raise Trouble
        done(self, data, offset)

    with loaded(dataclasses.replace(SMALL, **{kind: Split(disk=1.0)}), tmp_path, overlap=overlap) as executor:
        monkeypatch.setattr(DiskExtent, operation, fail_once)
        executor.execute(case.requests)
        num_in_all = num_done
        assert num_in_all > 40
        for chosen in (1, num_in_all // 2, num_in_all):
            num_done, failing = 0, chosen
            with pytest.raises(Trouble):
                executor.execute(case.requests)
        assert executor.tiers[TierName.DISK].used_bytes == 0
    assert_nothing_is_left(tmp_path)


def coming_and_going(*, num_steps: int) -> list[TokenRequest]:
    """Sequences under seven headers that end after different times, some by themselves and some at their limit."""
    rng = random.Random(3)
    requests = []
    for _ in range(7):
        header = rng.choices(range(5, 200), k=40)
        for length in rng.choices(range(1, num_steps + 1), k=6):
            requests.append(
                TokenRequest(
                    prompt_ids=(*header, *rng.choices(range(5, 200), k=rng.randint(1, 20))),
                    max_tokens=rng.choice([1, num_steps]),
                    is_stopped=lambda ids, length=length: len(ids) == length,
                )
            )
    return requests


@cache
def answers_to_coming_and_going() -> list[TokenResult]:
    """Of llama, in transformers."""
    return [answer(tiny_model("llama"), request) for request in coming_and_going(num_steps=12)]


SMALL_BLOCKS = {
    "one row at a time": SMALL,
    "three groups": Policy(row_tokens=64, sweep_tokens=128, group_sequences=4, num_groups=3),
    "one group": Policy(row_tokens=256, sweep_tokens=10_000, group_sequences=16),
}


@pytest.mark.parametrize("num_steps", [1, 12])
@pytest.mark.parametrize("sizes", SMALL_BLOCKS)
def test_no_tier_holds_more_than_the_cost_model_promised(sizes: str, num_steps: int, tmp_path: Path) -> None:
    requests = coming_and_going(num_steps=num_steps)
    for places in (
        {},
        {"kv": Split(disk=1.0), "hidden": Split(disk=1.0)},
        {"kv": Split(cpu=0.5, disk=0.5)},
        {"kv": Split(cpu=0.5, disk=0.5), "host_attention": 0.7},
    ):
        assert_promise_is_kept(requests, dataclasses.replace(SMALL_BLOCKS[sizes], **places), None, tmp_path)


def assert_promise_is_kept(
    requests: list[TokenRequest], policy: Policy, coding: KVCoding | None, folder: Path
) -> list[TokenResult]:
    shape = model_shape(Anatomy(tiny_config("llama"), torch.float32), None, CPU, kv_coding=coding)
    model = CostModel(shape=shape, workload=measure_workload(requests), hardware=LAPTOP)
    promised = model.cost(policy).peak_bytes
    with loaded(policy, folder, kv_coding=coding) as executor:
        results = executor.execute(requests)
        used = executor.peak_bytes()
    assert all(used.get(str(tier), 0) <= promised[tier] for tier in TierName), (policy, used, promised)
    return results


PROMPTS = st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(1, 60))
SPLITS = st.sampled_from(
    [Split(cpu=1.0), Split(disk=1.0), *(Split(cpu=1 - share, disk=share) for share in (0.5, 0.25, 0.1, 0.7))]
)


@st.composite
def ragged_work(draw: st.DrawFn) -> list[TokenRequest]:
    """Prompts of any length, some behind parts of common headers; scored, or continued up to any length."""
    rng = random.Random(draw(st.integers(0, 99)))
    headers = [rng.choices(range(5, 200), k=30) for _ in range(3)]
    requests = []
    for header, num_shared, num_own in draw(st.lists(PROMPTS, min_size=1, max_size=20)):
        most = draw(st.integers(0, 9))
        length = draw(st.integers(1, 9))
        requests.append(
            TokenRequest(
                prompt_ids=(*headers[header][:num_shared], *rng.choices(range(5, 200), k=num_own)),
                max_tokens=most,
                score_prompt=not most or draw(st.booleans()),
                is_stopped=lambda ids, length=length: len(ids) == length,
            )
        )
    return requests


POLICIES = st.builds(
    Policy,
    weights=SPLITS,
    kv=SPLITS,
    hidden=SPLITS,
    row_tokens=st.integers(8, 100),
    sweep_tokens=st.integers(8, 300),
    group_sequences=st.integers(1, 6),
    num_groups=st.integers(1, 3),
    host_attention=st.sampled_from([0.0, 0.5]),
)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(requests=ragged_work(), policy=POLICIES, coding=st.sampled_from([None, KVCoding(4, 64)]))
def test_no_tier_holds_more_than_promised_whatever_the_work(
    requests: list[TokenRequest], policy: Policy, coding: KVCoding | None
) -> None:
    with TemporaryDirectory() as folder:
        assert_promise_is_kept(requests, policy, coding, Path(folder))


@pytest.mark.parametrize(
    ("policy", "coding"),
    [
        pytest.param(
            Policy(weights=Split(cpu=0.75, disk=0.25), kv=Split(disk=1.0), row_tokens=27, group_sequences=5),
            KVCoding(4, 64),
            id="what passes through host memory",
        ),
        pytest.param(
            Policy(kv=Split(disk=1.0), row_tokens=44, sweep_tokens=21), None, id="scored prompts in several sweeps"
        ),
    ],
)
def test_no_tier_holds_more_than_promised_in_a_corner(policy: Policy, coding: KVCoding | None, tmp_path: Path) -> None:
    rng = random.Random(0)
    scored, continued = (tuple(rng.choices(range(5, 200), k=num)) for num in (51, 41))
    requests = [
        TokenRequest(prompt_ids=continued, max_tokens=3),
        TokenRequest(prompt_ids=scored, max_tokens=1, score_prompt=True),
    ]
    assert_promise_is_kept(requests, policy, coding, tmp_path)


@pytest.mark.parametrize("first", [0, 1])
def test_no_tier_gets_the_long_ones_of_unequal_rows(first: int, tmp_path: Path) -> None:
    """Rows are long and short in turns: by their number, one tier would have all of the long ones."""
    requests = [
        TokenRequest(prompt_ids=tuple(range(5 + 30 * n, 5 + 30 * n + (24 if n % 2 == first else 1))), max_tokens=1)
        for n in range(6)
    ]
    policy = Policy(hidden=Split(cpu=0.5, disk=0.5), row_tokens=24, sweep_tokens=200)
    assert_promise_is_kept(requests, policy, None, tmp_path)


def test_hidden_states_of_a_sweep_with_few_tokens_stay_where_a_full_one_has_room(tmp_path: Path) -> None:
    """Prompts that come while others decode are few: they would go to disk and back at each layer, for nothing."""
    requests = [
        TokenRequest(prompt_ids=tuple(range(5 + 20 * n, 25 + 20 * n)), max_tokens=2 + 3 * (n % 2)) for n in range(5)
    ]
    policy = Policy(hidden=Split(cpu=0.5, disk=0.5), row_tokens=20, sweep_tokens=80, group_sequences=4)
    with loaded(policy, tmp_path) as executor:
        executor.execute(requests)
        sweeps = executor.trace.sweeps
        moved = {sweep.num_fresh_tokens: sweep.lanes["hidden"].num_bytes for sweep in sweeps if sweep.num_fresh_tokens}
    assert moved.keys() == {80, 20} and moved[80] > 0 and moved[20] == 0
    assert any(sweep.num_fresh_tokens and sweep.num_decode_tokens for sweep in sweeps)


@pytest.mark.parametrize("coding", [None, KVCoding(4, 64)], ids=["none", "kv4"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3", "gpt_oss"])
def test_logs_in_host_memory_are_expected_as_they_come(
    family: str, coding: KVCoding | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made ahead, so that none may be of another size, and none too many. As if a GPU copied from there."""
    expected, made = Counter[int](), Counter[int]()
    init, allocate = MemoryTier.__init__, MemoryTier.allocate

    def page_locked(self: MemoryTier, *where: Any, **device: Any) -> None:
        init(self, *where, **device)
        self.is_pinned = True

    def count(self: MemoryTier, num_bytes: int) -> MemoryExtent:
        made[num_bytes] += 1
        return allocate(self, num_bytes)

    header = tuple(range(5, 25))
    tails = [range(30 + 5 * n, 33 + 6 * n) for n in range(5)]
    requests = [TokenRequest(prompt_ids=(*header, *tail), max_tokens=3) for tail in tails]
    policy = Policy(kv=Split(cpu=0.7, disk=0.3), group_sequences=2, num_groups=3)
    for name in ("pin", "unpin"):
        monkeypatch.setattr(f"flexeval.engine.memory.tier.{name}", lambda data: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(MemoryTier, "__init__", page_locked)
    with loaded(policy, tmp_path, family=family, kv_coding=coding) as executor:
        monkeypatch.setattr(MemoryTier, "expect", lambda self, sizes: expected.update(sizes))
        monkeypatch.setattr(MemoryTier, "allocate", count)
        executor.execute(requests)
    assert expected == made and len(expected) > 1


def test_a_log_that_is_full_is_compacted_where_it_is_read(tmp_path: Path) -> None:
    """It holds as many tokens as fit, so that the next ones find room only when those that nobody needs are gone."""
    requests = [
        TokenRequest(prompt_ids=tuple(range(5 + number, 11 + number)), max_tokens=(2, 5, 6)[number % 3])
        for number in range(8)
    ]
    on_disk, in_memory = (
        Policy(row_tokens=64, sweep_tokens=64, group_sequences=3, kv=kv) for kv in (Split(disk=1.0), Split(cpu=1.0))
    )
    expected = assert_promise_is_kept(requests, in_memory, None, tmp_path)
    assert_equal_results(assert_promise_is_kept(requests, on_disk, None, tmp_path), expected)


@pytest.mark.parametrize(
    ("device", "place"),
    [
        ("cpu", "cpu"),
        ("cpu", "disk"),
        ("cpu", "host"),
        ("cpu", "half-host"),
        *(pytest.param("cuda", place, marks=pytest.mark.gpu) for place in ("gpu", "cpu", "disk", "host", "half-host")),
    ],
)
@pytest.mark.parametrize("sizes", SMALL_BLOCKS)
def test_logs_that_are_compacted_keep_their_sequences(
    sizes: str, place: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host the CPU attends to them, or to half of them."""
    requests = coming_and_going(num_steps=12)
    num_compacted = 0
    compact = KVCache._compact

    def count(self: KVCache, *rest: Any) -> torch.Tensor:
        nonlocal num_compacted
        num_compacted += 1
        return compact(self, *rest)

    monkeypatch.setattr(KVCache, "_compact", count)
    monkeypatch.setattr("flexeval.engine.memory.kv.COMPACTED_TOKENS", 7)
    share = {"host": 1.0, "half-host": 0.5}.get(place, 0.0)
    kv = Split(cpu=1.0) if share else Split(**{place: 1.0})
    policy = dataclasses.replace(SMALL_BLOCKS[sizes], kv=kv, host_attention=share)
    with loaded(policy, tmp_path, device=torch.device(device), overlap=True if share else None) as executor:
        assert_equal_results(executor.execute(requests), answers_to_coming_and_going())
        assert (executor.trace.lanes["host_attention"].num_bytes > 0) == (share > 0)
        reads_in_place = executor.tiers.crossing(policy).read == 0
    assert num_compacted >= 4, "in every layer: they are full"
    assert num_compacted > 4 * 3 or reads_in_place, "and more than once"
