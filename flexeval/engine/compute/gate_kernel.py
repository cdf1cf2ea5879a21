"""A Triton kernel that activates a gate and multiplies by it: the wide tensors between two products are passed once.

Needs Triton: import it only where a CUDA device computes.

Shapes: T tokens, I numbers of each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Numbers of a token that a program takes: 8 for each of its threads, 16 bytes in 16 bits."""


def multiply_activated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up`, both `[..., I]`, computed in float32 and rounded after each of the two, as torch does.

    Activations: silu, gelu, gelu_tanh, relu. Tokens may lie apart, as those of a tensor's halves do.
    """
    assert gate.shape == up.shape and gate.dtype == up.dtype, (gate.shape, gate.dtype, up.shape, up.dtype)
    size = gate.shape[-1]
    gate_TI, up_TI, out_TI = gate.reshape(-1, size), up.reshape(-1, size), gate.new_empty(gate.shape).view(-1, size)
    assert gate_TI.stride(1) == up_TI.stride(1) == 1, (gate_TI.stride(), up_TI.stride())
    num_blocks = triton.cdiv(size, BLOCK)
    _multiply_kernel[(len(out_TI) * num_blocks,)](
        gate_TI,
        up_TI,
        out_TI,
        size,
        num_blocks,
        gate_TI.stride(0),
        up_TI.stride(0),
        ACTIVATION=activation,
        BLOCK=BLOCK,
    )
    return out_TI.view(gate.shape)


@triton.jit
def _multiply_kernel(
    gate,
    up,
    out,
    size,
    num_blocks,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of one token's numbers."""
    program = tl.program_id(0)
    token = (program // num_blocks).to(tl.int64)
    place = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    is_place = place < size
    x = tl.load(gate + token * gate_stride + place, mask=is_place, other=0.0).to(tl.float32)
    factor = tl.load(up + token * up_stride + place, mask=is_place, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        active = x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu_tanh":  # 1 + tanh(u) is 2 / (1 + exp(-2 u))
        active = x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "gelu":
        active = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "relu")
        active = tl.where(x < 0, 0.0, x)  # what is no number stays none
    rounded = active.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * size + place, (rounded * factor).to(out.dtype.element_ty), mask=is_place)
