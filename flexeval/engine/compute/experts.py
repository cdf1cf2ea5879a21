"""Where a layer's experts meet the engine: one function registered with transformers, one port per layer.

A layer that rests elsewhere, or is packed, has the experts' matrices fetched once its router has chosen; then all
tokens of a row are computed grouped by expert, by transformers' grouped products. Those touch chosen experts alone, and
are the fastest way it has on a CPU as on a GPU. Knows transformers' experts interface; not where matrices rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

EXPERTS_NAME = "flexeval"
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")

Fetch = Callable[[Tensor], None]
"""Told the experts that tokens chose (any shape, repeated); when it returns, the parameters of these are valid."""


class ExpertsPort:
    """The engine says here how one layer's experts are fetched; they come by whenever the layer runs."""

    def __init__(self) -> None:
        self.fetch: Fetch | None = None
        """None where all of them are there."""
        self.is_waiting = False
        """Whether the layer's experts have not come by since this was set."""


class Experts:
    """The stacked experts of one layer."""

    def __init__(self, name: str, module: nn.Module, per_token: int):
        self.name = name
        """Their name within the layer."""
        self.num_experts = cast(int, module.num_experts)
        """How many there are."""
        self.per_token = per_token
        """How many of them a token chooses."""
        self.parameters = frozenset(f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False))
        """Names of their parameters within the layer, each `[num_experts, ...]`."""
        self.port = ExpertsPort()
        """Where the module asks for them."""
        module.experts_port = self.port  # type: ignore[assignment]


def register_experts() -> None:
    """Make `experts_implementation="flexeval"` known to transformers; harmless when done again."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, _experts)


def experts_per_token(config: PretrainedConfig) -> int:
    """How many experts of a layer a token chooses; 1 without, or where the configuration has an unknown word for it."""
    numbers = (getattr(config, name, None) for name in _EXPERTS_PER_TOKEN)
    return next((number for number in numbers if isinstance(number, int) and number > 0), 1)


def find_experts(layer: nn.Module, per_token: int) -> Experts | None:
    """The experts of a layer that run through transformers' interface; None where there is not one module of them."""
    found = [(name, module) for name, module in layer.named_modules() if _is_stack(module)]
    return Experts(*found[0], per_token) if len(found) == 1 else None


def _is_stack(module: nn.Module) -> bool:
    """Whether transformers' `use_experts_implementation` made it, and each parameter has a row for every expert."""
    if not hasattr(module, "is_concatenated") or not hasattr(module, "num_experts"):
        return False
    parameters = list(module.parameters(recurse=False))
    return bool(parameters) and all(len(parameter) == module.num_experts for parameter in parameters)


def _experts(module: nn.Module, hidden_TD: Tensor, top_TC: Tensor, weights_TC: Tensor) -> Tensor:
    """Transformers' experts interface: C of the experts for each token, and their shares in its output."""
    port = getattr(module, "experts_port", None)
    if port is not None:
        assert isinstance(port, ExpertsPort)
        port.is_waiting = False
        if port.fetch is not None:
            port.fetch(top_TC)
    return grouped_mm_experts_forward(module, hidden_TD, top_TC, weights_TC)
