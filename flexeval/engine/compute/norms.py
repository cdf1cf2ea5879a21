"""Norms in one pass instead of up to seven. Knows modules by what they compute; no family.

Shapes: D numbers that are normalized together.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import layer_norm, rms_norm

from flexeval.engine.compute import host_passes
from flexeval.engine.compute.fusion import Fusion

_EPSILONS = ("variance_epsilon", "eps")
_TOLERANCE = 1e-5
"""Of float32: a norm that computes anything else is farther away."""
_HEAD_SIZE, _CENTERED_SIZE = 256, 4096
"""On a GPU torch's norms take several times as long as reading their numbers where these are at most so many (heads of
queries: 163 us instead of 36 on an H200), its layer norms half as long again from so many on. Between, launching ours
takes as long as it saves."""


class _Norm(NamedTuple):
    """What a module computes: `x / rms(x) * (offset + weight) + bias`, of `x - mean(x)` where it is centered."""

    epsilon: float
    is_centered: bool = False
    offset: float = 0.0


def fuse_norms(model: nn.Module, fusion: Fusion) -> None:
    """Let the norms of a model run as one kernel where that computes the same and takes less time.

    RMS norms (Zhang and Sennrich 2019), Gemma's with an offset of 1, and layer norms (Ba et al. 2016). They round once,
    most of transformers' twice: in 16 bits results differ by a rounding.
    """
    for module in model.modules():
        if (norm := _find_norm(module)) is not None:
            _fuse(module, norm, fusion)


def _find_norm(module: nn.Module) -> _Norm | None:
    """The norm that a module is; None for one that is anything else."""
    if type(module) is nn.LayerNorm:
        is_known = module.elementwise_affine and len(module.normalized_shape) == 1
        return _Norm(module.eps, is_centered=True) if is_known else None
    if "RMSNorm" not in type(module).__name__:
        return None
    epsilon = next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), None)
    names = [name for name, _ in module.named_parameters()]
    takes_one = len(inspect.signature(module.forward).parameters) == 1
    if not isinstance(epsilon, float) or names != ["weight"] or not takes_one:
        return None
    generator = torch.Generator().manual_seed(0)
    weight_D = torch.randn(module.get_parameter("weight").shape, generator=generator)
    x_2D = torch.randn(2, *weight_D.shape, generator=generator)
    theirs_2D = functional_call(module, {"weight": weight_D}, (x_2D,))
    for offset in (0.0, 1.0):
        ours_2D = rms_norm(x_2D, weight_D.shape, offset + weight_D, epsilon)
        if torch.allclose(theirs_2D, ours_2D, rtol=_TOLERANCE, atol=_TOLERANCE):
            return _Norm(epsilon, offset=offset)
    return None


def _fuse(module: nn.Module, norm: _Norm, fusion: Fusion) -> None:
    plain = module.forward
    is_plain_rms = norm == _Norm(norm.epsilon)
    has_kernel = fusion.applies if is_plain_rms else fusion.is_on_gpu  # a CPU has none for others

    def forward(hidden_states: Tensor) -> Tensor:
        if has_kernel(hidden_states) and hidden_states.dtype == (weight_D := module.get_parameter("weight")).dtype:
            if hidden_states.device.type == "cpu":
                return host_passes.rms_norm(hidden_states, weight_D, norm.epsilon)
            return _normalize(hidden_states, weight_D, getattr(module, "bias", None), norm)
        out: Tensor = plain(hidden_states)
        return out

    module.forward = forward


def _normalize(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, norm: _Norm) -> Tensor:
    size = len(weight_D)
    is_ours = norm.offset or size <= _HEAD_SIZE or (norm.is_centered and size >= _CENTERED_SIZE)
    if is_ours and not x.is_meta:
        from flexeval.engine.compute.norm_kernel import normalize

        return normalize(x, weight_D, bias_D, norm.epsilon, is_centered=norm.is_centered, offset=norm.offset)
    if norm.is_centered:
        return layer_norm(x, weight_D.shape, weight_D, bias_D, norm.epsilon)
    return rms_norm(x, weight_D.shape, weight_D, norm.epsilon)
