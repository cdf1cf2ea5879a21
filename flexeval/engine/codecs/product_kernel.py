"""Triton kernels that multiply a few tokens by a matrix of 4-bit integers as it rests.

Knows the bytes of `IntegerCodec`, which its docstring describes. Needs Triton: import it only where a GPU computes.

Shapes: G groups, E numbers of a group, P = E / 2 bytes of its codes, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexeval.engine.codecs.codes_kernel import nibbles_of
from flexeval.engine.codecs.splitting import num_parts
from flexeval.engine.kernels import num_processors

MAX_TOKENS = 128
"""Up to so many tokens a product with a matrix as it rests is faster than one with an unpacked matrix."""
OUTPUTS_A_PROGRAM = 128
"""Outputs of one program of the product."""
RESIDENT = {16: 4, 32: 3, 64: 3, 128: 2}
"""Programs that run beside one another on a multiprocessor, by tokens: what their registers leave room for."""


def multiply(x_TI: Tensor, packed_OGP: Tensor, affine_OG2: Tensor, bias_O: Tensor | None) -> Tensor:
    """`x @ W.T + bias` for few tokens, W unpacked on the fly; sums in float32, in an order that shapes decide.

    Args:
        x_TI: Tokens; I may fall short of G * E by the padding of W's last group.
        packed_OGP: uint8 codes of each row's groups.
        affine_OG2: float16 scale and minimum of each.
        bias_O: Added to every token.

    Returns:
        `[T, O]` in the type of `x_TI`.
    """
    num_tokens, num_inputs = x_TI.shape
    num_outputs, num_groups, num_bytes = packed_OGP.shape
    x_TI = x_TI.contiguous()
    block_tokens = max(16, triton.next_power_of_2(num_tokens))
    num_blocks = triton.cdiv(num_outputs, OUTPUTS_A_PROGRAM)
    groups_a_step = 2 if x_TI.element_size() == 2 else 1
    parts = num_parts(
        num_blocks,
        triton.cdiv(num_groups, groups_a_step),
        num_processors=num_processors(x_TI.device),
        num_resident=RESIDENT[block_tokens],
    )
    parts_STO = torch.empty(parts, num_tokens, num_outputs, dtype=torch.float32, device=x_TI.device)
    _multiply_kernel[(num_blocks, parts)](
        x_TI,
        packed_OGP,
        affine_OG2.view(torch.int32),
        parts_STO,
        num_tokens,
        num_outputs,
        num_inputs,
        num_groups,
        HALF=num_bytes,
        GROUPS=groups_a_step,
        TOKENS=block_tokens,
        OUTPUTS=OUTPUTS_A_PROGRAM,
        num_warps=4,
        num_stages=3 if x_TI.element_size() == 2 and block_tokens <= 32 else 2,
    )
    return add_parts(parts_STO, bias_O, x_TI.dtype)


def add_parts(parts_STO: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum of a product's parts, and a bias, `[T, O]` of a type."""
    y_TO = torch.empty(parts_STO.shape[1:], dtype=dtype, device=parts_STO.device)
    _sum_kernel[(triton.cdiv(y_TO.numel(), 1024),)](
        parts_STO,
        bias_O,
        y_TO,
        y_TO.numel(),
        y_TO.shape[1],
        PARTS=len(parts_STO),
        HAS_BIAS=bias_O is not None,
        BLOCK=1024,
    )
    return y_TO


@triton.jit
def _multiply_kernel(
    x,
    codes,
    affine,
    parts,
    num_tokens,
    num_outputs,
    num_inputs,
    num_groups,
    HALF: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """One block of outputs over one part of the groups."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    token = tl.arange(0, TOKENS)
    is_token = token < num_tokens
    sums = sums_of_part(
        x, codes, affine, token, is_token, output, num_outputs, num_inputs, num_groups, HALF, GROUPS, TOKENS, OUTPUTS
    )
    target = parts + (tl.program_id(1) * num_tokens + token)[:, None].to(tl.int64) * num_outputs + output[None, :]
    tl.store(target, sums, mask=is_token[:, None] & (output < num_outputs)[None, :])


@triton.jit
def sums_of_part(
    x,
    codes,
    affine,
    token,
    is_token,
    output,
    num_outputs,
    num_inputs,
    num_groups,
    HALF: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Products of tokens, rows of `x`, and outputs over the program's part of the groups, `GROUPS` of them a step."""
    place = tl.arange(0, HALF)
    byte = tl.arange(0, GROUPS * HALF)
    row = tl.minimum(output, num_outputs - 1).to(tl.int64) * num_groups
    per_part = tl.cdiv(tl.cdiv(num_groups, GROUPS), tl.num_programs(1)) * GROUPS
    first = tl.program_id(1) * per_part
    # Weights are the right operand: as the left one, in registers, Triton 3.6 overwrote them too early on Hopper.
    sums = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for step in range(first, tl.minimum(first + per_part, num_groups), GROUPS):
        group = step + tl.arange(0, GROUPS)
        is_group = group < num_groups
        source = codes + ((row[:, None] + group[None, :]) * HALF)[:, :, None] + place[None, None, :]
        packed = tl.load(source, mask=is_group[None, :, None], other=0)
        pair = tl.load(affine + row[:, None] + group[None, :], mask=is_group[None, :], other=0)
        scale = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        minimum = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        low, high = nibbles_of(packed, scale, minimum, x.dtype.element_ty)
        inputs = step * (2 * HALF) + byte // HALF * (2 * HALF) + byte % HALF
        x_source = x + token[:, None] * num_inputs + inputs[None, :]
        x_low = tl.load(x_source, mask=is_token[:, None] & (inputs < num_inputs)[None, :], other=0.0)
        x_high = tl.load(x_source + HALF, mask=is_token[:, None] & (inputs + HALF < num_inputs)[None, :], other=0.0)
        low = tl.trans(tl.reshape(low, (OUTPUTS, GROUPS * HALF)))
        high = tl.trans(tl.reshape(high, (OUTPUTS, GROUPS * HALF)))
        sums = tl.dot(x_low, low, sums, input_precision="ieee")
        sums = tl.dot(x_high, high, sums, input_precision="ieee")
    return sums


@triton.jit
def _sum_kernel(
    parts, bias, y, num_values, num_outputs, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add up the parts `[PARTS, T, O]`, and a bias."""
    value = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_value = value < num_values
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * num_values + value, mask=is_value, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + value % num_outputs, mask=is_value, other=0.0).to(tl.float32)
    tl.store(y + value, total.to(y.dtype.element_ty), mask=is_value)
