"""Counters: what each sweep computed and moved adds up to what the batch did, whoever was late."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from tiny_models import assert_equal_results, ragged_requests, tiny_case, tiny_config, tiny_model

from flexeval.engine import parts
from flexeval.engine import trace as trace_module
from flexeval.engine.checkpoint import StateDictCheckpoint
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.executor import Executor
from flexeval.engine.memory.disk import DiskTier
from flexeval.engine.memory.lane import ThreadLane, drain
from flexeval.engine.memory.lanes import LANES
from flexeval.engine.sizes import model_shape
from flexeval.engine.trace import SweepTrace, Trace
from flexeval.policy.policy import Policy
from flexeval.request import TokenRequest

POLICY = "disk-kv=1,disk-hidden=1,row-tokens=24,sweep-tokens=80,group-sequences=2,num-groups=2"


@pytest.mark.parametrize("is_settled_between", [False, True])
def test_a_write_that_is_late_belongs_to_the_sweep_that_submitted_it(is_settled_between: bool) -> None:
    trace, lane = Trace(), ThreadLane("kv_out", torch.device("cpu"))

    def begin_sweep() -> None:
        trace.begin_sweep(SweepTrace(num_fresh_tokens=3, num_decode_tokens=0))
        lane.submit(trace.mark, "kv_out")
        lane.submit(lane.watch.next_lap)

    def settle() -> None:
        drain(lane)
        trace.settle("kv_out", lane.watch.take_laps())

    begin_sweep()
    lane.submit(trace.moved, "kv_out", 5)
    begin_sweep()
    lane.submit(trace.moved, "kv_out", 7)
    if is_settled_between:
        settle()
    lane.submit(trace.moved, "kv_out", 1)
    begin_sweep()
    lane.submit(trace.moved, "kv_out", 2)
    settle()
    lane.close()
    assert [sweep.lanes["kv_out"].num_bytes for sweep in trace.sweeps] == [5, 8, 2]
    assert trace.lanes["kv_out"].num_bytes == 15
    assert trace.lanes["kv_out"].busy_s >= sum(sweep.lanes["kv_out"].busy_s for sweep in trace.sweeps) > 0
    assert trace.num_computed_prompt_tokens == 9


def test_a_long_batch_keeps_its_last_sweeps_and_sums(tmp_path: Path) -> None:
    """A sequence that draws 60 tokens, once with an account of every sweep and once with that of the last four."""

    def sweeps_of(most: int) -> list[SweepTrace]:
        anatomy = Anatomy(tiny_config("llama"), torch.float32)
        checkpoint = StateDictCheckpoint(anatomy, tiny_model("llama").state_dict())
        with patch.object(parts, "MOST_SWEEPS", most), patch.object(trace_module, "MOST_SWEEPS", most):
            policy = Policy.parse(f"disk-weights=1,{POLICY}")
            with Executor(
                anatomy, checkpoint, policy, codec=None, device=torch.device("cpu"), disk_tier=DiskTier(tmp_path)
            ) as executor:
                executor.execute([TokenRequest(prompt_ids=(1, 2, 3), max_tokens=60)])
                return executor.trace.sweeps

    def summed(sweeps: list[SweepTrace]) -> list[int]:
        moved = [sum(sweep.lanes[lane].num_bytes for sweep in sweeps) for lane in LANES]
        tokens = [sum(sweep.num_fresh_tokens for sweep in sweeps), sum(sweep.num_decode_tokens for sweep in sweeps)]
        return [sum(sweep.num_sweeps for sweep in sweeps), *tokens, *moved]

    every, few = sweeps_of(512), sweeps_of(4)
    assert len(every) == 60 and summed(every) == summed(few)
    assert len(few) <= 8
    prompt, decode, *last = few
    assert (prompt.num_fresh_tokens, decode.num_fresh_tokens) == (3, 0)
    assert prompt.num_sweeps + decode.num_sweeps + len(last) == 60
    assert [sweep.lanes["kv_in"].num_bytes for sweep in every[-len(last) :]] == [
        sweep.lanes["kv_in"].num_bytes for sweep in last
    ]


@pytest.mark.parametrize(("family", "device"), [("llama", "cpu"), pytest.param("llama", "cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("on_disk", [0.5, 1])
def test_sweeps_add_up_to_the_batch(
    family: str, device: str, overlap: bool, on_disk: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle, opening_s = Trace.settle, dict[str, float]()

    def watched(trace: Trace, lane: str, laps: Sequence[float]) -> None:
        opening_s.setdefault(lane, laps[0])  # opening the first account belongs to no sweep
        settle(trace, lane, laps)

    monkeypatch.setattr(Trace, "settle", watched)
    anatomy = Anatomy(tiny_config(family), torch.float32)
    layer_bytes = model_shape(anatomy, None, torch.device(device)).layer_bytes
    with Executor(
        anatomy,
        StateDictCheckpoint(anatomy, tiny_model(family).state_dict()),
        Policy.parse(f"disk-weights={on_disk},{POLICY}"),
        codec=None,
        device=torch.device(device),
        disk_tier=DiskTier(tmp_path),
        overlap=overlap,
    ) as executor:
        for _ in range(2):
            assert_equal_results(executor.execute(ragged_requests()), tiny_case(family).expected)
        trace = executor.trace
    half = len(trace.sweeps) // 2
    assert [(s.num_fresh_tokens, s.num_decode_tokens) for s in trace.sweeps[:half]] == [
        (s.num_fresh_tokens, s.num_decode_tokens) for s in trace.sweeps[half:]
    ]
    num_decoded = sum(len(r.token_ids) - 1 for r in tiny_case(family).expected if r.token_ids)
    assert sum(sweep.num_decode_tokens for sweep in trace.sweeps) == 2 * num_decoded
    for sweep in trace.sweeps:
        assert set(sweep.lanes) == {*LANES, "compute"}
        assert sweep.lanes["compute"].busy_s > 0
        assert sweep.lanes["kv_in"].num_bytes > 0 or sweep.num_decode_tokens == 0
    assert trace.lanes["host_attention"].num_bytes == 0
    num_streamed = 2 if (device, on_disk) == ("cpu", 0.5) else 4  # of four layers; the first rests in host memory then
    num_moved = [num_streamed] * half
    num_moved[0] += 1  # each sweep sends for the first layer that comes in the next, if there is one
    num_moved[-1] -= 1
    assert [sweep.lanes["weights"].num_bytes for sweep in trace.sweeps] == [n * layer_bytes for n in num_moved * 2]
    for lane, total in trace.lanes.items():
        assert sum(sweep.lanes[lane].num_bytes for sweep in trace.sweeps) == total.num_bytes, lane
        busy_s = sum(sweep.lanes[lane].busy_s for sweep in trace.sweeps)
        assert busy_s > 0 and busy_s + opening_s[lane] == pytest.approx(total.busy_s), lane
    assert trace.lanes["kv_out"].num_bytes > 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_shared", [0, 40])
def test_what_the_cpu_attends_to_is_read_where_it_rests(num_shared: int, device: str, overlap: bool) -> None:
    """Two sequences of 30 tokens draw 5: each of four decode sweeps reads them and what they have drawn.

    What comes before them in both is brought once for the two rows.
    """
    anatomy = Anatomy(tiny_config("llama"), torch.float32)
    token_bytes = model_shape(anatomy, None, torch.device(device)).kv_bytes_per_token
    with Executor(
        anatomy,
        StateDictCheckpoint(anatomy, tiny_model("llama").state_dict()),
        Policy.parse("host-attention=1,group-sequences=1,num-groups=2"),
        codec=None,
        device=torch.device(device),
        disk_tier=None,
        overlap=overlap,
    ) as executor:
        header = tuple(range(100, 100 + num_shared))
        prompts = [header + tuple(range(n, n + 30)) for n in (5, 50)]
        executor.execute([TokenRequest(prompt_ids=ids, max_tokens=5) for ids in prompts])
        trace = executor.trace
    num_brought = 4 * 4 * num_shared if device == "cuda" else 0  # sweeps and layers
    assert trace.lanes["kv_in"].num_bytes == num_brought * token_bytes
    decode = [sweep.lanes["host_attention"] for sweep in trace.sweeps if not sweep.num_fresh_tokens]
    assert [lane.num_bytes for lane in decode] == [4 * 2 * (30 + step) * token_bytes for step in (1, 2, 3, 4)]
    assert all(lane.busy_s > 0 for lane in decode)
    assert sum(lane.num_bytes for lane in decode) == trace.lanes["host_attention"].num_bytes
