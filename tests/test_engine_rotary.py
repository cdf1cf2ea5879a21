"""Rotary positions that a kernel applies: only where it does the same, and transformers stays as it is."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config
from torch import Tensor, nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention

from flexeval.engine.compute import host_passes, rotary
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.fusion import Fusion
from flexeval.engine.compute.rotary import fuse_rotary


def rotate_pairs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours turn, not halves."""

    def turned(x: Tensor) -> Tensor:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)

    cos, sin = cos[:, None], sin[:, None]
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def rotate_backwards(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, -sin)  # type: ignore[no-any-return]


def takes_less(q: Tensor, k: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    return q, k


def is_fused(module: nn.Module) -> bool:
    return "forward" in vars(module)


@pytest.mark.parametrize("other", [rotate_pairs, rotate_backwards, takes_less])
def test_what_rotates_otherwise_stays(other: rotary.Rotate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
    module = LlamaAttention(tiny_config("llama"), 0)
    fuse_rotary(module, Fusion())
    assert not is_fused(module)


def test_only_the_model_at_hand_calls_ours() -> None:
    before = modeling_llama.apply_rotary_pos_emb
    module = LlamaAttention(tiny_config("llama"), 0)
    fuse_rotary(module, Fusion())
    assert is_fused(module)
    assert modeling_llama.apply_rotary_pos_emb is before
    assert not is_fused(LlamaAttention(tiny_config("llama"), 0))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "mixtral", "olmo2", "granite", "gemma2"])
def test_the_attention_of_families_is_found(family: str) -> None:
    anatomy = Anatomy(tiny_config(family), torch.float32)
    attention = [module for layer in anatomy.layers for module in layer.modules() if hasattr(module, "q_proj")]
    assert len(attention) == len(anatomy.layers) and all(map(is_fused, attention))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize(("heads", "size"), [(1, 64), (5, 80), (32, 128), (8, 96), (3, 6)])
def test_the_kernel_rotates_as_float64_does(
    heads: int, size: int, dtype: torch.dtype, error: float, device: str
) -> None:
    """One rounding: as near as the type can be."""
    rotate = host_passes.rotate
    if device == "cuda":
        from flexeval.engine.compute.rotary_kernel import rotate

    wide = torch.randn(1, 37, heads, 2 * size, device=device).to(dtype)
    x_1NTH = wide[..., :size].transpose(1, 2)  # heads that do not follow each other at once
    cos_1TH, sin_1TH = torch.randn(2, 1, 37, size, device=device).to(dtype)
    exact = rotary._rotate(x_1NTH.double(), cos_1TH.double(), sin_1TH.double())
    torch.testing.assert_close(rotate(x_1NTH, cos_1TH, sin_1TH).double(), exact, rtol=error, atol=1e-6)
