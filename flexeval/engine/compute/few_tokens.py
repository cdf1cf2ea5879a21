"""Few tokens by a matrix in bfloat16 on a CPU: how it takes least. Knows tensors; no module.

torch's library puts the right operand of a product in an order of its own, in every call. Of tokens by a matrix that is
the matrix, which takes as long as reading it or longer. Our code reads both as they lie. For more than a few tokens a
matrix unit is faster, of the matrix by tokens, where the right operand is these.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexeval.engine.compute.host_passes import has_tiles, turn
from flexeval.engine.compute.host_products import has_products, multiply

MAX_READ_TOKENS = 64
"""For more, reading the tokens again for every few rows takes longer than putting the matrix in order."""
MAX_READ_TOKENS_BESIDE_TILES = 8
"""The same where there is a matrix unit, which multiplies several times as fast."""
MAX_TURNED_TOKENS = 128
"""For more, the matrix is put in order in little of the time."""
LEAST_TURNED_NUMBERS = 2**19
"""Of the matrix: for less, bringing tokens and results in order takes as long."""


def most_read_tokens() -> int:
    """Up to how many tokens our code is best to multiply; 0 where it does not."""
    if not has_products():
        return 0
    return MAX_READ_TOKENS_BESIDE_TILES if has_tiles() else MAX_READ_TOKENS


def multiply_few(x: Tensor, matrix_OI: Tensor, bias_O: Tensor | None) -> Tensor | None:
    """`x @ W.T + bias` of tokens `[..., I]`, rounded once; None where it is for torch to do as ever."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or matrix_OI.dtype != x.dtype or not x.numel():
        return None
    x_TI = x.reshape(-1, x.shape[-1])
    if len(x_TI) <= most_read_tokens() and x_TI.stride(1) == matrix_OI.stride(1) == 1:
        out_TO = multiply(x_TI, matrix_OI, bias_O)
    elif has_tiles() and len(x_TI) <= MAX_TURNED_TOKENS and matrix_OI.numel() >= LEAST_TURNED_NUMBERS:
        x_IT = x_TI.t()
        out_TO = turn(torch.mm(matrix_OI, x_IT) if bias_O is None else torch.addmm(bias_O[:, None], matrix_OI, x_IT))
    else:
        return None
    return out_TO.view(*x.shape[:-1], -1)
