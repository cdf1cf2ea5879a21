"""Activations that linear layers do themselves: only right after one, and with the numbers they had."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_config
from torch import Tensor, nn
from torch.nn.functional import relu

from flexeval.engine.compute.activations import find_activated, fuse_activated
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.elementwise import results_per_token
from flexeval.engine.compute.fusion import Fusion
from flexeval.engine.compute.linear import CodedLinear, make_coded
from flexeval.engine.compute.trying import ACTIVATIONS

WIDTH, INNER = 48, 96


class Function(nn.Module):
    """An activation as a module, as families have it."""

    def __init__(self, function: Callable[[Tensor], Tensor] = relu) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Plain(nn.Module):
    """As OPT has it."""

    def __init__(self, function: Callable[[Tensor], Tensor] = relu, *, bias: bool = True) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, INNER, bias=bias), nn.Linear(INNER, WIDTH, bias=bias)
        self.act = Function(function)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class TwiceActivated(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc2(self.act(self.fc1(x))))  # type: ignore[no-any-return]


class TwiceMultiplied(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)) + self.fc1(2 * x))  # type: ignore[no-any-return]


class Between(Plain):
    """Something else is between the two."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x) - 1))  # type: ignore[no-any-return]


class Failing(Plain):
    def forward(self, x: Tensor) -> Tensor:
        self.act(self.fc1(x))
        raise ValueError("other arguments")


def fused(module: nn.Module, *, device: str = "cpu") -> nn.Module:
    make_coded(module)
    x = torch.randn(1, 2, WIDTH, device=device, dtype=next(module.parameters()).dtype)
    fuse_activated(module, find_activated(module, lambda: lambda: module(x)), Fusion())
    return module


def kinds(module: nn.Module) -> dict[str, str]:
    """Activation of each linear layer that has one."""
    linears = {name: child for name, child in module.named_modules() if isinstance(child, CodedLinear)}
    return {name: child.activation.kind for name, child in linears.items() if child.activation is not None}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_computes_what_it_did(dtype: torch.dtype, bias: bool, activation: str) -> None:
    module = Plain(ACTIVATIONS[activation], bias=bias).to(dtype)
    make_coded(module)
    x = torch.randn(1, 300, WIDTH).mul(3).to(dtype)
    expected = module(x)
    assert kinds(fused(module)) == {"fc1": activation}
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("kind", [TwiceActivated, TwiceMultiplied, Between, Failing])
def test_other_blocks_stay_as_they_are(kind: type[nn.Module]) -> None:
    assert kinds(fused(kind())) == {}


def test_a_block_of_another_activation_stays() -> None:
    assert kinds(fused(Plain(lambda x: relu(x).square()))) == {}
    assert kinds(fused(Plain(lambda x: relu(x).clamp(max=1e4)))) == {}


@pytest.mark.parametrize(
    ("family", "found"),
    [
        ("opt", {"fc1": "relu"}),
        ("gpt_neox", {"mlp.dense_h_to_4h": "gelu"}),
        ("phi", {"mlp.fc1": "gelu_tanh"}),
        ("starcoder2", {"mlp.c_fc": "gelu_tanh"}),
        *((family, {}) for family in ("llama", "gemma2", "gpt2", "mixtral", "deepseek_v3")),
    ],
)
def test_the_blocks_of_families_are_found(family: str, found: dict[str, str]) -> None:
    assert [kinds(layer) for layer in Anatomy(tiny_config(family), torch.float32).layers] == [found] * 4


def test_what_a_product_writes_is_counted_on_a_gpu_no_more() -> None:
    """And elsewhere once."""
    config = tiny_config("opt")
    anatomy = Anatomy(config, torch.float32)
    on_cpu, on_gpu = (results_per_token(anatomy, torch.device(device)) for device in ("cpu", "cuda"))
    assert on_cpu - on_gpu == config.ffn_dim


def test_where_products_activate_they_are_called_so() -> None:
    """Without a GPU torch does the same in two passes."""

    class Always(Fusion):
        def is_on_gpu(self, x: Tensor) -> bool:
            return True

    module, x = fused(Plain()), torch.randn(2, 5, WIDTH)
    expected = module(x)
    assert module.fc1.activation is not None
    module.fc1.activation = module.fc1.activation._replace(fusion=Always())
    torch.testing.assert_close(module(x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 3, 300])
@torch.inference_mode()
def test_on_a_gpu_relu_is_the_products(num_tokens: int, dtype: torch.dtype) -> None:
    module = Plain().cuda().to(dtype)
    make_coded(module)
    x = torch.randn(1, num_tokens, WIDTH, device="cuda").to(dtype)
    expected, names = module(x), kernels(lambda: module(x))
    fused(module, device="cuda")
    assert len(kernels(lambda: module(x))) < len(names)
    error = {torch.float16: 2**-9, torch.bfloat16: 2**-6, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(module(x), expected, rtol=0, atol=error * float(expected.abs().max()))
    exact = relu(x.double() @ module.fc1.weight.double().t() + module.fc1.bias.double())  # type: ignore[union-attr]
    torch.testing.assert_close(module.fc1(x).double(), exact, rtol=error, atol=error)  # type: ignore[operator]


def kernels(run: Callable[[], object]) -> list[str]:
    """What runs on the GPU."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in events if not event.name.startswith("Mem")]
