"""What experts compute together: against transformers' own way, one expert after the other, in every form they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_engine_experts import CHANGES, NUM_EXPERTS, PER_TOKEN, config_of
from tiny_models import tiny_config
from torch import Tensor, nn

from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.fusion import Fusion
from flexeval.engine.compute.mixture import MOST_COMPARED, is_mixture, mix

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def experts_of(family: str, device: str, dtype: torch.dtype) -> Any:
    """The experts of a layer, with random numbers, beside their fused gates."""
    anatomy = Anatomy(config_of(family), dtype)
    experts = anatomy.experts[2]
    assert experts is not None and is_mixture(anatomy.layers[2].get_submodule(experts.name))
    module = anatomy.layers[2].get_submodule(experts.name).to_empty(device=device)
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.2).to(device, dtype)
    return module


def one_after_the_other(module: Any, hidden_TD: Tensor, top_TC: Tensor, weights_TC: Tensor) -> Tensor:
    """By the class's own loop over experts, in float64."""
    plain = type(module).forward.__wrapped__
    double = {name: parameter.double() for name, parameter in module.named_parameters()}
    kept = {name: parameter.data for name, parameter in module.named_parameters()}
    try:
        for name, parameter in module.named_parameters():
            parameter.data = double[name]
        return plain(module, hidden_TD.double(), top_TC, weights_TC.double())  # type: ignore[no-any-return]
    finally:
        for name, parameter in module.named_parameters():
            parameter.data = kept[name]


@DEVICES
@pytest.mark.parametrize("family", CHANGES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["weights in float32", "weights as numbers"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("num_tokens", [1, 37, MOST_COMPARED // PER_TOKEN + 1])
@torch.inference_mode()
def test_a_mixture_is_its_experts_one_after_the_other(
    num_tokens: int, dtype: torch.dtype, tolerance: float, weight_dtype: torch.dtype | None, family: str, device: str
) -> None:
    """Some experts are chosen by no token, one by all."""
    module = experts_of(family, device, dtype)
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_TD = torch.randn(num_tokens, 64, generator=generator).to(device, dtype)
    chosen_TX = torch.rand(num_tokens, NUM_EXPERTS // 2, generator=generator)
    chosen_TX[:, 3] = 2.0
    top_TC = chosen_TX.topk(PER_TOKEN).indices.to(device)
    weights_TC = torch.rand(num_tokens, PER_TOKEN, generator=generator).to(device, weight_dtype or dtype)
    want_TD = one_after_the_other(module, hidden_TD, top_TC, weights_TC)
    out_TD = mix(module, {}, hidden_TD, top_TC, weights_TC, Fusion())
    assert (out_TD.shape, out_TD.dtype) == (hidden_TD.shape, dtype)
    assert (out_TD.double() - want_TD).norm() / want_TD.norm() < tolerance
    assert torch.equal(mix(module, {}, hidden_TD, top_TC, weights_TC, Fusion()), out_TD)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "granitemoe", "qwen2_moe", *CHANGES])
def test_families_whose_experts_are_known(family: str) -> None:
    layer = Anatomy(tiny_config(family), torch.float32).layers[2]
    found = [module for module in layer.modules() if hasattr(module, "is_concatenated")]
    assert [is_mixture(module) for module in found] == [True]


@pytest.mark.parametrize("change", ["a norm behind", "a further matrix", "no bias where there is one"])
def test_experts_that_do_more_are_left_to_transformers(change: str) -> None:
    module: Any = experts_of("gpt_oss" if "bias" in change else "qwen3_moe", "cpu", torch.float32)
    changes: dict[str, Callable[[], None]] = {
        "a norm behind": lambda: setattr(module, "has_post_expert_norm", True),
        "a further matrix": lambda: setattr(module, "more", nn.Parameter(torch.zeros(NUM_EXPERTS, 2, 2))),
        "no bias where there is one": lambda: setattr(module, "has_bias", False),
    }
    changes[change]()
    assert not is_mixture(module)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_choices", "num_experts"), [(1, 128), (7, 3), (1024, 128), (2048, 512), (300, 1)])
def test_a_route_is_the_stable_order_by_expert(num_choices: int, num_experts: int) -> None:
    from flexeval.engine.compute.mixture_kernel import find_route

    expert_S = torch.randint(num_experts, (num_choices,), device="cuda")
    route = find_route(expert_S, num_experts)
    assert torch.equal(route.order_S, expert_S.sort(stable=True).indices)
    assert torch.equal(route.end_X, torch.bincount(expert_S, minlength=num_experts).cumsum(0).int())
