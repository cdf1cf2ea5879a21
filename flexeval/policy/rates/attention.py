"""How fast attention is: of prompts, and of single tokens. Knows no model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from flexeval.policy.rates.timing import FAST_BUDGET_S, best_seconds

GPU_SIZES = (1, 2048)
"""Prompts and tokens of each, on a GPU."""
SHORT_SIZES, LONG_SIZES = (64, 32), (4, 512)
"""The same on a CPU: as many tokens in stretches as evaluations have them, short and long."""
SINGLE_SIZES = (16, 256)
"""Sequences that attend with a token each, and the keys of each."""
NUM_HEADS = {"cpu": 8, "cuda": 32}
"""Heads of timed attention."""
HEAD_SIZE = {"cpu": 64, "cuda": 128}
"""Their size."""


class AttentionRates(NamedTuple):
    """As in `Hardware`."""

    flops_per_s: float
    part_s: float
    single_flops_per_s: float


def attention_rates(device: str, dtype: torch.dtype) -> AttentionRates:
    """What attention takes with each pair and, on a CPU, with each token: a line through short and long prompts.

    A CPU's kernel cuts keys and values in blocks for each head of each prompt, and brings them in order for products;
    of a short prompt that is most of its time, and with one token all of it.
    """
    num_heads, head_size = NUM_HEADS[device], HEAD_SIZE[device]
    if device == "cuda":
        rate = 4 * head_size * GPU_SIZES[1] / _token_seconds(device, dtype, *GPU_SIZES)
        return AttentionRates(rate, 0.0, rate)
    pair_s, part_s = line(*(_token_seconds(device, dtype, *sizes) for sizes in (SHORT_SIZES, LONG_SIZES)))
    single_s = _single_seconds(dtype, num_heads, head_size)
    return AttentionRates(4 * head_size / pair_s, part_s, 4 * head_size / single_s)


def line(short_s: float, long_s: float) -> tuple[float, float]:
    """Seconds of a pair, and of a token apart from that, by those of a token in short and long prompts, for a head.

    A token sees half of its prompt in the mean. Timings scatter: pairs take most of a long prompt in any case.
    """
    num_short, num_long = SHORT_SIZES[1], LONG_SIZES[1]
    pair_s = max(2 * (long_s - short_s) / (num_long - num_short), long_s / num_long)
    return pair_s, max(0.0, short_s - num_short / 2 * pair_s)


def _token_seconds(device: str, dtype: torch.dtype, num_prompts: int, num_tokens: int) -> float:
    """Of causal attention within prompts, for each token and head."""
    num_heads = NUM_HEADS[device]
    shape = (num_prompts, num_tokens, num_heads, HEAD_SIZE[device])
    q, k, v = (torch.randn(shape, device=device).to(dtype).transpose(1, 2) for _ in range(3))
    seconds = best_seconds(
        lambda: scaled_dot_product_attention(q, k, v, is_causal=True), device, budget_s=FAST_BUDGET_S
    )
    return seconds / (num_prompts * num_tokens * num_heads)


def _single_seconds(dtype: torch.dtype, num_heads: int, head_size: int) -> float:
    """Of a CPU's attention of single tokens, for each key and head."""
    num_sequences, num_keys = SINGLE_SIZES
    q, k, v = (
        torch.randn(num_sequences, num, num_heads, head_size).to(dtype).transpose(1, 2)
        for num in (1, num_keys, num_keys)
    )
    mask = torch.zeros(num_sequences, 1, 1, num_keys).to(dtype)
    seconds = best_seconds(lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask), "cpu", budget_s=FAST_BUDGET_S)
    return seconds / (num_sequences * num_keys * num_heads)
