"""Norms that run in one pass: only those that compute one, and with its numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_config
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.fusion import Fusion
from flexeval.engine.compute.norms import fuse_norms

SIZE = 48


class PlainRMSNorm(nn.Module):
    def __init__(self, eps: float = 1e-5, size: int = SIZE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(1)))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(hidden.dtype)


class OffsetRMSNorm(PlainRMSNorm):
    """Gemma's."""

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight.float())
        return scaled.to(hidden.dtype)


class HalfOffsetRMSNorm(PlainRMSNorm):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * (0.5 + self.weight) / self.weight


class GatedRMSNorm(PlainRMSNorm):
    def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(hidden if gate is None else hidden * gate)


class BiasedRMSNorm(PlainRMSNorm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(SIZE))


class CenteredRMSNorm(PlainRMSNorm):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden - hidden.mean(-1, keepdim=True))


def is_fused(module: nn.Module) -> bool:
    return "forward" in vars(module)


@pytest.mark.parametrize("kind", [HalfOffsetRMSNorm, GatedRMSNorm, BiasedRMSNorm, CenteredRMSNorm])
def test_other_norms_stay_as_they_are(kind: type[PlainRMSNorm]) -> None:
    module = kind()
    fuse_norms(module, Fusion())
    assert not is_fused(module)


def test_layer_norms_of_two_dimensions_or_without_weights_stay() -> None:
    for module in (nn.LayerNorm((3, SIZE)), nn.LayerNorm(SIZE, elementwise_affine=False)):
        fuse_norms(module, Fusion())
        assert not is_fused(module)


@pytest.mark.parametrize("make", [PlainRMSNorm, OffsetRMSNorm, lambda: nn.LayerNorm(SIZE)])
def test_without_a_kernel_a_norm_computes_what_it_did(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexeval.engine.compute.fusion.has_passes", lambda: False)
    module, hidden = make(), torch.randn(7, SIZE, dtype=torch.bfloat16)
    module.bfloat16()
    expected = module(hidden)
    fuse_norms(module, Fusion())
    assert is_fused(module) and torch.equal(module(hidden), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("size", [SIZE, 7, 1000])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_a_norm_computes_the_same_in_one_pass(dtype: torch.dtype, error: float, size: int, device: str) -> None:
    """Against float64, by relative error; rounded once, it is at least as near as rounded twice."""
    module = PlainRMSNorm(size=size).to(device=device, dtype=dtype)
    hidden = torch.randn(7, 5, 2 * size, device=device).to(dtype)[..., :size]  # rows that do not follow each other
    wide = hidden.double()
    exact = module.weight.double() * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + module.eps)
    plain = module(hidden)
    fuse_norms(module, Fusion())
    fused = module(hidden)
    assert fused.shape == plain.shape and fused.dtype == plain.dtype
    floor = torch.finfo(dtype).tiny  # below it numbers have fewer bits
    plain_error, fused_error = (((y - exact).abs() / exact.abs().clamp(min=floor)).max() for y in (plain, fused))
    assert fused_error <= max(error, plain_error) and fused_error <= error


def random_layer_norm(size: int, *, bias: bool = True) -> nn.Module:
    module = nn.LayerNorm(size, bias=bias)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


GPU_NORMS: dict[str, Callable[[], nn.Module]] = {
    "rms": PlainRMSNorm,
    "rms of a head": lambda: PlainRMSNorm(size=128),
    "wide rms": lambda: PlainRMSNorm(size=5120),
    "offset": lambda: OffsetRMSNorm(size=1000),
    "wide offset": lambda: OffsetRMSNorm(size=5376),
    "layer": lambda: random_layer_norm(768),
    "wide layer": lambda: random_layer_norm(7168),
    "wide layer without bias": lambda: random_layer_norm(5000, bias=False),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_NORMS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
@torch.inference_mode()
def test_on_a_gpu_a_norm_is_one_launch_and_the_same(name: str, dtype: torch.dtype, error: float) -> None:
    """Against float64; what is nearly nothing by what it is the sum of."""
    module = GPU_NORMS[name]().cuda()
    module.to(dtype)
    hidden = torch.randn(7, 45, 2 * len(module.get_parameter("weight")), device="cuda").add(0.5).to(dtype)
    hidden = hidden[..., : len(module.get_parameter("weight"))]
    exact = exact_norm(module, hidden.double())
    fuse_norms(module, Fusion())
    module(hidden)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        made = module(hidden)
        torch.cuda.synchronize()
    assert made.dtype == dtype and made.shape == hidden.shape
    # torch's own layer norm copies rows that lie apart
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("copy" not in name for name in names) == 1, names
    torch.testing.assert_close(made.double(), exact, rtol=error, atol=error)


def exact_norm(module: nn.Module, wide: Tensor) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        shape, bias = module.normalized_shape, module.bias
        return layer_norm(wide, shape, module.weight.double(), None if bias is None else bias.double(), module.eps)
    assert isinstance(module, PlainRMSNorm)
    weight = module.weight.double() + isinstance(module, OffsetRMSNorm)
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + module.eps) * weight


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "mixtral", "gpt_oss", "deepseek_v3", "olmo2", "phi3", "granite", "gemma2", "gemma3_text"],
)
def test_the_norms_of_families_are_found(family: str) -> None:
    anatomy = Anatomy(tiny_config(family), torch.float32)
    norms = [
        module
        for root in [anatomy.model, *anatomy.layers]
        for module in root.modules()
        if "RMSNorm" in type(module).__name__
    ]
    assert norms and all(map(is_fused, norms))
