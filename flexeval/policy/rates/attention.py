"""How fast attention is. Knows no model."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from flexeval.policy.rates.timing import FAST_BUDGET_S, best_seconds

ATTENTION_SIZES = {"cpu": (8, 128, 64), "cuda": (32, 2048, 128)}
"""Heads, tokens and head size of timed attention."""


def attention_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of causal attention within prompts, the pairs that it hides counted as well."""
    heads, tokens, size = ATTENTION_SIZES[device]
    q, k, v = (torch.randn(1, heads, tokens, size, device=device).to(dtype) for _ in range(3))
    seconds = best_seconds(
        lambda: scaled_dot_product_attention(q, k, v, is_causal=True), device, budget_s=FAST_BUDGET_S
    )
    return 4 * heads * size * tokens**2 / seconds
