"""Attention over parts of the keys: the reference against softmax written out, the kernels against the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexeval.engine.compute.partial import Partial, merge_into, partial_attention, reference_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes, and what is asked."""

    num_sequences: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4
    num_queries: int = 5
    num_keys: int = 9
    key_size: int = 16
    value_size: int = 16
    is_causal: bool = False
    mask: tuple[int, int] | None = None  # sequences and queries of the mask; 1 broadcasts
    softcap: float | None = None

    def inputs(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Queries, keys, values, laid out token by token as the engine has them, and the options."""
        generator = torch.Generator().manual_seed(0)

        def draw(num_tokens: int, num_heads: int, size: int) -> Tensor:
            tokens = torch.randn(self.num_sequences, num_tokens, num_heads, size, generator=generator)
            return tokens.to(device, dtype).transpose(1, 2)

        q_BNQH = draw(self.num_queries, self.num_heads, self.key_size)
        k_BKSH = draw(self.num_keys, self.num_kv_heads, self.key_size)
        v_BKSW = draw(self.num_keys, self.num_kv_heads, self.value_size)
        mask_BQS = None
        if self.mask is not None:
            mask_BQS = torch.rand(*self.mask, self.num_keys, generator=generator) < 0.5
            mask_BQS[0, 0] = False  # a query that sees nothing
            mask_BQS[-1, -1] = self.mask != (1, 1)
            mask_BQS = mask_BQS.to(device)
        options = {"is_causal": self.is_causal, "mask_BQS": mask_BQS, "softcap": self.softcap}
        return q_BNQH, k_BKSH, v_BKSW, {"scale": 1.2 * self.key_size**-0.5, **options}


SHAPES = {
    "plain": Shape(),
    "grouped-heads": Shape(num_kv_heads=2),
    "one-kv-head": Shape(num_heads=6, num_kv_heads=1),
    "causal": Shape(num_queries=9, is_causal=True),
    "causal-long": Shape(num_queries=130, num_keys=130, num_kv_heads=2, is_causal=True),
    "decode": Shape(num_sequences=7, num_queries=1, num_keys=40, num_kv_heads=1, mask=(7, 1)),
    "masked": Shape(mask=(2, 5), num_kv_heads=2),
    "one-mask-for-all-sequences": Shape(mask=(1, 5)),
    "one-mask-for-all-queries": Shape(mask=(2, 1)),
    "all-blind": Shape(mask=(1, 1), num_kv_heads=2),
    "softcap": Shape(softcap=1.5, num_kv_heads=2, mask=(2, 5)),
    "softcap-causal": Shape(num_queries=9, softcap=1.5, is_causal=True),
    "narrow-values": Shape(value_size=12, num_kv_heads=2, mask=(2, 5)),
    "wide-values-causal": Shape(num_queries=9, value_size=24, is_causal=True),
    "odd-head-size": Shape(key_size=100, value_size=100, num_kv_heads=2),
    "odd-head-size-causal": Shape(key_size=20, value_size=20, num_queries=9, is_causal=True),
    "odd-head-size-masked": Shape(key_size=12, value_size=12, num_kv_heads=2, mask=(2, 5)),
    "large-heads": Shape(key_size=320, value_size=320, num_kv_heads=2),
    "one-key": Shape(num_keys=1),
    "long": Shape(num_queries=70, num_keys=600, num_kv_heads=1, mask=(1, 70)),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def written_out(
    q_BNQH: Tensor,
    k_BKSH: Tensor,
    v_BKSW: Tensor,
    *,
    scale: float,
    is_causal: bool,
    mask_BQS: Tensor | None,
    softcap: Any,
) -> Partial:
    """Softmax attention in float64, one query of one head at a time."""
    num_sequences, num_heads, num_queries, _ = q_BNQH.shape
    out = torch.zeros(num_sequences, num_heads, num_queries, v_BKSW.shape[-1], dtype=torch.float64)
    lse = torch.full((num_sequences, num_heads, num_queries), -torch.inf, dtype=torch.float64)
    for b, n, q in torch.cartesian_prod(*map(torch.arange, (num_sequences, num_heads, num_queries))).tolist():
        kv_head = n // (num_heads // k_BKSH.shape[1])
        seen = torch.ones(k_BKSH.shape[2], dtype=torch.bool)
        if is_causal:
            seen[q + 1 :] = False
        if mask_BQS is not None:
            seen = mask_BQS[b % mask_BQS.shape[0], q % mask_BQS.shape[1]].cpu()
        if not seen.any():
            continue
        scores = k_BKSH[b, kv_head].cpu().double()[seen] @ q_BNQH[b, n, q].cpu().double() * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        total = scores.exp().sum()
        out[b, n, q] = scores.exp() / total @ v_BKSW[b, kv_head].cpu().double()[seen]
        lse[b, n, q] = total.log()
    return Partial(out, lse)


@every_shape
def test_reference_is_softmax_written_out(shape: Shape) -> None:
    q_BNQH, k_BKSH, v_BKSW, options = shape.inputs("cpu", torch.float32)
    expected = written_out(q_BNQH, k_BKSH, v_BKSW, **options)
    measured = reference_attention(q_BNQH, k_BKSH, v_BKSW, **options)
    torch.testing.assert_close(measured.out_BNQW.double(), expected.out_BNQW, atol=2e-6, rtol=0)
    torch.testing.assert_close(measured.lse_BNQ.double(), expected.lse_BNQ, atol=2e-6, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.bfloat16, 0.02), (torch.float16, 0.003)],
    ids=["float32", "bfloat16", "float16"],
)
@every_shape
def test_kernels_equal_the_reference(shape: Shape, dtype: torch.dtype, tolerance: float, device: str) -> None:
    q_BNQH, k_BKSH, v_BKSW, options = shape.inputs(device, dtype)
    expected = reference_attention(q_BNQH.float(), k_BKSH.float(), v_BKSW.float(), **options)
    measured = partial_attention(q_BNQH, k_BKSH, v_BKSW, **options)
    assert (measured.out_BNQW.dtype, measured.lse_BNQ.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(measured.out_BNQW.float(), expected.out_BNQW, atol=tolerance, rtol=0)
    torch.testing.assert_close(measured.lse_BNQ, expected.lse_BNQ, atol=tolerance / 4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["decode", "masked", "softcap", "narrow-values", "odd-head-size-masked"])
def test_a_bias_is_a_mask(name: str, dtype: torch.dtype) -> None:
    q_BNQH, k_BKSH, v_BKSW, options = SHAPES[name].inputs("cpu", dtype)
    mask_BQS = options.pop("mask_BQS")
    mask_BQS[..., 0] = True  # every query sees something
    bias_BQS = torch.where(mask_BQS, 0.0, -torch.inf)
    masked = partial_attention(q_BNQH, k_BKSH, v_BKSW, mask_BQS=mask_BQS, **options)
    biased = partial_attention(q_BNQH, k_BKSH, v_BKSW, bias_BQS=bias_BQS, **options)
    assert masked.out_BNQW.equal(biased.out_BNQW) and masked.lse_BNQ.equal(biased.lse_BNQ)


@pytest.mark.parametrize("device", DEVICES)
def test_a_query_that_sees_nothing_has_output_0_and_no_weight(device: str) -> None:
    q_BNQH, k_BKSH, v_BKSW, options = SHAPES["masked"].inputs(device, torch.float32)
    partial = partial_attention(q_BNQH, k_BKSH, v_BKSW, **options)
    assert partial.out_BNQW[0, :, 0].eq(0).all()
    assert partial.lse_BNQ[0, :, 0].eq(-math.inf).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.sets(st.integers(1, 11), max_size=4), width=st.sampled_from([16, 8]))
def test_merged_parts_are_attention_over_the_whole(seed: int, cuts: set[int], width: int) -> None:
    """The first part holds a key that every query sees, as a token's own context does; others may be invisible."""
    generator = torch.Generator().manual_seed(seed)
    q_BNQH = torch.randn(1, 4, 6, 16, generator=generator) * 3
    k_BKSH, v_BKSW = torch.randn(1, 2, 12, 16, generator=generator), torch.randn(1, 2, 12, width, generator=generator)
    mask_BQS = torch.rand(1, 6, 12, generator=generator) < 0.4
    mask_BQS[..., 0] = True
    whole = reference_attention(q_BNQH, k_BKSH, v_BKSW, scale=0.5, mask_BQS=mask_BQS)
    bounds = [0, *sorted(cuts), 12]
    parts = [
        partial_attention(q_BNQH, k_BKSH[:, :, a:b], v_BKSW[:, :, a:b], scale=0.5, mask_BQS=mask_BQS[..., a:b])
        for a, b in pairwise(bounds)
    ]
    out_TNW, lse_TN = parts[0].out_BNQW[0].transpose(0, 1).clone(), parts[0].lse_BNQ[0].T.clone()
    for part in parts[1:]:
        merge_into(out_TNW, lse_TN, part.out_BNQW[0].transpose(0, 1), part.lse_BNQ[0].T)
    torch.testing.assert_close(out_TNW, whole.out_BNQW[0].transpose(0, 1), atol=5e-6, rtol=0)
    torch.testing.assert_close(lse_TN, whole.lse_BNQ[0].T, atol=5e-6, rtol=1e-6)


def test_merging_far_apart_scores_neither_overflows_nor_forgets() -> None:
    for own, other in ((900.0, -900.0), (-900.0, 900.0), (88.0, 89.0)):
        out_TNW, lse_TN = torch.tensor([[[1.0]]]), torch.tensor([[own]])
        merge_into(out_TNW, lse_TN, torch.tensor([[[3.0]]]), torch.tensor([[other]]))
        weight = 1 / (1 + math.exp(min(own - other, 700)))
        assert out_TNW.item() == pytest.approx(1 + 2 * weight, abs=1e-6)
        assert lse_TN.item() == pytest.approx(max(own, other) + math.log1p(math.exp(-abs(own - other))), abs=1e-4)


def test_a_mask_and_causality_together_are_refused() -> None:
    q_BNQH, k_BKSH, v_BKSW, options = SHAPES["causal"].inputs("cpu", torch.float32)
    options["mask_BQS"] = torch.ones(1, 9, 9, dtype=torch.bool)
    with pytest.raises(AssertionError):
        partial_attention(q_BNQH, k_BKSH, v_BKSW, **options)
