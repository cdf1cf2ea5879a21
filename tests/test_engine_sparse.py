"""Sparse attention: what is chosen, that nobody notices how a context was cut, and transformers over the same keys."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairwise import every_pair
from test_engine_attention import DECODE, FRESH, LENGTHS, OPTIONS, HandMadeContext, Tokens, lived_in, upto
from test_engine_oracle import GPU_PLACEMENTS, PLACEMENTS, prompt_logprobs
from tiny_models import (
    FAMILIES,
    assert_equal_results,
    dequantized,
    ragged_requests,
    tiny_case,
    tiny_config,
    tiny_model,
)
from torch import Tensor

from flexeval.backends.native import Engine
from flexeval.backends.setting_attention import register_attention
from flexeval.backends.sparse_reference import chosen_keys
from flexeval.backends.transformers import TransformersBackend, answer
from flexeval.config import SparseMethod, Sparsity
from flexeval.engine.checkpoint import StateDictCheckpoint
from flexeval.engine.codecs.codec import IntegerCodec
from flexeval.engine.codecs.kv_format import KVCoding
from flexeval.engine.compute import sparse
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.attention import PackedAttention
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import RowMaker
from flexeval.engine.compute.selection import TopK, keep_best, make_selection
from flexeval.engine.compute.sparse import SparseAttention
from flexeval.engine.executor import Executor
from flexeval.engine.memory.disk import DiskTier
from flexeval.errors import ConfigError
from flexeval.models import ModelSource
from flexeval.planning.rows import AncestorSpan, FreshSpan, KeySource, RowPlan
from flexeval.policy.policy import Policy
from flexeval.request import Request, TokenRequest, TokenResult

METHODS = [Sparsity(method=method, percent=percent) for method in SparseMethod for percent in (10, 40)]


def name_of(value: Any) -> str:
    return f"{value.method}{value.percent}" if isinstance(value, Sparsity) else str(value)


# -- what is chosen --------------------------------------------------------------------------------------------------


class Causal:
    """Queries at the end of sequences of some lengths, of which they see a window."""

    def __init__(self, lengths: list[int], window: int | None = None):
        self.position_T = torch.tensor(lengths) - 1
        self.first_T = (self.position_T + 1 - (window or max(lengths))).clamp(min=0)
        self.max_visible = int((self.position_T + 1 - self.first_T).max())

    def page_bounds(self, page_tokens: int) -> Tensor:
        raise AssertionError(page_tokens)

    def masked(self, scores_TS: Tensor) -> Tensor:
        position_S = torch.arange(scores_TS.shape[1])
        is_seen_TS = (position_S <= self.position_T[:, None]) & (position_S >= self.first_T[:, None])
        return scores_TS.masked_fill(~is_seen_TS, -torch.inf)[:, None, None]


rows_of_scores = st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=40), min_size=1, max_size=4)


def sheet(rows: list[list[int]], window: int | None = None) -> tuple[Tensor, Causal]:
    sight = Causal([len(row) for row in rows], window)
    scores_TS = torch.zeros(len(rows), max(map(len, rows)))
    for scores_S, row in zip(scores_TS, rows, strict=True):
        scores_S[: len(row)] = torch.tensor(row, dtype=torch.float32)
    return sight.masked(scores_TS), sight


@given(rows_of_scores, st.integers(1, 99), st.sampled_from([None, 1, 7]))
def test_the_share_of_what_is_seen_is_kept_rounded_up(rows: list[list[int]], percent: int, window: int | None) -> None:
    scores_TKMS, sight = sheet(rows, window)
    kept_TS = TopK(percent).keep(scores_TKMS, sight)[:, 0, 0]
    for kept_S, row in zip(kept_TS.tolist(), rows, strict=True):
        first = max(0, len(row) - (window or len(row)))
        num_kept = -(-percent * (len(row) - first) // 100)
        by_score = sorted(range(first, len(row)), key=lambda place: (-row[place], place))
        assert {place for place, is_kept in enumerate(kept_S) if is_kept} == set(by_score[:num_kept])


@given(rows_of_scores)
def test_all_is_kept_of_a_hundred_percent(rows: list[list[int]]) -> None:
    scores_TKMS, sight = sheet(rows)
    assert torch.equal(TopK(100).keep(scores_TKMS, sight), scores_TKMS > -torch.inf)


@given(st.permutations(range(30)), st.integers(1, 99))
def test_what_is_kept_moves_with_the_scores(order: list[int], percent: int) -> None:
    scores_TKMS, sight = sheet([list(range(30))])
    kept = TopK(percent).keep(scores_TKMS, sight)
    assert torch.equal(TopK(percent).keep(scores_TKMS[..., order], sight), kept[..., order])


def test_of_equal_scores_the_earliest_are_kept_and_none_where_none_is_asked() -> None:
    scores_XS = torch.tensor([[1.0, 2, 1, 2, 1, 2], [0.0] * 6, [5.0, -torch.inf, 5, 5, -torch.inf, 1]])
    kept_XS = keep_best(scores_XS, torch.tensor([4, 2, 0]), most=4)
    assert kept_XS.int().tolist() == [[1, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0], [0] * 6]


# -- rows made by hand -----------------------------------------------------------------------------------------------


def attend_to_chosen(tokens: Tokens, path: list[int], options: AttentionOptions, sparsity: Sparsity) -> Tensor:
    """What the last token of a path sees of it, chosen and computed by itself in float64."""
    first = 0 if options.window is None else max(0, len(path) - options.window)
    q_NH, k_SKH = tokens.q_TNH[path[-1]].cpu().double(), tokens.k_TKH.cpu().double()[path[first:]]
    is_chosen_NS = chosen_keys(
        q_NH[None, :, None],
        k_SKH.transpose(0, 1)[None],
        None,
        sparsity,
        first_position=first,
        scale=options.scale,
        softcap=options.softcap,
    )[0, :, 0]
    heads = torch.arange(len(q_NH)) // (len(q_NH) // k_SKH.shape[1])
    scores_NS = torch.einsum("nh,snh->ns", q_NH, k_SKH[:, heads]) * options.scale
    if options.softcap is not None:
        scores_NS = options.softcap * (scores_NS / options.softcap).tanh()
    weights_NS = scores_NS.exp() * is_chosen_NS
    total_N = weights_NS.sum(1)
    if options.sinks_N is not None:
        total_N += options.sinks_N.cpu().double().exp()
    v_SNW = tokens.v_TKW.cpu().double()[path[first:]][:, heads]
    return torch.einsum("ns,snw->nw", weights_NS / total_N[:, None], v_SNW)


def check_row(
    plan: RowPlan, tokens: Tokens, paths: list[list[int]], context: HandMadeContext, options: str, sparsity: Sparsity
) -> None:
    chosen = dict(WIDE[options])
    if "sinks_N" in chosen:
        chosen["sinks_N"] = torch.tensor(chosen["sinks_N"], device=tokens.q_TNH.device)
    asked = AttentionOptions(scale=0.4, **chosen)
    # Products of quarters are exact in float32: equal scores are equal for the reference as well, others are not.
    tokens.q_TNH, tokens.k_TKH = ((part * 4).round() / 4 for part in (tokens.q_TNH, tokens.k_TKH))
    tokens.turn(torch.float32, context.coding)
    row = RowMaker(tokens.q_TNH.device).make(0, plan)
    index = torch.tensor([path[-1] for path in paths])
    attention = SparseAttention(make_selection(sparsity))
    out_TNW = attention(tokens.q_TNH[index], tokens.k_TKH[index], tokens.v_TKW[index], asked, row, context)
    expected_TNW = torch.stack([attend_to_chosen(tokens, path, asked, sparsity) for path in paths])
    torch.testing.assert_close(out_TNW.cpu().double(), expected_TNW, atol=3e-6, rtol=0)


def test_a_hundred_percent_is_dense_attention() -> None:
    tokens = Tokens({"header": 40, "a": 3}, value_size=12, device="cpu")
    tokens.turn(torch.float32, None)
    plan = RowPlan(
        token_ids=(0,) * 43,
        positions=tuple(range(43)),
        fresh=(FreshSpan(node=0, start=0, length=40), FreshSpan(node=1, start=40, length=3)),
        ancestors=(
            AncestorSpan(
                start=40, length=3, num_keys=40, first_key_position=0, last_position=42, source=KeySource(row_start=0)
            ),
        ),
    )
    row = RowMaker(torch.device("cpu")).make(0, plan)
    inputs = tokens.q_TNH, tokens.k_TKH, tokens.v_TKW, AttentionOptions(scale=0.4), row
    context = HandMadeContext(tokens, logs={}, scratch={})
    torch.testing.assert_close(SparseAttention(TopK(100))(*inputs, context), PackedAttention()(*inputs, context))


devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
WIDE = {**OPTIONS, "window-of-pages": {"window": 44}}
few_at_once = every_pair("sparsity,options,num_scores", product(METHODS, WIDE, [1, 4000, 2**23]), ids=name_of)


@few_at_once
@devices
def test_fresh_nodes_choose_among_all_that_they_descend_from(
    options: str, sparsity: Sparsity, device: str, num_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "SHEET_SCORES", num_scores)
    tokens = Tokens(LENGTHS, value_size=12, device=device)
    run = tokens.runs
    paths = [
        *upto(run["header"]),
        *upto(run["header"], run["a"]),
        *upto(run["header"], run["b"]),
        *upto(run["header"], run["b"], run["c"]),
        *upto(run["alone"]),
        *upto(run["in_log"], run["in_scratch"], run["e"]),
        *upto(run["in_log"], run["in_scratch"], run["f"]),
    ]
    context = HandMadeContext(
        tokens, logs={3: [None, None, *run["in_log"], None]}, scratch={9: list(run["in_scratch"])}
    )
    check_row(FRESH, tokens, paths, context, options, sparsity)


@every_pair("sparsity,options,coding", product(METHODS, WIDE, [None, KVCoding(4, 64)]), ids=name_of)
@devices
def test_sequences_that_decode_choose_among_log_and_header(
    options: str, sparsity: Sparsity, device: str, coding: KVCoding | None
) -> None:
    tokens = Tokens({"header": 9, "x": 5, "y": 6, "z": 2}, value_size=16, device=device)
    header, x, y, z = (list(run) for run in tokens.runs.values())
    logs = {0: [*x[:3], *y[:4], x[3], y[4], x[4], y[5], None], 1: [None] * 4 + header, 2: [*z, None]}
    context = HandMadeContext(tokens, logs=logs, scratch={}, coding=coding)
    check_row(DECODE, tokens, [header + x, header + y, z], context, options, sparsity)


@few_at_once
@devices
def test_long_contexts_that_decode_have_pages_across_parts(
    options: str, sparsity: Sparsity, device: str, num_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header's 90 tokens end within a page."""
    monkeypatch.setattr(sparse, "SHEET_SCORES", num_scores)
    plan, lengths, log = lived_in(num_steps=60)
    tokens = Tokens(lengths, value_size=16, device=device)
    header, *own = (list(run) for run in tokens.runs.values())
    context = HandMadeContext(tokens, logs={0: log, 1: [None, *header]}, scratch={})
    check_row(plan, tokens, [header + run for run in own], context, options, sparsity)


# -- against transformers --------------------------------------------------------------------------------------------


def run(
    family: str,
    policy: Policy,
    batches: list[list[TokenRequest]],
    folder: Path,
    *,
    bits: int | None = None,
    kv_bits: int | None = None,
    sparsity: Sparsity | None,
    device: str = "cpu",
) -> list[TokenResult]:
    anatomy = Anatomy(tiny_config(family), torch.float32)
    with Executor(
        anatomy,
        StateDictCheckpoint(anatomy, tiny_model(family).state_dict()),
        policy,
        codec=IntegerCodec(bits, 32) if bits else None,
        kv_coding=KVCoding(kv_bits, 64) if kv_bits else None,
        sparsity=sparsity,
        device=torch.device(device),
        disk_tier=DiskTier(folder),
    ) as executor:
        return [result for requests in batches for result in executor.execute(requests)]


@cache
def expected_of(
    family: str, bits: int | None, kv_bits: int | None, sparsity: Sparsity | None, requests: tuple[int, ...]
) -> list[TokenResult]:
    """What transformers says to some of the requests."""
    model = tiny_model(family) if bits is None else dequantized(tiny_model(family), IntegerCodec(bits, 32))
    model = copy.deepcopy(model)
    if kv_bits or sparsity:
        model.set_attn_implementation(register_attention(KVCoding(kv_bits, 64) if kv_bits else None, sparsity))
    asked = ragged_requests()
    return [answer(model, asked[index]) for index in requests]


EVERY = tuple(range(len(ragged_requests())))
SCORED, GENERATED = (0, 4, 8), (1, 5, 3)
FAMILY_METHODS = [Sparsity(method=SparseMethod.TOPK, percent=25), Sparsity(method=SparseMethod.QUEST, percent=40)]
sparse_methods = pytest.mark.parametrize("sparsity", FAMILY_METHODS, ids=lambda one: one.method)


def assert_equal_but_for_rounding(measured: list[TokenResult], family: str, sparsity: Sparsity) -> None:
    """Same tokens; log-probabilities within 1e-4, but where rounding decides which of two keys is chosen.

    So it does in float32 for one choice in tens of thousands, and what follows is small beside what choosing does.
    """
    expected = expected_of(family, None, None, sparsity, EVERY)
    assert [result.token_ids for result in measured] == [result.token_ids for result in expected]
    assert [result.finish_reason for result in measured] == [result.finish_reason for result in expected]
    difference = (logprobs(measured) - logprobs(expected)).abs()
    effect = prompt_logprobs(expected) - prompt_logprobs(tiny_case(family).expected)
    sees_little = getattr(tiny_config(family), "sliding_window", None) == 8 and sparsity.method is SparseMethod.QUEST
    assert sees_little or effect.abs().mean() > 0.01, "the choice changed nothing"
    assert difference.median() < 1e-5
    assert (difference > 1e-4).float().mean() < 0.2
    assert difference.norm() < 0.02 * effect.norm() + 1e-3


def logprobs(results: list[TokenResult]) -> Tensor:
    return torch.tensor([logprob for result in results for logprob in (*result.prompt_logprobs, *result.logprobs)])


@every_pair("sparsity,family,placement", product(FAMILY_METHODS, FAMILIES, ["cpu-small-rows", "cpu+disk"]), ids=name_of)
def test_equals_transformers_on_chosen_keys(family: str, placement: str, sparsity: Sparsity, tmp_path: Path) -> None:
    measured = run(family, PLACEMENTS[placement], [ragged_requests()], tmp_path, sparsity=sparsity)
    assert_equal_but_for_rounding(measured, family, sparsity)


@pytest.mark.gpu
@pytest.mark.parametrize("placement", GPU_PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
@sparse_methods
def test_equals_transformers_on_chosen_keys_on_gpu(
    family: str, placement: str, sparsity: Sparsity, tmp_path: Path
) -> None:
    policy = dataclasses.replace(GPU_PLACEMENTS[placement], host_attention=0.0)
    measured = run(family, policy, [ragged_requests()], tmp_path, sparsity=sparsity, device="cuda")
    assert_equal_but_for_rounding(measured, family, sparsity)


@every_pair(
    "bits,kv_bits,sparsity,placement",
    product([None, 8, 4], [None, 8, 4, 2], [None, *FAMILY_METHODS], ["cpu", "disk", "cpu+disk"]),
    ids=name_of,
)
def test_every_combination_equals_transformers(
    bits: int | None, kv_bits: int | None, sparsity: Sparsity | None, placement: str, tmp_path: Path
) -> None:
    """Weights, keys and values as codecs give them back, keys chosen; requests that score, and others that generate.

    Rounding decides about a code in a hundred thousand, and about a key: what differs is held against the whole effect.
    """
    asked = ragged_requests()
    batches = [[asked[index] for index in part] for part in (SCORED, GENERATED)]
    measured = run("llama", PLACEMENTS[placement], batches, tmp_path, bits=bits, kv_bits=kv_bits, sparsity=sparsity)
    expected = expected_of("llama", bits, kv_bits, sparsity, SCORED + GENERATED)
    if kv_bits is None and sparsity is None:
        assert_equal_results(measured, expected)
        return
    assert [result.token_ids for result in measured] == [result.token_ids for result in expected]
    plain = expected_of("llama", bits, None, sparsity if kv_bits else None, SCORED + GENERATED)
    effect = (prompt_logprobs(expected) - prompt_logprobs(plain)).norm()
    assert (prompt_logprobs(measured) - prompt_logprobs(expected)).norm() < (0.1 if kv_bits == 8 else 0.02) * effect


# -- what does not go with it ----------------------------------------------------------------------------------------


def test_a_policy_that_has_the_cpu_attend_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"host_attention=0\.5 .*attends to all keys only.*without topk or quest"):
        run("llama", Policy(host_attention=0.5), [], tmp_path, sparsity=METHODS[0])
    with pytest.raises(ConfigError, match=r"host_attention=0\.5 "):
        Engine.load("a model that is not there", setting="topk10", policy="host-attention=0.5")


def test_the_reference_takes_a_sequence_at_a_time(smollm2: ModelSource) -> None:
    with pytest.raises(ConfigError, match=r"padded batches move.*batch size of 1"):
        TransformersBackend(smollm2, setting="w4-quest10", batch_size=2)


def test_smollm2_equals_transformers_on_chosen_keys(smollm2: ModelSource) -> None:
    header = "Answer the questions.\n\n" + "Question: What is two and two?\nA. 4\nB. 5\nAnswer: A\n\n" * 3
    requests = [
        *(Request(prompt=f"{header}Question: What is {n} and {n}?\nAnswer:", max_tokens=1) for n in range(2)),
        Request(prompt="Count on: 1, 2,", max_tokens=9, stop=("\n",), top_logprobs=2),
        Request(prompt="The capital of France is Paris, naïve 東京.", max_tokens=0, echo=True),
    ]
    options = {"setting": "topk25", "dtype": "float32", "device": "cpu"}
    with Engine.load(smollm2, **options) as engine:
        measured = engine.generate(requests)
    for got, want in zip(measured, TransformersBackend(smollm2, **options).generate(requests), strict=True):
        assert (got.text, got.token_ids, got.finish_reason) == (want.text, want.token_ids, want.finish_reason)
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)
