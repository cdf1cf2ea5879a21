"""Prompts' attention on a GPU, within runs and to what lies before, against softmax written out in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import QUERY_BLOCK, Runs, make_runs
from flexeval.engine.compute.runs import attend_before, attend_within_runs
from flexeval.planning.rows import FreshSpan

LENGTHS = (1, 130, 3, QUERY_BLOCK, 300, QUERY_BLOCK + 1)
FIRST = 20
"""Position of the first key that lies before all queries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    heads: tuple[int, int] = (4, 4)
    """Of queries and of keys."""
    sizes: tuple[int, int] = (64, 64)
    """Of a key and of a value."""
    window: int | None = None
    softcap: float | None = None


SHAPES = {
    "plain": Shape(),
    "grouped-heads": Shape(heads=(8, 2), sizes=(128, 128)),
    "one-kv-head": Shape(heads=(6, 1), sizes=(80, 80)),
    "small": Shape(sizes=(16, 16)),
    "sizes-of-no-kernel": Shape(heads=(4, 2), sizes=(20, 12)),
    "latent": Shape(sizes=(192, 128)),
    "large": Shape(heads=(8, 4), sizes=(256, 256)),
    "window": Shape(sizes=(96, 96), window=50),
    "window-of-one": Shape(window=1),
    "softcap": Shape(heads=(8, 4), sizes=(256, 256), softcap=30.0),
    "softcap-window": Shape(heads=(8, 4), sizes=(128, 128), softcap=30.0, window=100),
}


def is_for_torch(shape: Shape) -> bool:
    """Whether keys before all queries are for torch's kernel, which is tested as a part."""
    return shape.sizes[0] == shape.sizes[1] and shape.sizes[0] % 8 == 0 and shape.window is shape.softcap is None


def runs_of(lengths: Sequence[int], device: str) -> Runs:
    starts = np.cumsum([0, *lengths])
    spans = [FreshSpan(node=i, start=int(starts[i]), length=length) for i, length in enumerate(lengths)]
    return make_runs(spans, torch.device(device))


def test_blocks_of_queries_are_all_and_those_that_see_most_come_first() -> None:
    blocks_U3 = runs_of(LENGTHS, "cpu").blocks_U3.tolist()
    tokens = sorted(token for _, stop, first in blocks_U3 for token in range(first, min(first + QUERY_BLOCK, stop)))
    assert tokens == list(range(sum(LENGTHS)))
    seen = [first - start for start, _, first in blocks_U3]
    assert seen == sorted(seen, reverse=True) and max(seen) == 256


def test_a_cpu_has_none_of_these_kernels() -> None:
    q, k, v = (torch.randn(sum(LENGTHS), 4, 64, dtype=torch.bfloat16) for _ in range(3))
    assert attend_within_runs(q, k, v, runs_of(LENGTHS, "cpu"), AttentionOptions(scale=1.0)) is None
    positions = torch.arange(len(q))
    assert attend_before(q, k, v, positions, 0, AttentionOptions(scale=1.0)) is None


def draw(num_tokens: int, num_heads: int, size: int, dtype: torch.dtype) -> Tensor:
    """With room between heads, as parts of one product's result have it."""
    return torch.randn(num_tokens, num_heads, size + 8, device="cuda").to(dtype)[..., :size]


def exact(q_TNH: Tensor, k_SKH: Tensor, v_SKW: Tensor, is_seen_TS: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    heads_per_kv = shape.heads[0] // shape.heads[1]
    k_SNH, v_SNW = (x.double().repeat_interleave(heads_per_kv, 1) for x in (k_SKH, v_SKW))
    scores_NTS = torch.einsum("tnh,snh->nts", q_TNH.double(), k_SNH) * scale_of(shape)
    if shape.softcap is not None:
        scores_NTS = shape.softcap * torch.tanh(scores_NTS / shape.softcap)
    scores_NTS = scores_NTS.masked_fill(~is_seen_TS, -torch.inf)
    lse_NT = scores_NTS.logsumexp(-1)
    weights_NTS = (scores_NTS - lse_NT[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("nts,snw->tnw", weights_NTS, v_SNW), lse_NT.t()


def scale_of(shape: Shape) -> float:
    return 1.5 * shape.sizes[0] ** -0.5


def assert_near(made: tuple[Tensor, Tensor] | None, wanted: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    assert made is not None
    error = 2**-6 if dtype == torch.bfloat16 else 2**-9  # weights are rounded, and the output
    assert made[0].dtype == dtype and made[1].dtype == torch.float32
    torch.testing.assert_close(made[0].double(), wanted[0], rtol=0, atol=error * float(wanted[0].abs().max()))
    torch.testing.assert_close(made[1].double(), wanted[1], rtol=0, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_within_runs(name: str, dtype: torch.dtype) -> None:
    shape, num_tokens = SHAPES[name], sum(LENGTHS)
    q = draw(num_tokens, shape.heads[0], shape.sizes[0], dtype)
    k, v = (draw(num_tokens, shape.heads[1], size, dtype) for size in shape.sizes)
    run_T = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).cuda()
    token_T = torch.arange(num_tokens, device="cuda")
    distance_TT = token_T[:, None] - token_T
    is_seen_TT = (run_T[:, None] == run_T) & (distance_TT >= 0) & (distance_TT < (shape.window or num_tokens))
    options = AttentionOptions(scale=scale_of(shape), window=shape.window, softcap=shape.softcap)
    made = attend_within_runs(q, k, v, runs_of(LENGTHS, "cuda"), options)
    assert_near(made, exact(q, k, v, is_seen_TT, shape), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("num_keys", [1, 64, 333])
@pytest.mark.parametrize("num_tokens", [1, QUERY_BLOCK, 517])
@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if not is_for_torch(shape)])
@torch.inference_mode()
def test_to_what_lies_before(name: str, num_tokens: int, num_keys: int) -> None:
    """A window ends before all of it for some queries: nothing is seen, and it weighs nothing."""
    shape, dtype = SHAPES[name], torch.bfloat16
    q = draw(num_tokens, shape.heads[0], shape.sizes[0], dtype)
    k, v = (draw(num_keys, shape.heads[1], size, dtype) for size in shape.sizes)
    position_T = FIRST + num_keys + torch.arange(num_tokens, device="cuda") % 200
    distance_TS = position_T[:, None] - (FIRST + torch.arange(num_keys, device="cuda"))
    is_seen_TS = distance_TS < (shape.window or 10**6)
    options = AttentionOptions(scale=scale_of(shape), window=shape.window, softcap=shape.softcap)
    made = attend_before(q, k, v, position_T, FIRST, options)
    assert_near(made, exact(q, k, v, is_seen_TS, shape), dtype)


@pytest.mark.gpu
@torch.inference_mode()
def test_a_run_is_the_same_beside_others() -> None:
    """To the bit, whatever they are: requests that are kept apart count on it."""
    shape = SHAPES["grouped-heads"]
    q = draw(sum(LENGTHS), shape.heads[0], shape.sizes[0], torch.bfloat16)
    k, v = (draw(sum(LENGTHS), shape.heads[1], size, torch.bfloat16) for size in shape.sizes)
    options = AttentionOptions(scale=scale_of(shape))
    together = attend_within_runs(q, k, v, runs_of(LENGTHS, "cuda"), options)
    start, stop = sum(LENGTHS[:4]), sum(LENGTHS[:5])
    alone = attend_within_runs(q[start:stop], k[start:stop], v[start:stop], runs_of([LENGTHS[4]], "cuda"), options)
    assert together is not None and alone is not None
    assert torch.equal(together[0][start:stop], alone[0]) and torch.equal(together[1][start:stop], alone[1])


@pytest.mark.gpu
def test_other_numbers_are_for_other_kernels() -> None:
    options = AttentionOptions(scale=1.0)
    for dtype, size in ((torch.float32, 64), (torch.bfloat16, 320)):
        q, k, v = (torch.randn(5, 2, size, device="cuda", dtype=dtype) for _ in range(3))
        assert attend_within_runs(q, k, v, runs_of([5], "cuda"), options) is None
        assert attend_before(q, k, v, torch.arange(5, device="cuda"), 0, AttentionOptions(scale=1.0)) is None
    q, k, v = (torch.randn(5, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    assert attend_before(q, k, v, torch.arange(5, device="cuda"), 0, AttentionOptions(scale=1.0)) is None
