"""What a mixture of experts computes, in few passes over its tokens: transformers' grouped products.

Rounded where transformers rounds, but that a CPU adds up a token's choices in float32.

Knows the modules that transformers' `use_experts_implementation` makes; neither how experts are fetched nor coded.

Shapes: T tokens, D model, C experts that a token chooses, S = T * C choices, X experts, I inputs and O outputs of a
product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, grouped_mm

from flexeval.engine.codecs.coded import CodedMatrices, Route
from flexeval.engine.compute.fusion import Fusion

MOST_COMPARED = 2048
"""Choices up to which a GPU orders them by comparing each with each, in one launch."""
_LAST = "down_proj"


def is_mixture(module: Any) -> bool:
    """Whether experts are two products with a gate or an activation between, and nothing else."""
    first = _first(module)
    biases = [f"{name}_bias" for name in (first, _LAST)] if module.has_bias else []
    has_more = getattr(module, "has_post_expert_norm", False)
    return not has_more and {name for name, _ in module.named_parameters()} == {first, _LAST, *biases}


def mix(
    module: Any,
    coded: Mapping[str, CodedMatrices],
    hidden_TD: Tensor,
    top_TC: Tensor,
    weights_TC: Tensor,
    fusion: Fusion,
) -> Tensor:
    """The experts' outputs for tokens, summed by their weights, `[T, D]`.

    Args:
        module: The experts.
        coded: By name, matrices that are multiplied as they rest; where there are none, the module has them.
        hidden_TD: The tokens.
        top_TC: Experts that each has chosen.
        weights_TC: Their shares in its output.
        fusion: Which operations are one pass.
    """
    expert_S = top_TC.reshape(-1)
    is_fused = fusion.is_on_gpu(hidden_TD)
    route = _find_route(expert_S, module.num_experts, is_fused=is_fused)
    x = hidden_TD
    if not coded:  # its rows in the order of experts, and back at the end
        expert_S = expert_S[route.order_S]
        x = _rows(hidden_TD, route.order_S // top_TC.shape[1])

    def project(name: str, x_SI: Tensor) -> Tensor:
        y_SO = coded[name].multiply(x_SI, route) if coded else _grouped_linear(module, name, x_SI, route.end_X)
        return y_SO.add_(getattr(module, f"{name}_bias")[expert_S]) if module.has_bias else y_SO

    x = project(_first(module), x)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = project(_LAST, x)
    place_S = None if coded else torch.empty_like(route.order_S)
    if place_S is not None:
        place_S[route.order_S] = torch.arange(len(place_S), device=place_S.device)
    if is_fused:
        return _sum_in_one(x, place_S, weights_TC, hidden_TD.dtype)
    if place_S is not None and x.device.type == "cpu" and x.dtype == weights_TC.dtype:  # three passes in one
        return embedding_bag(place_S.view_as(top_TC), x, per_sample_weights=weights_TC, mode="sum").to(hidden_TD.dtype)
    x = x if place_S is None else _rows(x, place_S)
    return (x.view(*top_TC.shape, -1) * weights_TC.unsqueeze(-1)).sum(1).to(hidden_TD.dtype)


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _rows(x: Tensor, which: Tensor) -> Tensor:
    """Some rows, by whichever of torch's two ways is fast on the device."""
    return x.index_select(0, which) if x.device.type == "cpu" else x[which]


def _find_route(expert_S: Tensor, num_experts: int, *, is_fused: bool) -> Route:
    if is_fused and len(expert_S) <= MOST_COMPARED and not expert_S.is_meta:
        from flexeval.engine.compute.mixture_kernel import find_route

        return find_route(expert_S, num_experts)
    sorted_S, order_S = expert_S.sort()
    each_X = torch.arange(num_experts, device=expert_S.device)
    return Route(order_S, torch.searchsorted(sorted_S, each_X, right=True, out_int32=True))


def _grouped_linear(module: nn.Module, name: str, x_SI: Tensor, end_X: Tensor) -> Tensor:
    """`x @ W.T` of each row with its expert's matrix; rows in the order of experts."""
    matrices: Tensor = getattr(module, name)
    matrices_XIO = matrices if module.is_transposed else matrices.transpose(-2, -1)
    x_SI = x_SI.to(matrices.dtype)
    if x_SI.is_cuda and torch.cuda.get_device_capability(x_SI.device) < (8, 0):  # torch has no kernel for it
        rows = x_SI.split(end_X.diff(prepend=end_X.new_zeros(1)).tolist())
        return torch.cat([part @ matrix_IO for part, matrix_IO in zip(rows, matrices_XIO, strict=True)])
    return grouped_mm(x_SI, matrices_XIO, offs=end_X)


def _sum_in_one(y_SD: Tensor, place_S: Tensor | None, weights_TC: Tensor, dtype: torch.dtype) -> Tensor:
    if y_SD.is_meta:
        return y_SD.new_zeros(len(weights_TC), y_SD.shape[1])  # writes as many numbers
    from flexeval.engine.compute.mixture_kernel import sum_choices

    return sum_choices(y_SD, place_S, weights_TC, dtype)
