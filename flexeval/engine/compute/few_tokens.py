"""Few tokens by a matrix in bfloat16 on a CPU: how it takes least. Knows tensors; no module.

torch's library puts the right operand of a product in an order of its own, in every call. Of tokens by a matrix that is
the matrix, which takes as long as reading it or longer. With a matrix unit it is fastest of the matrix by tokens, where
the right operand is these; without one, our code reads both as they lie.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexeval.engine.compute.host_passes import has_tiles, turn
from flexeval.engine.compute.host_products import has_products, multiply

MAX_TOKENS = 128
"""For more, the matrix is put in order in little of the time."""
LEAST_NUMBERS = 2**19
"""Of the matrix: for less, bringing tokens and results in order takes as long."""
MAX_READ_TOKENS = 64
"""For more, reading the tokens again for every few rows takes longer than putting the matrix in order."""


def multiply_few(x: Tensor, matrix_OI: Tensor, bias_O: Tensor | None) -> Tensor | None:
    """`x @ W.T + bias` of tokens `[..., I]`, rounded once; None where it is for torch to do as ever."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or matrix_OI.dtype != x.dtype:
        return None
    x_TI = x.reshape(-1, x.shape[-1])
    if has_tiles():
        if not 1 < len(x_TI) <= MAX_TOKENS or matrix_OI.numel() < LEAST_NUMBERS:
            return None
        x_IT = x_TI.t()
        y_OT = torch.mm(matrix_OI, x_IT) if bias_O is None else torch.addmm(bias_O[:, None], matrix_OI, x_IT)
        return turn(y_OT).view(*x.shape[:-1], -1)
    if not has_products() or not 1 <= len(x_TI) <= MAX_READ_TOKENS or matrix_OI.stride(1) != 1:
        return None
    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    return multiply(x_TI, matrix_OI, bias_O).view(*x.shape[:-1], -1)
