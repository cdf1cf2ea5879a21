"""Few tokens by a matrix on the CPU, by our compiled code. Knows tensors; not where it is faster than torch.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from flexeval.engine.compute.host_team import lent, library


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "matrix", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_inputs", "num_outputs", "x_stride", "matrix_stride")),
    )


@cache
def has_products() -> bool:
    """Whether the processor adds up products of pairs of bfloat16 (AVX-512 BF16), and the code is compiled."""
    found = library()
    return found is not None and bool(found.flexeval_has_products())


def multiply(x_TI: Tensor, matrix_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`x @ W.T + bias` in bfloat16 `[T, O]`, summed in float32 and rounded once; where `has_products`.

    A token's numbers lie side by side, and so do those of a row of the matrix. What a token comes to does not depend on
    the others.
    """
    assert x_TI.dtype == matrix_OI.dtype == torch.bfloat16 and x_TI.stride(1) == matrix_OI.stride(1) == 1
    assert bias_O is None or (bias_O.dtype == torch.bfloat16 and bias_O.is_contiguous()), bias_O
    team = lent(torch.get_num_threads())
    assert team is not None
    out_TO = x_TI.new_empty(len(x_TI), len(matrix_OI))
    bias = None if bias_O is None else bias_O.data_ptr()
    pointers = x_TI.data_ptr(), matrix_OI.data_ptr(), bias, out_TO.data_ptr()
    work = _Product(*pointers, *x_TI.shape, len(matrix_OI), x_TI.stride(0), matrix_OI.stride(0))
    team.begin(team.library.flexeval_begin_product, work, None).wait()
    return out_TO
