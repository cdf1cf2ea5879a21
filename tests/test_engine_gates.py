"""Gates that are activated and multiplied in one pass: only where a block computes that, and with its numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_config
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from flexeval.engine.compute import gates, host_passes
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.fusion import Fusion
from flexeval.engine.compute.gates import ACTIVATIONS, fuse_gates

WIDTH, INNER = 48, 80


class Gated(nn.Module):
    """As most families have it."""

    def __init__(self, act_fn: Callable[[Tensor], Tensor] = silu, *, bias: bool = False, inner: int = INNER) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, inner, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(inner, WIDTH, bias=bias)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class UpFirst(Gated):
    """Matrices in another order."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))  # type: ignore[no-any-return]


class Halved(nn.Module):
    """One matrix makes both halves, the gate first."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(WIDTH, 2 * INNER), nn.Linear(INNER, WIDTH)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(up * silu(gate))  # type: ignore[no-any-return]


class HalvedUpFirst(Halved):
    def forward(self, hidden_states: Tensor) -> Tensor:
        up, gate = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(up * gelu(gate))  # type: ignore[no-any-return]


class Interleaved(Halved):
    def forward(self, hidden_states: Tensor) -> Tensor:
        both = self.gate_up_proj(hidden_states)
        return self.down_proj(silu(both[..., ::2]) * both[..., 1::2])  # type: ignore[no-any-return]


class Clamped(Gated):
    """As gpt-oss does: no small number shows it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x).clamp(-1e3, 1e3))  # type: ignore[no-any-return]


class Scaled(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.001


class Ungated(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) + self.up_proj(x))  # type: ignore[no-any-return]


class Weighted(Gated):
    """Something besides its matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(INNER))


class OnlySums(nn.Module):
    """Two matrices that are no block."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)  # type: ignore[no-any-return]


class Experts(nn.Module):
    def __init__(self, limit: float | None = None) -> None:
        super().__init__()
        self.limit = limit

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate) * (up if self.limit is None else up.clamp(max=self.limit))


def is_fused(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return getattr(forward, "__module__", None) == gates.__name__ or "_apply_gate" in vars(module)


def trial(module: nn.Module) -> nn.Module:
    fuse_gates(module, Fusion())
    return module


@pytest.mark.parametrize("kind", [Clamped, Scaled, Ungated, Weighted, OnlySums, Interleaved])
def test_other_blocks_stay_as_they_are(kind: type[nn.Module]) -> None:
    assert not is_fused(trial(kind()))


def test_a_block_of_another_activation_stays() -> None:
    assert not is_fused(trial(Gated(lambda x: x * torch.sigmoid(1.702 * x))))
    assert not is_fused(trial(Gated(lambda x: silu(x.clamp(-1e4, 1e4)))))


def test_experts_that_clamp_stay() -> None:
    assert is_fused(trial(Experts())) and not is_fused(trial(Experts(7.0)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_a_kernel_a_block_computes_what_it_did(
    activation: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexeval.engine.compute.fusion.has_passes", lambda: False)
    module, x = Gated(ACTIVATIONS[activation], bias=bias).bfloat16(), torch.randn(2, 7, WIDTH, dtype=torch.bfloat16)
    expected = module(x)
    assert is_fused(trial(module)) and torch.equal(module(x), expected) and torch.equal(module(x=x), expected)


class Always(Fusion):
    def applies(self, x: Tensor) -> bool:
        return True


@pytest.mark.parametrize("kind", [Gated, UpFirst, Halved, HalvedUpFirst])
def test_the_right_half_is_activated_and_matrices_are_called_as_they_are_bound(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's operations in the kernel's place; a hook stands for a matrix that rests in codes."""
    monkeypatch.setattr(gates._Gate, "in_one", gates._Gate.plainly)
    module, x = kind(), torch.randn(3, WIDTH)
    expected = 2 * module(x)
    fuse_gates(module, Always())
    module.get_submodule("down_proj").register_forward_hook(lambda *called: 2 * called[-1])
    assert is_fused(module)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    ("family", "num_fused"),
    [
        *((family, 4) for family in ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "olmo2", "gemma2")),
        *((family, 4) for family in ("granite", "mixtral", "qwen3_moe")),
        ("deepseek_v3", 7),  # one dense layer; of three, experts and one that all tokens meet
        *((family, 0) for family in ("opt", "gpt2", "gpt_neox", "gpt_oss")),
    ],
)
def test_the_blocks_of_families_are_found(family: str, num_fused: int) -> None:
    anatomy = Anatomy(tiny_config(family), torch.float32)
    assert sum(is_fused(module) for layer in anatomy.layers for module in layer.modules()) == num_fused


DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)]
"""And the error of two roundings, with what they are added up to."""
NEARLY_ZERO = 2e-6
"""Where a GELU is so small, the float32 that it is computed in is as coarse, in torch's own as well."""


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def kernel_on(device: str) -> Callable[[Tensor, Tensor, str], Tensor]:
    if device == "cpu":
        return host_passes.multiply_activated
    from flexeval.engine.compute.gate_kernel import multiply_activated

    return multiply_activated


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "error"), DTYPES)
@pytest.mark.parametrize("shape", [(1, 37, 14336), (5, 1000), (2, 3, 96), (1, 1, 1), (0, 64)])
def test_the_kernel_computes_as_float64_does(
    shape: tuple[int, ...], dtype: torch.dtype, error: float, activation: str, device: str
) -> None:
    """Of tensors of their own, and of a tensor's halves."""
    multiply_activated = kernel_on(device)
    both = torch.randn(*shape[:-1], 2 * shape[-1], device=device).mul(2).to(dtype)
    gate, up = both.chunk(2, dim=-1)
    exact = ACTIVATIONS[activation](gate.double()) * up.double()
    for halves in ((gate, up), (gate.contiguous(), up.contiguous()), (gate.contiguous(), up)):
        out = multiply_activated(*halves, activation)
        assert out.shape == shape and out.dtype == dtype and out.is_contiguous()
        torch.testing.assert_close(out.double(), exact, rtol=error, atol=NEARLY_ZERO)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_kernel_hands_on_what_is_no_number(activation: str, device: str) -> None:
    gate = torch.tensor([[float("nan"), 1.0, -200.0, 200.0, 0.0]], device=device, dtype=torch.bfloat16)
    up = torch.tensor([[1.0, float("nan"), 1.0, 1.0, 1.0]], device=device, dtype=torch.bfloat16)
    out = kernel_on(device)(gate, up, activation)[0]
    assert out.isnan().tolist() == [True, True, False, False, False]
    assert out[2:].tolist() == [0.0, 200.0, 0.0]


@pytest.mark.gpu
def test_the_kernel_finds_its_way_in_more_than_2_to_the_31_numbers() -> None:
    from flexeval.engine.compute.gate_kernel import multiply_activated

    size = 8192
    num_tokens = 2**31 // size + 3
    if torch.cuda.mem_get_info()[0] < 8 * num_tokens * size:
        pytest.skip("13 GB of GPU memory are not free")
    both = torch.zeros(num_tokens, 2 * size, device="cuda", dtype=torch.bfloat16)
    both[-2:] = torch.randn(2, 2 * size, device="cuda")
    gate, up = both.chunk(2, dim=-1)
    out = multiply_activated(gate, up, "relu")
    assert torch.equal(out[-2:], gate[-2:].relu() * up[-2:])
    assert not out[: num_tokens // 2].any() and not out[num_tokens // 2 : -2].any()


def num_launches(run: Callable[[], object]) -> int:
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith("Mem") for name in names)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Gated, UpFirst, Halved, HalvedUpFirst])
@pytest.mark.parametrize(("dtype", "error"), DTYPES)
@torch.inference_mode()
def test_on_a_gpu_a_block_computes_the_same_in_one_launch_less(
    kind: type[nn.Module], dtype: torch.dtype, error: float
) -> None:
    module, x = kind().cuda().to(dtype), torch.randn(1, 300, WIDTH, device="cuda").to(dtype)
    expected, num_before = module(x), num_launches(lambda: module(x))
    trial(module)
    assert num_launches(lambda: module(x)) == num_before - 1
    # products of rounded numbers: a rounding of the largest
    torch.testing.assert_close(module(x), expected, rtol=0, atol=2 * error * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_silus_hardly_one_is_rounded_otherwise_than_by_torch(dtype: torch.dtype) -> None:
    """Both round after the activation and after the product: only float32's own errors can turn a rounding."""
    from flexeval.engine.compute.gate_kernel import multiply_activated

    gate, up = torch.randn(2, 512, 4096, device="cuda").mul(2).to(dtype)
    is_other = multiply_activated(gate, up, "silu") != silu(gate) * up
    assert float(is_other.float().mean()) < 3e-3


@pytest.mark.gpu
@torch.inference_mode()
def test_on_a_gpu_experts_compute_the_same() -> None:
    module, both = Experts(), torch.randn(70, 2 * INNER, device="cuda", dtype=torch.bfloat16)
    expected = module._apply_gate(both)
    trial(module)
    torch.testing.assert_close(module._apply_gate(both), expected, rtol=2**-7, atol=0)
    assert num_launches(lambda: module._apply_gate(both)) == 1


@pytest.mark.gpu
@torch.inference_mode()
def test_a_block_is_recorded() -> None:
    module, x = Gated().cuda().bfloat16(), torch.randn(1, 8, WIDTH, device="cuda", dtype=torch.bfloat16)
    trial(module)
    module(x)  # compiled
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        out = module(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, module(x), rtol=0, atol=0)
