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
        *((name, ctypes.c_void_p) for name in ("codes", "affine")),
        *((name, ctypes.c_int64) for name in ("num_groups", "code_bytes")),
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
    assert matrix_OI.dtype == torch.bfloat16 and matrix_OI.stride(1) == 1, (matrix_OI.dtype, matrix_OI.stride())
    return _multiply(x_TI, bias_O, len(matrix_OI), matrix=matrix_OI.data_ptr(), matrix_stride=matrix_OI.stride(0))


def multiply_codes(x_TI: Tensor, packed_OGP: Tensor, affine_OG2: Tensor, bias_O: Tensor | None) -> Tensor:
    """The same by a matrix of 4-bit codes (see `IntegerCodec`), whose numbers are what it unpacks to; equal to the bit.

    Args:
        x_TI: Tokens; I may fall short of a row's codes by the padding of its last group.
        packed_OGP: uint8 codes of each row's groups, contiguous.
        affine_OG2: float16 scale and minimum of each, contiguous.
        bias_O: Added to every token.
    """
    assert packed_OGP.is_contiguous() and affine_OG2.is_contiguous(), (packed_OGP.stride(), affine_OG2.stride())
    num_outputs, num_groups, code_bytes = packed_OGP.shape
    assert x_TI.shape[1] <= 2 * num_groups * code_bytes, (x_TI.shape, packed_OGP.shape)
    pointers = {"codes": packed_OGP.data_ptr(), "affine": affine_OG2.data_ptr()}
    return _multiply(x_TI, bias_O, num_outputs, **pointers, num_groups=num_groups, code_bytes=code_bytes)


def _multiply(x_TI: Tensor, bias_O: Tensor | None, num_outputs: int, **matrix: int) -> Tensor:
    assert x_TI.dtype == torch.bfloat16 and x_TI.stride(1) == 1, (x_TI.dtype, x_TI.stride())
    assert bias_O is None or (bias_O.dtype == torch.bfloat16 and bias_O.is_contiguous()), bias_O
    team = lent(torch.get_num_threads())
    assert team is not None
    out_TO = x_TI.new_empty(len(x_TI), num_outputs)
    work = _Product(
        x=x_TI.data_ptr(),
        bias=None if bias_O is None else bias_O.data_ptr(),
        out=out_TO.data_ptr(),
        num_tokens=len(x_TI),
        num_inputs=x_TI.shape[1],
        num_outputs=num_outputs,
        x_stride=x_TI.stride(0),
        **matrix,
    )
    team.begin(team.library.flexeval_begin_product, work, None).wait()
    return out_TO
