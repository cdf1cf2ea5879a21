"""A Triton kernel that multiplies few tokens by the matrices of the experts they chose, as these rest.

Each program has some outputs of one expert, and takes the rows that chose it. Needs Triton: import it only where a GPU
computes.

Shapes: as in `coded`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexeval.engine.codecs.product_kernel import OUTPUTS_A_PROGRAM, RESIDENT, add_parts, sums_of_part
from flexeval.engine.codecs.splitting import num_parts
from flexeval.engine.kernels import num_processors


def multiply(x_RI: Tensor, packed_XOGP: Tensor, affine_XOG2: Tensor, order_S: Tensor, end_X: Tensor) -> Tensor:
    """What each choice makes of its row, W unpacked on the fly; sums in float32, in an order that shapes decide.

    Args:
        x_RI: A row for each choice, or one for all choices of a token; I as for `product_kernel.multiply`.
        packed_XOGP: uint8 codes of each row's groups; experts may lie apart.
        affine_XOG2: float16 scale and minimum of each.
        order_S: Choices, those of one expert after those of another.
        end_X: Where each expert's end.

    Returns:
        `[S, O]` in the type of `x_RI`.
    """
    num_rows, num_inputs = x_RI.shape
    num_choices, (num_experts, num_outputs, num_groups, num_bytes) = len(order_S), packed_XOGP.shape
    x_RI, affine_XOG = x_RI.contiguous(), affine_XOG2.view(torch.int32)
    block_rows = rows_at_once(num_choices, num_experts)
    num_blocks = triton.cdiv(num_outputs, OUTPUTS_A_PROGRAM)
    groups_a_step = 2 if x_RI.element_size() == 2 else 1
    parts = num_parts(
        num_blocks * min(num_choices, num_experts),
        triton.cdiv(num_groups, groups_a_step),
        num_processors=num_processors(x_RI.device),
        num_resident=RESIDENT[block_rows],
    )
    parts_PSO = torch.empty(parts, num_choices, num_outputs, dtype=torch.float32, device=x_RI.device)
    _multiply_kernel[(num_blocks, parts, num_experts)](
        x_RI,
        packed_XOGP,
        affine_XOG,
        order_S,
        end_X,
        parts_PSO,
        num_choices,
        num_outputs,
        num_inputs,
        num_groups,
        packed_XOGP.stride(0),
        affine_XOG.stride(0),
        PER_ROW=num_choices // num_rows,
        HALF=num_bytes,
        GROUPS=groups_a_step,
        ROWS=block_rows,
        OUTPUTS=OUTPUTS_A_PROGRAM,
        num_warps=4,
        num_stages=3 if x_RI.element_size() == 2 and block_rows <= 32 else 2,
    )
    return add_parts(parts_PSO, None, x_RI.dtype)


def rows_at_once(num_choices: int, num_experts: int) -> int:
    """Rows that a program takes at a time: twice as many as choose an expert on average, so that few want more."""
    return int(min(max(RESIDENT), max(16, triton.next_power_of_2(2 * num_choices // num_experts))))


@triton.jit
def _multiply_kernel(
    x,
    codes,
    affine,
    order,
    ends,
    parts,
    num_choices,
    num_outputs,
    num_inputs,
    num_groups,
    codes_stride,
    affine_stride,
    PER_ROW: tl.constexpr,
    HALF: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """One block of an expert's outputs over one part of the groups, for all rows that chose it."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    expert = tl.program_id(2).to(tl.int64)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    for first in range(begin, end, ROWS):
        place = first + tl.arange(0, ROWS)
        is_there = place < end
        choice = tl.load(order + place, mask=is_there, other=0)
        sums = sums_of_part(
            x,
            codes + expert * codes_stride,
            affine + expert * affine_stride,
            choice // PER_ROW,
            is_there,
            output,
            num_outputs,
            num_inputs,
            num_groups,
            HALF,
            GROUPS,
            ROWS,
            OUTPUTS,
        )
        target = parts + (tl.program_id(1) * num_choices + choice)[:, None] * num_outputs + output[None, :]
        tl.store(target, sums, mask=is_there[:, None] & (output < num_outputs)[None, :])
