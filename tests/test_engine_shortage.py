"""Memory that runs out while the engine answers: the batch is split, and every answer is given once all the same."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine_api import REQUESTS, without_time
from tiny_directory import write_tiny_model

from flexeval import Engine, Request
from flexeval.answering import answer_all
from flexeval.backends.placing import MOST_LESS
from flexeval.backends.shortage import full_tier
from flexeval.config import Setting
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.executor import Executor
from flexeval.engine.memory.disk import DiskExtent, DiskTier
from flexeval.engine.memory.kv import KVCache
from flexeval.engine.memory.tier import MemoryTier
from flexeval.engine.memory.weights import WeightStore
from flexeval.errors import CapacityError, ConfigError, DiskError
from flexeval.models import resolve
from flexeval.policy.policy import Policy, Tier
from flexeval.progress import LineProgress
from flexeval.request import Completion

MANY = [*REQUESTS, *(Request(prompt=f"Question: {number} Answer:", max_tokens=1 + number % 5) for number in range(12))]
POLICY = "row-tokens=64,sweep-tokens=128,group-sequences=4,num-groups=2"
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of ...")
TORCH_HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def expected(model: str) -> list[tuple[object, ...]]:
    with load(model) as engine:
        return list(map(without_time, engine.generate(MANY)))


def load(model: str, **options: Any) -> Engine:
    return Engine.load(model, **{"policy": POLICY, "device": "cpu", "dtype": "float32"} | options)


class Listener:
    """Hears which requests are answered."""

    def __init__(self) -> None:
        self.told: Counter[int] = Counter()

    def __call__(self, completions: Sequence[tuple[int, Completion]]) -> None:
        self.told.update(index for index, _ in completions)


def fail_at(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, error: Exception, is_time: Callable[[int], bool]
) -> None:
    """Let a method raise instead, at such of its calls, counted from 1."""
    call, num_calls = getattr(owner, name), 0

    def fail(*args: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if is_time(num_calls):
            raise error
        return call(*args, **options)

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize(
    ("owner", "name", "error", "at"),
    [
        pytest.param(Anatomy, "run_layer", CUDA, 1, id="the first layer"),
        pytest.param(Anatomy, "run_layer", CUDA, 50, id="a layer"),
        pytest.param(Anatomy, "head", TORCH_HOST, 4, id="the head"),
        pytest.param(Anatomy, "embed", MemoryError(), 3, id="the host"),
        pytest.param(KVCache, "store", RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), 9, id="a library"),
        pytest.param(DiskExtent, "write", MemoryError(), 20, id="a lane"),
    ],
)
def test_a_batch_is_split_where_memory_runs_out(
    owner: type,
    name: str,
    error: Exception,
    at: int,
    model: str,
    expected: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listen = Listener()
    disk = {"disk": str(tmp_path), "policy": f"{POLICY},disk-kv=0.5"} if owner is DiskExtent else {}
    with load(model, **disk) as engine:
        fail_at(monkeypatch, owner, name, error, at.__eq__)
        assert list(map(without_time, engine.generate(MANY, on_completions=listen))) == expected
        usage = engine.usage()
        assert listen.told == dict.fromkeys(range(len(MANY)), 1)
        assert len(usage.splits) == 1 and " instead of " in usage.splits[0]
        assert usage.lost_s > 0
        foretold_s = engine.cost_model(MANY).cost(Policy.parse(disk.get("policy", POLICY))).total_s
        assert usage.predicted_s == pytest.approx(foretold_s), "once, before the first request"
        assert 0 < engine.trace.num_prompt_tokens <= usage.num_prompt_tokens
        before, after = Policy.parse(POLICY), Policy.from_json(usage.policy)
        sizes = [(policy.row_tokens, policy.group_sequences, policy.num_groups) for policy in (after, before)]
        assert sizes[0] < sizes[1] or sizes[0][1:] < sizes[1][1:]
        engine.close()
        engine.generate(MANY[:1])
        assert engine.usage().policy == usage.policy, "what was set by hand stays split"


def test_a_full_tier_splits_the_batch_too(model: str, expected: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search's own policy, and a room for keys and values that is not there when they come."""
    with load(model, policy="auto") as engine:
        engine.place(MANY)
        full = CapacityError("no room for 4 MiB more in cpu memory", tier="cpu")
        fail_at(monkeypatch, MemoryTier, "allocate", full, (2).__eq__)
        assert list(map(without_time, engine.generate(MANY))) == expected
        assert len(engine.usage().splits) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "at"), [("run_layer", 2), ("embed", 1)])
def test_a_batch_is_split_where_memory_runs_out_while_launches_are_recorded(
    name: str, at: int, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was being recorded ends: the device would take nothing else."""
    call, num_calls = getattr(Anatomy, name), 0

    def fail(*args: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += torch.cuda.is_current_stream_capturing()
        if torch.cuda.is_current_stream_capturing() and num_calls == at:
            torch.empty(2**20, device="cuda")
            raise CUDA
        return call(*args, **options)

    many = [Request(prompt=f"Question: {number} Answer:", max_tokens=6, ignore_eos=True) for number in range(12)]
    with load(model, device="cuda") as engine:
        expected = [completion.text for completion in engine.generate(many)]
    monkeypatch.setattr(Anatomy, name, fail)
    with load(model, device="cuda") as engine:
        assert [completion.text for completion in engine.generate(many)] == expected
        assert num_calls > at and len(engine.usage().splits) == 1


def test_memory_may_run_out_again_and_again(model: str, expected: object, monkeypatch: pytest.MonkeyPatch) -> None:
    listen = Listener()
    with load(model) as engine:
        fail_at(monkeypatch, Anatomy, "run_layer", CUDA, lambda call: call in (30, 31, 60, 100))
        assert list(map(without_time, engine.generate(MANY, on_completions=listen))) == expected
        assert listen.told == dict.fromkeys(range(len(MANY)), 1)
        assert len(engine.usage().splits) == 4


def test_what_never_fits_ends_in_one_line(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_done = len(MANY)
    listen = Listener()
    with load(model, disk=str(tmp_path), policy=f"{POLICY},disk-weights=1") as engine:
        fail_at(monkeypatch, Anatomy, "run_layer", CUDA, lambda call: call > 40)
        with pytest.raises(CapacityError, match="cpu memory ran out: CUDA out of memory") as e:
            engine.generate(MANY, on_completions=listen)
        assert e.value.where == "the smallest batch: rows of 16 tokens, 1 sequences at once" and e.value.mend
        assert 0 < len(listen.told) < num_done and set(listen.told.values()) == {1}
        assert 3 < len(engine.usage().splits) < 20
        assert [path.name for path in tmp_path.iterdir()] == ["prepared"], "all is given back"


@pytest.mark.parametrize("error", [MemoryError(), CapacityError("the disk is full", tier="disk")])
def test_what_a_listener_raises_is_not_taken_for_it(error: Exception, model: str) -> None:
    def fail(completions: object) -> None:
        raise error

    with load(model) as engine:
        with pytest.raises(type(error)):
            engine.generate(MANY, on_completions=fail)
        assert engine.usage().splits == []


@pytest.mark.parametrize(
    "error", [DiskError("a disk that fails"), ConfigError("out of memory, says a user"), RuntimeError("a bug")]
)
def test_other_errors_pass(error: Exception, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(model) as engine:
        fail_at(monkeypatch, Anatomy, "run_layer", error, (30).__eq__)
        with pytest.raises(type(error)):
            engine.generate(MANY)
        assert engine.usage().splits == []


def test_weights_that_do_not_load_are_not_split(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(model) as engine:
        fail_at(monkeypatch, WeightStore, "__init__", CUDA, lambda call: True)
        with pytest.raises(CapacityError, match=r"CUDA out of memory.*while weights were loaded"):
            engine.generate(MANY)
        assert engine.usage().splits == []
    monkeypatch.undo()
    with load(model) as engine:
        fail_at(monkeypatch, MemoryTier, "allocate", CapacityError("no room", tier="cpu"), lambda call: True)
        with pytest.raises(CapacityError, match=r"^no room$"):
            engine.place(MANY)


def test_weights_that_find_less_room_than_was_measured_are_placed_in_less(
    model: str, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has taken memory meanwhile."""
    with load(model, policy="auto", cpu_memory="100MB") as engine:
        fail_at(monkeypatch, WeightStore, "__init__", CapacityError("no room", tier="cpu"), lambda call: call <= 2)
        assert list(map(without_time, engine.generate(MANY))) == expected
        usage = engine.usage()
    assert usage.splits == [
        "85.8 MiB of cpu memory used instead of 95.4 MiB",
        "77.2 MiB of cpu memory used instead of 85.8 MiB",
    ]
    assert usage.predicted_s > 0 and usage.num_generated_tokens


def test_weights_that_never_find_room_are_not_placed_for_ever(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(model, policy="auto") as engine:
        fail_at(monkeypatch, WeightStore, "__init__", CapacityError("no room", tier="cpu"), lambda call: True)
        with pytest.raises(CapacityError, match=r"^no room$"):
            engine.generate(MANY)
        assert len(engine.usage().splits) == MOST_LESS


def test_memory_may_run_out_before_the_first_request(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are looked at, to rest channel by channel, in a sweep of its own."""
    with load(model, setting="kv4-perchannel") as engine:
        unsplit = list(map(without_time, engine.generate(MANY)))
    with load(model, setting="kv4-perchannel") as engine:
        fail_at(monkeypatch, Executor, "find_key_channels", CUDA, (1).__eq__)
        engine.place(MANY)
        assert list(map(without_time, engine.generate(MANY))) == unsplit
        assert len(engine.usage().splits) == 1 and engine.usage().predicted_s > 0


def test_only_the_cause_counts_where_a_recording_fails() -> None:
    """A recording that is ended by an error says that it failed, not why."""
    for error, tier in ((CUDA, Tier.GPU), (MemoryError(), Tier.CPU), (ValueError(), None)):
        try:
            try:
                raise error
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        except RuntimeError as found:
            assert full_tier(found, Tier.GPU) == tier
    assert full_tier(CapacityError("the policy needs 5 GiB of gpu memory"), Tier.GPU) is None


def test_a_run_says_so_and_its_journal_has_each_answer_once(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = list(dict.fromkeys(MANY))
    said = io.StringIO()
    with load(model) as engine:
        fail_at(monkeypatch, Anatomy, "run_layer", CUDA, (50).__eq__)
        answers = answer_all(
            engine,
            resolve(model),
            Setting.parse("none"),
            requests,
            tmp_path,
            keep_top=0,
            fresh=True,
            progress=LineProgress(said.write),
        )
    assert len(answers.completions) == len(requests)
    [path] = tmp_path.glob("*.jsonl")
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum("completion" in entry for entry in kept) == len(requests)
    assert len(answers.cost.splits) == 1 and answers.cost.lost_s > 0
    assert answers.cost.predicted_s


def test_a_disk_that_is_full_is_a_full_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, limit_bytes=4096)
    with pytest.raises(CapacityError) as error:
        tier.allocate(2**62)
    assert full_tier(error.value, Tier.CPU) is Tier.DISK
    tier.close()
