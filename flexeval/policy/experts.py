"""How much of a layer of experts a sweep needs, before its routers have chosen. Knows numbers; no model, no machine."""

from __future__ import annotations

BY_NEED_SHARE = 0.75
"""Up to this expected share of chosen experts it pays to wait for the choice: experts come late then, when the layer
wants them, where a whole layer comes while the one before it is computed."""


def chosen_share(num_experts: int, per_token: int, num_tokens: float) -> float:
    """Expected share of a layer's experts that at least one of `num_tokens` tokens chooses, in [0, 1].

    1 - (1 - k / E) ** T, were all experts equally likely. Real routers prefer some, so it is rarely more.
    """
    return float(1 - (1 - min(1.0, per_token / num_experts)) ** num_tokens)


def is_by_need(num_experts: int, per_token: int, num_tokens: float) -> bool:
    """Whether a sweep of `num_tokens` tokens fetches experts as they are chosen, or the layer as a whole."""
    return chosen_share(num_experts, per_token, num_tokens) <= BY_NEED_SHARE


def fetched_share(num_experts: int, per_token: int, num_tokens: float) -> float:
    """Expected share of a layer's experts that a sweep of `num_tokens` tokens fetches and unpacks."""
    if not is_by_need(num_experts, per_token, num_tokens):
        return 1.0
    return chosen_share(num_experts, per_token, num_tokens)
