"""Keys by channel: moved and scaled, they give the scores that they gave, up to a number a query."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexeval.engine.compute.channels import (
    LEAST_SHARE,
    MANTISSA,
    KeyChannels,
    KeyWatch,
    prompts_of_random_tokens,
)
from flexeval.engine.compute.port import AttentionOptions

PLAIN = AttentionOptions(scale=0.1)


def keys_with_large_channels() -> Tensor:
    """`[T, K, H]`; one channel of each head is far from the others, one hardly moves."""
    torch.manual_seed(0)
    k_TKH = torch.randn(40, 2, 16)
    k_TKH[:, 0, 3] = 40 + 2 * k_TKH[:, 0, 3]
    k_TKH[:, 1, 7] = 1e-9 * k_TKH[:, 1, 7]
    return k_TKH


def watched(*runs: Tensor, options: AttentionOptions = PLAIN) -> KeyChannels:
    watch = KeyWatch()
    for k_TKH in runs:
        q_TNH = torch.zeros(len(k_TKH), 4, 16)
        assert watch.around(5, lambda q, k, v, options: k)(q_TNH, k_TKH, k_TKH, options) is k_TKH
    return watch.found()._channels[5]


def test_every_channel_fills_about_the_same_range() -> None:
    k_TKH = keys_with_large_channels()
    rested = watched(k_TKH[:15], k_TKH[15:]).rest(k_TKH)
    largest_KH = rested.abs().amax(0)
    is_still = torch.zeros(2, 16, dtype=torch.bool)
    is_still[1, 7] = True
    assert (largest_KH[~is_still] <= 1 + 2 / MANTISSA).all()
    assert (largest_KH[~is_still] > 1 - 2 / MANTISSA).all()
    assert largest_KH[1, 7] < 1e-3, "noise is not blown up"


def test_scores_differ_by_one_number_a_query() -> None:
    k_TKH, q_TNH = keys_with_large_channels(), torch.randn(40, 4, 16)

    def scores(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, options: AttentionOptions) -> Tensor:
        return torch.einsum("tkmh,skh->tkms", q_TNH.unflatten(1, (2, 2)).double(), k_TKH.double())

    plain = scores(q_TNH, k_TKH, k_TKH, PLAIN)
    moved = watched(k_TKH).around(scores)(q_TNH, k_TKH, k_TKH, PLAIN)
    difference = plain - moved
    torch.testing.assert_close(difference, difference[..., :1].expand_as(difference), atol=2e-4, rtol=0)
    assert difference.abs().max() > 10


@pytest.mark.parametrize("options", [{"softcap": 30.0}, {"sinks_N": torch.zeros(4)}], ids=["softcap", "sinks"])
def test_where_that_number_would_be_seen_keys_are_only_scaled(options: dict[str, float | Tensor]) -> None:
    k_TKH = keys_with_large_channels()
    channels = watched(k_TKH, options=AttentionOptions(scale=0.1, **options))  # type: ignore[arg-type]
    assert not channels.middle_KH.any()
    assert channels.rest(k_TKH).abs().max() <= 1 + 1 / MANTISSA


def test_ranges_that_differ_by_rounding_give_the_same_channels() -> None:
    torch.manual_seed(1)
    low_KH, high_KH = -torch.rand(8, 64) - 0.1, torch.rand(8, 64) + 0.1
    noise = 1 + 1e-6 * torch.randn(8, 64)
    given = {"is_moved": True, "dtype": torch.float16}
    one, other = (
        KeyChannels.between(low, high, **given) for low, high in ((low_KH, high_KH), (low_KH * noise, high_KH))
    )
    for mine, theirs in zip(one, other, strict=True):
        assert (mine == theirs).float().mean() > 0.99


def test_a_head_of_zeros_is_left_alone() -> None:
    zeros_KH = torch.zeros(2, 16)
    channels = KeyChannels.between(zeros_KH, zeros_KH, is_moved=True, dtype=torch.float16)
    assert (channels.scale_KH > 0).all()
    assert torch.isfinite(channels.rest(torch.zeros(3, 2, 16, dtype=torch.float16))).all()
    assert LEAST_SHARE < 1


def test_the_tokens_are_the_same_every_time() -> None:
    assert prompts_of_random_tokens(100, 512) == prompts_of_random_tokens(100, 10**6)
    assert [len(ids) for ids in prompts_of_random_tokens(100, 20)] == [20, 20]
    assert max(map(max, prompts_of_random_tokens(100, 512))) == 99
