"""What lies between a layer's products, in one pass each on the CPU, by our compiled code. Knows tensors; no module.

Shapes: R rows of tokens, D numbers that are normalized together, I inside a block, N heads, T tokens, H size of a head,
O outputs of a product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from flexeval.engine.compute.host_kinds import KINDS
from flexeval.engine.compute.host_team import lent, library

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}  # as in the source


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "out")),
        *((name, ctypes.c_int64) for name in ("num_rows", "size", "stride", "kind")),
        ("epsilon", ctypes.c_float),
    )


class _Gate(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate", "up", "out")),
        *((name, ctypes.c_int64) for name in ("num_rows", "size", "gate_stride", "up_stride", "kind", "activation")),
    )


class _Turn(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "out")),
        *((name, ctypes.c_int64) for name in ("num_outputs", "num_tokens")),
    )


class _Rotate(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "out")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_heads", "half", "token_stride", "head_stride")),
        *((name, ctypes.c_int64) for name in ("cos_stride", "sin_stride", "kind")),
    )


def has_passes() -> bool:
    """Whether they are compiled."""
    return library() is not None


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last dimension, computed in float32 and rounded once."""
    x_RD, out = x.reshape(-1, x.shape[-1]), x.new_empty(x.shape)
    x_RD, weight_D = _side_by_side(x_RD), _side_by_side(weight_D)
    work = _Norm(
        x_RD.data_ptr(), weight_D.data_ptr(), out.data_ptr(), *x_RD.shape, x_RD.stride(0), KINDS[x.dtype], epsilon
    )
    return _run("norm", work, out)


def multiply_activated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """As `gate_kernel.multiply_activated`."""
    assert gate.shape == up.shape and gate.dtype == up.dtype, (gate.shape, gate.dtype, up.shape, up.dtype)
    gate_RI, up_RI = (_side_by_side(half.reshape(-1, half.shape[-1])) for half in (gate, up))
    out = gate.new_empty(gate.shape)
    pointers = (tensor.data_ptr() for tensor in (gate_RI, up_RI, out))
    strides = gate_RI.stride(0), up_RI.stride(0)
    return _run("gate", _Gate(*pointers, *gate_RI.shape, *strides, KINDS[gate.dtype], _ACTIVATIONS[activation]), out)


def rotate(x_1NTH: Tensor, cos_1TH: Tensor, sin_1TH: Tensor) -> Tensor:
    """As `rotary_kernel.rotate`; all of one type."""
    _, num_heads, num_tokens, size = x_1NTH.shape
    assert x_1NTH.dtype == cos_1TH.dtype == sin_1TH.dtype, (x_1NTH.dtype, cos_1TH.dtype, sin_1TH.dtype)
    out_1TNH = x_1NTH.new_empty(1, num_tokens, num_heads, size)
    work = _Rotate(
        *(tensor.data_ptr() for tensor in (x_1NTH, cos_1TH, sin_1TH, out_1TNH)),
        num_tokens,
        num_heads,
        size // 2,
        x_1NTH.stride(2),
        x_1NTH.stride(1),
        cos_1TH.stride(1),
        sin_1TH.stride(1),
        KINDS[x_1NTH.dtype],
    )
    return _run("rotate", work, out_1TNH).transpose(1, 2)


def turn(y_OT: Tensor) -> Tensor:
    """`y.T`, each token's numbers side by side, in bfloat16; where `has_tiles`."""
    assert y_OT.is_contiguous() and y_OT.dtype == torch.bfloat16, (y_OT.stride(), y_OT.dtype)
    out_TO = y_OT.new_empty(y_OT.shape[::-1])
    return _run("turn", _Turn(y_OT.data_ptr(), out_TO.data_ptr(), *y_OT.shape), out_TO)


@cache
def has_tiles() -> bool:
    """Whether the processor has a matrix unit for bfloat16, and lets this process use it."""
    found = library()
    return found is not None and bool(found.flexeval_has_tiles())


def _run(name: str, work: ctypes.Structure, out: Tensor) -> Tensor:
    """Do some work now: what it points to is the caller's."""
    team = lent(torch.get_num_threads())
    assert team is not None
    begin: Callable[..., int | None] = getattr(team.library, f"flexeval_begin_{name}")
    team.begin(begin, work, None).wait()
    return out


def _side_by_side(numbers: Tensor) -> Tensor:
    return numbers if numbers.stride(-1) == 1 else numbers.contiguous()
