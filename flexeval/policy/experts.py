"""How much of a layer of experts a sweep needs, before its routers have chosen. Knows numbers; no model, no machine."""

from __future__ import annotations

from flexeval.policy.work import ModelShape

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


def met_part(shape: ModelShape, num_tokens: float) -> float:
    """Expected part of a layer's bytes that at least one of `num_tokens` tokens is multiplied by, in (0, 1]."""
    share = chosen_share(shape.num_experts, shape.experts_per_token, num_tokens)
    return 1 - shape.expert_share * (1 - share)


def fetched_part(shape: ModelShape, num_tokens: float) -> float:
    """Expected part of a layer's bytes that a sweep of `num_tokens` tokens moves and unpacks, in (0, 1]."""
    by_need = is_by_need(shape.num_experts, shape.experts_per_token, num_tokens)
    return met_part(shape, num_tokens) if by_need else 1.0
