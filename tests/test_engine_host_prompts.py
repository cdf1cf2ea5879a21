"""The compiled attention of prompts: against float64, over all that a row can be made of, and nobody else's numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexeval.engine.codecs.kv_format import KeysValues, KVShape
from flexeval.engine.compute.attention import PackedAttention
from flexeval.engine.compute.host_prompts import PromptKernel, attends_to_prompts, most_rows
from flexeval.engine.compute.host_team import build
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import Row, RowMaker
from flexeval.engine.cpu_rates import cpu_prompt_rate
from flexeval.planning.rows import AncestorSpan, FreshSpan, KeySource, RowPlan

pytestmark = pytest.mark.skipif(most_rows() == 0, reason="the processor does not multiply pairs of bfloat16")


class Case:
    """A row of questions with answers below them, all of them below a header that an earlier row has computed."""

    def __init__(self, num_header: int, questions: list[tuple[int, list[int]]], sizes: tuple[int, int, int, int]):
        """Each question with the lengths of its answers; sizes are query heads, KV heads, key and value."""
        num_heads, num_kv_heads, key_size, value_size = sizes
        fresh, ancestors, positions, self.paths = [], [], list[int](), list[list[int]]()
        header = list(range(num_header))
        for length, answers in questions:
            start = len(positions)
            own = list(range(num_header + start, num_header + start + length))
            fresh.append(FreshSpan(node=len(fresh), start=start, length=length))
            positions += range(num_header, num_header + length)
            self.paths += [header + own[: index + 1] for index in range(length)]
            first = len(positions)
            for answer in answers:
                begin = len(positions)
                fresh.append(FreshSpan(node=len(fresh), start=begin, length=answer))
                below = list(range(num_header + begin, num_header + begin + answer))
                positions += range(num_header + length, num_header + length + answer)
                self.paths += [header + own + below[: index + 1] for index in range(answer)]
            if answers:
                ancestors.append(
                    AncestorSpan(
                        start=first,
                        length=len(positions) - first,
                        num_keys=length,
                        first_key_position=num_header,
                        last_position=max(positions[first:]),
                        source=KeySource(row_start=start),
                    )
                )
        if num_header:
            ancestors.append(
                AncestorSpan(
                    start=0,
                    length=len(positions),
                    num_keys=num_header,
                    first_key_position=0,
                    last_position=max(positions),
                    source=KeySource(scratch_node=99),
                )
            )
        plan = RowPlan(
            token_ids=np.zeros(len(positions), dtype=np.int64),
            positions=np.array(positions),
            fresh=tuple(fresh),
            ancestors=tuple(ancestors),
        )
        self.row: Row = RowMaker(torch.device("cpu")).make(0, plan)
        self.positions = [*header, *positions]
        self.num_header, num_tokens = num_header, len(self.positions)
        self.q_TNH = torch.randn(len(positions), num_heads, key_size).bfloat16()
        self.k_CKH = torch.randn(num_tokens, num_kv_heads, key_size).bfloat16()
        # As a log holds them: a token's heads side by side, of each the key and then the value.
        self.v_CKW = torch.randn(num_tokens, num_kv_heads, key_size + value_size).bfloat16()[..., key_size:]

    def own_log(self, batch: object) -> None:
        raise AssertionError

    def ancestor(self, span: AncestorSpan) -> KeysValues:
        assert span.source.scratch_node == 99
        return KeysValues(self.k_CKH[: self.num_header], self.v_CKW[: self.num_header])

    def attend(self, attention: PackedAttention | PromptKernel, options: AttentionOptions) -> Tensor:
        own = slice(self.num_header, None)
        return attention(self.q_TNH, self.k_CKH[own], self.v_CKW[own], options, self.row, self)

    def expected(self, options: AttentionOptions) -> Tensor:
        outs = []
        for query, path in enumerate(self.paths):
            if options.window is not None:
                last = self.positions[path[-1]]
                path = [token for token in path if last - self.positions[token] < options.window]
            q_KMH = self.q_TNH[query].double().unflatten(0, (self.k_CKH.shape[1], -1))
            scores_KMS = options.scale * torch.einsum("kmh,skh->kms", q_KMH, self.k_CKH[path].double())
            if options.softcap is not None:
                scores_KMS = options.softcap * (scores_KMS / options.softcap).tanh()
            if options.sinks_N is not None:
                sinks_KM1 = options.sinks_N.double().view(*scores_KMS.shape[:2], 1)
                weights_KMS = torch.cat([scores_KMS, sinks_KM1], -1).softmax(-1)[..., :-1]
            else:
                weights_KMS = scores_KMS.softmax(-1)
            outs.append(torch.einsum("kms,skw->kmw", weights_KMS, self.v_CKW[path].double()).flatten(0, 1))
        return torch.stack(outs)


@pytest.fixture(scope="module")
def kernel() -> PromptKernel:
    team = build(2, borrows=True)
    assert team is not None
    return PromptKernel(team)


SIZES = {"smollm2": (9, 3, 64, 64), "mha": (3, 3, 80, 80), "mqa": (32, 1, 32, 16), "latent": (4, 4, 192, 128)}
OPTIONS = {
    "plain": AttentionOptions(scale=0.15),
    "window": AttentionOptions(scale=0.15, window=37),
    "softcap": AttentionOptions(scale=0.15, softcap=1.5),
    "sinks": AttentionOptions(scale=0.15, sinks_N=torch.empty(0)),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@settings(max_examples=12, deadline=None)
@given(
    num_header=st.sampled_from([0, 1, 63, 64, 65, 200]),
    questions=st.lists(
        st.tuples(st.sampled_from([1, 2, 15, 33, 100, 260]), st.lists(st.integers(1, 20), max_size=4)),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 3),
)
def test_it_equals_float64(
    kernel: PromptKernel,
    sizes: tuple[int, int, int, int],
    name: str,
    num_header: int,
    questions: list[tuple[int, list[int]]],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    case, options = Case(num_header, questions, sizes), OPTIONS[name]
    if options.sinks_N is not None:
        options = replace(options, sinks_N=torch.randn(sizes[0]))
    assert kernel.takes(case.q_TNH, case.k_CKH, case.v_CKW)
    out_TNW, expected_TNW = case.attend(kernel, options), case.expected(options)
    assert out_TNW.dtype == torch.bfloat16
    error = (out_TNW.double() - expected_TNW).norm() / expected_TNW.norm()
    theirs = (case.attend(PackedAttention(), options).double() - expected_TNW).norm() / expected_TNW.norm()
    assert error < 4e-3 and error <= 1.3 * theirs + 5e-4, "torch rounds as well, and what it merges several times"
    torch.testing.assert_close(out_TNW.double(), expected_TNW, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("broken", ["keys", "values"])
def test_a_neighbours_numbers_that_are_none_stay_its_own(kernel: PromptKernel, broken: str) -> None:
    case = Case(70, [(5, [2, 3]), (4, []), (200, [1]), (9, [])], SIZES["smollm2"])
    whole = case.attend(kernel, OPTIONS["plain"])
    bad = range(70 + 10 + 4, 70 + 10 + 4 + 200)  # the long question
    (case.k_CKH if broken == "keys" else case.v_CKW)[bad.start] = torch.nan
    out_TNW = case.attend(kernel, OPTIONS["plain"])
    for token, path in enumerate(case.paths):
        if bad.start in path:
            assert out_TNW[token].isnan().all()
        else:
            torch.testing.assert_close(out_TNW[token], whole[token], atol=0, rtol=0)


def test_layers_may_have_other_heads(kernel: PromptKernel) -> None:
    """One row, first with a query head to a KV head, then with 32: a block has as many tokens as there is room for."""
    torch.manual_seed(0)
    first = Case(20, [(150, [3])], (2, 2, 32, 32))
    second = Case(20, [(150, [3])], (32, 1, 32, 32))
    second.row = first.row
    for case in (first, second, first):
        expected_TNW = case.expected(OPTIONS["plain"])
        torch.testing.assert_close(case.attend(kernel, OPTIONS["plain"]).double(), expected_TNW, atol=0.02, rtol=0.01)


def test_it_refuses_what_it_cannot_read() -> None:
    assert attends_to_prompts(KVShape(3, 64, 64), torch.bfloat16, 9)
    assert not attends_to_prompts(KVShape(3, 64, 64), torch.float32, 9)
    assert not attends_to_prompts(KVShape(3, 72, 64), torch.bfloat16, 9)
    assert not attends_to_prompts(KVShape(3, 288, 64), torch.bfloat16, 9)
    assert not attends_to_prompts(KVShape(1, 64, 64), torch.bfloat16, most_rows() + 1)


def test_the_rate_is_measured() -> None:
    rate = cpu_prompt_rate(KVShape(3, 64, 64), torch.bfloat16, 9)
    assert rate is not None and 1e9 < rate.flops_per_s < 1e13 and 0 <= rate.part_s < 1e-4
    assert cpu_prompt_rate(KVShape(3, 64, 64), torch.float32, 9) is None
