"""Where a layer's experts meet the engine: one function registered with transformers, one port per layer.

A layer that rests elsewhere, or is packed, has the experts' matrices fetched once its router has chosen; then all
tokens of a row are computed grouped by expert, which touches chosen experts alone. Knows transformers' experts
interface; neither where matrices rest nor what is computed.

Shapes: T tokens, D model, C experts that a token chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from flexeval.engine.codecs.coded import CodedMatrices
from flexeval.engine.compute.fusion import Fusion
from flexeval.engine.compute.mixture import is_mixture, mix

EXPERTS_NAME = "flexeval"
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")

Fetch = Callable[[Tensor], None]
"""Told the experts that tokens chose (any shape, repeated); when it returns, the parameters of these are valid."""


class ExpertsPort:
    """The engine says here how one layer's experts are fetched; they come by whenever the layer runs."""

    def __init__(self, fusion: Fusion, *, is_mixture: bool) -> None:
        self.fusion = fusion
        """Which operations are one launch."""
        self.is_mixture = is_mixture
        """Whether we know what they compute."""
        self.fetch: Fetch | None = None
        """None where all of them are there."""
        self.coded: dict[str, CodedMatrices] = {}
        """By name of a parameter, what to multiply by as it rests; the parameter is None then."""
        self.is_waiting = False
        """Whether the layer's experts have not come by since this was set."""


class Experts:
    """The stacked experts of one layer."""

    def __init__(self, name: str, module: nn.Module, per_token: int, fusion: Fusion):
        self.name = name
        """Their name within the layer."""
        self.num_experts = cast(int, module.num_experts)
        """How many there are."""
        self.per_token = per_token
        """How many of them a token chooses."""
        self.parameters = frozenset(f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False))
        """Names of their parameters within the layer, each `[num_experts, ...]`."""
        self.port = ExpertsPort(fusion, is_mixture=is_mixture(module))
        """Where the module asks for them."""
        self.codable = self.parameters if self.port.is_mixture else frozenset()
        """Of these, the ones that may be bound as they rest."""
        module.experts_port = self.port  # type: ignore[assignment]

    def is_router(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a tensor of the layer is a matrix that chooses among them: beside them, with a row for each."""
        is_beside = name.startswith(self.name.rpartition(".")[0]) and name not in self.parameters
        return is_beside and len(shape) == 2 and shape[0] == self.num_experts


def register_experts() -> None:
    """Make `experts_implementation="flexeval"` known to transformers; harmless when done again."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, _experts)


def experts_per_token(config: PretrainedConfig) -> int:
    """How many experts of a layer a token chooses; 1 without, or where the configuration has an unknown word for it."""
    numbers = (getattr(config, name, None) for name in _EXPERTS_PER_TOKEN)
    return next((number for number in numbers if isinstance(number, int) and number > 0), 1)


def find_experts(layer: nn.Module, per_token: int, fusion: Fusion) -> Experts | None:
    """The experts of a layer that run through transformers' interface; None where there is not one module of them."""
    found = [(name, module) for name, module in layer.named_modules() if _is_stack(module)]
    return Experts(*found[0], per_token, fusion) if len(found) == 1 else None


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
        if port.is_mixture:
            return mix(module, port.coded, hidden_TD, top_TC, weights_TC, port.fusion)
    return grouped_mm_experts_forward(module, hidden_TD, top_TC, weights_TC)
