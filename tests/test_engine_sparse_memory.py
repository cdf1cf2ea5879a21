"""Sparse attention over KV that rests elsewhere: keys come, values are fetched when they are chosen, bytes as foretold.

There is no GPU here: host memory stands in for what lies beside one, and nothing may be used in place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from pairwise import every_pair
from policy_cases import T4
from test_engine_kv_format import CODINGS, SHAPES, numbers
from test_engine_sparse import (
    EVERY,
    FAMILY_METHODS,
    assert_equal_but_for_rounding,
    expected_of,
    name_of,
    prompt_logprobs,
)
from tiny_models import ragged_requests, tiny_config, tiny_model

from flexeval.config import SparseMethod, Sparsity
from flexeval.engine.checkpoint import StateDictCheckpoint
from flexeval.engine.codecs.kv_format import KVCoding, KVShape, make_format
from flexeval.engine.codecs.kv_halves import KeysFormat, ValuesFormat
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.executor import Executor
from flexeval.engine.memory.disk import DiskTier
from flexeval.engine.memory.tier import MemoryTier, Tier
from flexeval.engine.memory.tiers import Tiers
from flexeval.engine.sizes import measure_workload, model_shape
from flexeval.engine.trace import Trace
from flexeval.policy.cost import CostModel, Lane
from flexeval.policy.policy import Policy, Split
from flexeval.policy.policy import Tier as TierName
from flexeval.request import TokenRequest, TokenResult

CPU = torch.device("cpu")
SMALL = Policy(row_tokens=24, sweep_tokens=80, group_sequences=2, num_groups=2)
LARGE = Policy()
Run = Callable[..., tuple[list[TokenResult], Trace]]


class FarTiers(Tiers):
    """Host memory that nothing is computed in."""

    def __init__(self, device: torch.device, disk: DiskTier | None):
        super().__init__(device, disk)
        self.far = MemoryTier(TierName.CPU, CPU, compute_device=device)
        self.far.is_addressable = False

    def spread(self, split: Split, num_items: int) -> list[Tier]:
        return [self.far if tier.name is TierName.CPU else tier for tier in super().spread(split, num_items)]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Answers of an engine whose KV rests far away, and what it counted."""
    monkeypatch.setattr("flexeval.engine.parts.Tiers", FarTiers)

    def run(
        family: str,
        policy: Policy,
        requests: list[TokenRequest],
        sparsity: Sparsity | None,
        *,
        coding: KVCoding | None = None,
        overlap: bool = False,
    ) -> tuple[list[TokenResult], Trace]:
        anatomy = Anatomy(tiny_config(family), torch.float32)
        checkpoint = StateDictCheckpoint(anatomy, tiny_model(family).state_dict())
        with Executor(
            anatomy,
            checkpoint,
            policy,
            codec=None,
            kv_coding=coding,
            sparsity=sparsity,
            device=CPU,
            disk_tier=None,
            overlap=overlap,
        ) as executor:
            return executor.execute(requests), executor.trace

    return run


SIZES = {"small": SMALL, "large": LARGE}


@every_pair(
    "family,sparsity,sizes,overlap",
    product(["opt", "llama", "gpt_oss", "deepseek_v3"], FAMILY_METHODS, SIZES, [False, True]),
    ids=name_of,
)
def test_answers_do_not_depend_on_where_values_rest(
    family: str, sparsity: Sparsity, sizes: str, overlap: bool, run: Run
) -> None:
    policy = SIZES[sizes]
    results, trace = run(family, policy, ragged_requests(), sparsity, overlap=overlap)
    assert_equal_but_for_rounding(results, family, sparsity)
    _, dense = run(family, policy, ragged_requests(), None)
    assert trace.lanes["kv_out"].num_bytes == dense.lanes["kv_out"].num_bytes
    assert trace.lanes["kv_in"].num_bytes < dense.lanes["kv_in"].num_bytes


@pytest.mark.parametrize(("family", "bits"), [("deepseek_v3", 8), ("deepseek_v3", 4), ("llama", 2)])
def test_coded_values_are_fetched_as_they_rest(family: str, bits: int, run: Run) -> None:
    """In DeepSeek keys have 24 numbers and values 12: both are coded in the groups that suit both.

    On one processor or another rounding decides once which of two keys is chosen, and the rest of an answer with it.
    """
    sparsity, coding = FAMILY_METHODS[0], KVCoding(bits, 64)
    far, trace = run(family, SMALL, ragged_requests(), sparsity, coding=coding)
    _, plain = run(family, SMALL, ragged_requests(), sparsity)
    expected = expected_of(family, None, bits, sparsity, EVERY)
    assert sum(one.token_ids != other.token_ids for one, other in zip(far, expected, strict=True)) <= 1
    assert (prompt_logprobs(far) - prompt_logprobs(expected)).abs().median() < 1e-5
    assert trace.lanes["kv_in"].num_bytes < (bits / 32 + 0.26) * plain.lanes["kv_in"].num_bytes


LENGTH, STEPS, NUM = 60, 9, 6


def alike() -> list[TokenRequest]:
    """Prompts of one length that share nothing."""
    return [
        TokenRequest(prompt_ids=tuple((7 * n + 3 * i) % 190 + 5 for i in range(LENGTH)), max_tokens=STEPS)
        for n in range(NUM)
    ]


@pytest.mark.parametrize("percent", [1, 10, 50])
def test_of_each_head_exactly_the_chosen_values_cross(percent: int, run: Run) -> None:
    """OPT has a KV head for each query head: nobody else chooses for it."""
    _, trace = run("opt", LARGE, alike(), Sparsity(method=SparseMethod.TOPK, percent=percent))
    shape = Anatomy(tiny_config("opt"), torch.float32).kv_shape(0)
    num_chosen = sum(math.ceil(percent * (LENGTH + step) / 100) for step in range(1, STEPS))
    num_read = sum(LENGTH + step for step in range(STEPS - 1))
    numbers = num_read * shape.num_heads * shape.key_size + num_chosen * shape.num_heads * shape.value_size
    assert trace.lanes["kv_in"].num_bytes == 4 * NUM * numbers * 4, "of four layers, in four bytes each"


@pytest.mark.parametrize("sparsity", [None, *FAMILY_METHODS, Sparsity(method=SparseMethod.TOPK, percent=5)], ids=str)
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_the_cost_model_foretells_the_bytes(family: str, sparsity: Sparsity | None, run: Run) -> None:
    """The link's seconds at a byte a second; two query heads share a KV head in llama, and often agree."""
    requests = alike()
    _, trace = run(family, LARGE, requests, sparsity)
    anatomy = Anatomy(tiny_config(family), torch.float32)
    shape = model_shape(anatomy, None, CPU, sparsity=sparsity)
    machine = dataclasses.replace(T4, to_gpu_bytes_per_s=1.0, launch_s=0.0)
    policy = dataclasses.replace(LARGE, weights=Split(gpu=1.0), hidden=Split(gpu=1.0))
    model = CostModel(shape=shape, workload=measure_workload(requests), hardware=machine)
    foretold = model.cost(policy).lanes["decode"][Lane.TO_GPU]
    measured = trace.lanes["kv_in"].num_bytes
    assert measured == pytest.approx(foretold, rel=0.03 if family == "opt" and sparsity != FAMILY_METHODS[1] else 0.1)


# -- keys and values apart -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_halves_give_back_what_both_give_together(shape: KVShape, coding: KVCoding | None, dtype: torch.dtype) -> None:
    given = numbers(shape, 21, dtype)
    whole, keys, values = (form(shape, dtype, coding) for form in (make_format, KeysFormat, ValuesFormat))
    assert keys.token_bytes + values.token_bytes == whole.token_bytes
    places = torch.tensor([[3, 0, 20], [7, 7, 1]])
    backs = []
    for form in (whole, keys, values):
        data_CB = torch.zeros(30, form.token_bytes, dtype=torch.uint8)
        form.write(*(part[:20] for part in given), data_CB[:20])
        form.append(*(part[20:] for part in given), data_CB, torch.tensor([20]))
        assert form.is_lossy == (coding is not None)
        backs.append((form.read(data_CB, slice(2, 21)), form.read(data_CB, places)))
        if form is values:
            index_R = torch.tensor([5 * shape.num_heads, 20 * shape.num_heads + shape.num_heads - 1])
            rows_RW = values.read_rows(data_CB.view(-1, values.row_bytes)[index_R])
    for together, k, v in zip(*backs, strict=True):
        assert torch.equal(together.keys_CKH, k.keys_CKH) and torch.equal(together.values_CKW, v.values_CKW)
        assert not k.values_CKW.numel() and not v.keys_CKH.numel()
    assert torch.equal(rows_RW[0], backs[0][0].values_CKW[3, 0])
    assert torch.equal(rows_RW[1], backs[0][0].values_CKW[18, -1])
