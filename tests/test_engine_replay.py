"""Layers that are replayed answer as layers that run; here their launches are recorded as the CPU dispatches them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from dispatch_tapes import DispatchTapes, let_torch_compute
from pairwise import every_pair
from test_engine_int4 import CodecWithoutUnpacking
from test_engine_placement import answers_to_coming_and_going, coming_and_going
from tiny_models import FAMILIES, assert_equal_results, dequantized, tiny_case, tiny_config, tiny_model
from torch import Tensor

from flexeval.backends.transformers import answer
from flexeval.engine.checkpoint import StateDictCheckpoint
from flexeval.engine.codecs.codec import Codec, IntegerCodec
from flexeval.engine.codecs.kv_format import KVCoding
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.attention import PackedAttention
from flexeval.engine.compute.replay import MAX_STEADY, SIZES, Replay
from flexeval.engine.compute.row import Row
from flexeval.engine.compute.tape import CudaTape
from flexeval.engine.executor import Executor
from flexeval.engine.memory.disk import DiskTier
from flexeval.engine.memory.kv import KVCache
from flexeval.engine.memory.kv_context import LoadedContext
from flexeval.engine.memory.weights import WeightStore
from flexeval.planning.rows import DecodeSpan, FreshSpan, RowPlan
from flexeval.policy.policy import Policy, Split
from flexeval.request import TokenRequest, TokenResult

EXPERTS = ("mixtral", "gpt_oss", "deepseek_v3")
POLICIES = {
    "one group": Policy(group_sequences=16),
    "three groups": Policy(row_tokens=64, sweep_tokens=128, group_sequences=2, num_groups=3),
    "cache and states on disk": Policy(
        row_tokens=64, sweep_tokens=128, group_sequences=2, num_groups=2, kv=Split(disk=1.0), hidden=Split(disk=1.0)
    ),
    "weights on disk": Policy(group_sequences=16, weights=Split(disk=1.0)),
    "most weights on disk": Policy(
        row_tokens=64, sweep_tokens=128, group_sequences=2, num_groups=3, weights=Split(cpu=0.25, disk=0.75)
    ),
    "the cpu attends to half": Policy(
        row_tokens=64, sweep_tokens=128, group_sequences=1, num_groups=4, host_attention=0.3
    ),
}


def run(
    family: str,
    policy: Policy,
    requests: list[TokenRequest],
    tapes: DispatchTapes | None,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    codec: Codec | None = None,
    kv_coding: KVCoding | None = None,
) -> list[TokenResult]:
    """What is answered the second time, attending as a GPU does. Without tapes nothing is replayed."""
    let_torch_compute(monkeypatch)
    monkeypatch.setattr("flexeval.engine.parts.dense_attention", lambda device: PackedAttention())
    monkeypatch.setattr(
        Executor,
        "_make_replay",
        lambda self: tapes and Replay(self._anatomy, lambda: tapes, self._weights.bind_in_place),
    )
    anatomy = Anatomy(tiny_config(family), torch.float32)
    checkpoint = StateDictCheckpoint(anatomy, tiny_model(family).state_dict())
    device = torch.device("cpu")
    with Executor(
        anatomy,
        checkpoint,
        policy,
        codec=codec,
        kv_coding=kv_coding,
        device=device,
        disk_tier=DiskTier(folder),
        overlap=False,
    ) as executor:
        executor.execute(requests)
        return executor.execute(requests)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_layers_equal_transformers(
    family: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, tapes = tiny_case(family), DispatchTapes()
    assert_equal_results(run(family, POLICIES[policy], case.requests, tapes, tmp_path, monkeypatch), case.expected)
    assert tapes.num_replays >= 8 * 5, "of four layers, eight halves in most of eight steps"
    assert tapes.num_replays > tapes.num_tapes


def test_sequences_that_come_and_go_are_replayed_on_rows_of_few_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, tapes = coming_and_going(num_steps=12), DispatchTapes()
    measured = run("llama", POLICIES["one group"], requests, tapes, tmp_path, monkeypatch)
    assert_equal_results(measured, answers_to_coming_and_going())
    num_layers, num_sizes = 4, sum(size <= 16 for size in SIZES)
    num_steady = tapes.num_tapes - 2 * num_layers * num_sizes
    assert num_steady <= MAX_STEADY * num_sizes and 4 * tapes.num_tapes < tapes.num_replays


STEADY_POLICIES = {
    "in place": Policy(group_sequences=16),
    "half on disk": Policy(group_sequences=16, kv=Split(cpu=0.5, disk=0.5)),
    "two rows": Policy(row_tokens=8, sweep_tokens=512, group_sequences=4, num_groups=4),
}


@every_pair(
    "family,policy,coding",
    product(["llama", "opt", "gemma2", "gemma3_text"], STEADY_POLICIES, [None, KVCoding(4, 64)]),
)
def test_rows_that_come_again_are_replayed_with_their_attention(
    family: str,
    policy: str,
    coding: KVCoding | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sequences under headers come and go, a few stay long; with coded keys and values come coded weights."""
    requests = [
        TokenRequest(prompt_ids=(*range(9, 15), 20 + index, *range(50, 50 + index)), max_tokens=30)
        for index in range(6)
    ]
    requests += coming_and_going(num_steps=12)[:12]
    loads, load = Counter[int](), KVCache.load
    steps, begin = Counter[bool](), Replay.begin

    def counting_load(self: KVCache, layer: int, row: Row) -> LoadedContext:
        loads[layer] += bool(row.decode)
        return load(self, layer, row)

    def counting_begin(self: Replay, row: Row, *args: Any) -> Tensor:
        steps[bool(row.ancestors)] += 1
        return begin(self, row, *args)

    monkeypatch.setattr(KVCache, "load", counting_load)
    monkeypatch.setattr(Replay, "begin", counting_begin)
    coded = {"codec": coding and CodecWithoutUnpacking(16), "kv_coding": coding}
    measured = run(family, STEADY_POLICIES[policy], requests, DispatchTapes(), tmp_path, monkeypatch, **coded)
    on_disk = [1, 3] if policy == "half on disk" else []
    windowed = [0, 2] if family in ("gemma2", "gemma3_text") else []
    for layer in range(4):
        if layer in on_disk:
            assert loads[layer] == steps.total(), "read in every step"
        elif layer not in windowed:
            assert loads[layer] < 0.6 * steps.total(), (layer, loads, steps)
        else:
            assert loads[layer] >= steps[True] > loads[layer] / 2, "under a window it matters where an ancestor lies"
    plain = run(family, STEADY_POLICIES[policy], requests, None, tmp_path, monkeypatch, **coded)
    # Rows that are filled up round differently, which moves a code now and then.
    assert_equal_results(measured, plain, tolerance=1e-4 if coding is None else 3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("codec", "coding"), [(None, None), (IntegerCodec(4, 32), None), (IntegerCodec(4, 32), KVCoding(4, 64))]
)
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_on_a_gpu_rows_that_come_again_are_replayed_with_their_attention(
    family: str, share: float, codec: Codec | None, coding: KVCoding | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_replays, replay = 0, CudaTape.replay

    def counting(self: CudaTape) -> None:
        nonlocal num_replays
        num_replays += 1
        replay(self)

    monkeypatch.setattr(CudaTape, "replay", counting)
    anatomy, device = Anatomy(tiny_config(family), torch.float32), torch.device("cuda", 0)
    checkpoint = StateDictCheckpoint(anatomy, tiny_model(family).state_dict())
    home = Split(gpu=1.0)
    policy = Policy(weights=home, hidden=home, kv=Split(gpu=share, cpu=1 - share), group_sequences=16)
    requests = [
        TokenRequest(prompt_ids=(20 + index, *range(50, 55 + index)), max_tokens=40 + 9 * (index % 2))
        for index in range(20)
    ]
    results = []
    for num_steady in (10**9, 4):
        monkeypatch.setattr("flexeval.engine.compute.replay.STEADY_STEPS", num_steady)
        num_before = num_replays
        with Executor(
            anatomy, checkpoint, policy, codec=codec, kv_coding=coding, device=device, disk_tier=None
        ) as executor:
            results.append(executor.execute(requests))
            results.append(executor.execute(requests))
        results.append(num_replays - num_before)
    want, again, num_layered, measured, measured_again, num_steady = results
    assert_equal_results(again, want)
    # Recorded attention reads queries as layers leave them, and rounds otherwise, which moves a code now and then.
    assert_equal_results(measured, want, tolerance=1e-4 if coding is None else 2e-2)
    assert_equal_results(measured_again, measured)
    assert num_steady < 0.7 * num_layered


def test_a_batch_is_not_replayed_on_the_logs_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_torch_compute(monkeypatch)
    tapes = DispatchTapes()
    monkeypatch.setattr(
        Executor, "_make_replay", lambda self: Replay(self._anatomy, lambda: tapes, self._weights.bind_in_place)
    )
    anatomy = Anatomy(tiny_config("llama"), torch.float32)
    checkpoint = StateDictCheckpoint(anatomy, tiny_model("llama").state_dict())
    cpu = torch.device("cpu")
    with Executor(anatomy, checkpoint, Policy(), codec=None, device=cpu, disk_tier=None) as executor:
        for first in (5, 50):
            requests = [TokenRequest(prompt_ids=tuple(range(first, first + 30)), max_tokens=25)]
            want = [answer(tiny_model("llama"), request) for request in requests]
            assert_equal_results(executor.execute(requests), want)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "codec"),
    [*product(["llama", "gpt_neox", "gemma2"], [None, IntegerCodec(4, 32)]), *product(EXPERTS, [IntegerCodec(4, 32)])],
)
def test_on_a_gpu_sequences_come_and_go_beside_prompts(
    family: str, codec: IntegerCodec | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts unpack matrices in the same sweeps in which rows that decode are replayed with matrices as they rest."""
    num_replays, replay = 0, CudaTape.replay

    def counting(self: CudaTape) -> None:
        nonlocal num_replays
        num_replays += 1
        replay(self)

    monkeypatch.setattr(CudaTape, "replay", counting)
    model = tiny_model(family) if codec is None else dequantized(tiny_model(family), codec)
    anatomy, device = Anatomy(tiny_config(family), torch.float32), torch.device("cuda", 0)
    checkpoint = StateDictCheckpoint(anatomy, tiny_model(family).state_dict())
    everywhere = Split(gpu=1.0, cpu=0.0)
    requests = coming_and_going(num_steps=12)
    for sizes in ({"group_sequences": 16}, {"group_sequences": 3, "num_groups": 4}):
        policy = Policy(weights=everywhere, kv=everywhere, hidden=everywhere, row_tokens=256, sweep_tokens=512, **sizes)
        with Executor(anatomy, checkpoint, policy, codec=codec, device=device, disk_tier=None) as executor:
            assert_equal_results(executor.execute(requests), [answer(model, request) for request in requests])
    assert num_replays > 200


def test_layers_that_wait_for_the_device_are_never_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, tapes = tiny_case("llama"), DispatchTapes(waiting=("called a synchronizing CUDA operation",))
    measured = run("llama", POLICIES["one group"], case.requests, tapes, tmp_path, monkeypatch)
    assert_equal_results(measured, case.expected)
    assert tapes.num_tapes == 0


def test_layers_whose_weights_move_are_never_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WeightStore, "place", lambda *args, **options: None)
    case, tapes = tiny_case("llama"), DispatchTapes()
    measured = run("llama", POLICIES["one group"], case.requests, tapes, tmp_path, monkeypatch)
    assert_equal_results(measured, case.expected)
    assert tapes.num_tapes == 1, "of how a row enters"


def test_only_rows_that_decode_are_filled_up() -> None:
    fresh = RowPlan(token_ids=range(5), positions=range(5), fresh=(FreshSpan(node=0, start=0, length=5),))
    span = DecodeSpan(group=0, start=0, log_length=0, own_tokens=(), first_own_positions=(), version=0)
    decode = dataclasses.replace(fresh, fresh=(), decode=(span,))
    full = dataclasses.replace(decode, token_ids=range(SIZES[-1]), positions=range(SIZES[-1]))
    too_long = dataclasses.replace(decode, token_ids=range(SIZES[-1] + 1), positions=range(SIZES[-1] + 1))
    anatomy, tapes = Anatomy(tiny_config("llama"), torch.float32), DispatchTapes()
    replay = Replay(anatomy, lambda: tapes, lambda layer: True)
    assert [replay.size(plan) for plan in (fresh, decode, full, too_long)] == [None, SIZES[0], SIZES[-1], None]
    unpacked = Replay(anatomy, lambda: tapes, lambda layer: True, most_tokens=SIZES[-1] - 1)
    assert [unpacked.size(plan) for plan in (decode, full)] == [SIZES[0], None]
