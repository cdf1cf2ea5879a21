"""Numbers from group-wise integers on the CPU, by our compiled code. Knows tensors; not what the numbers are.

torch makes them in six passes over memory, two of them over float32: half a second for the layers of a model of half a
billion weights, in each sweep.

Shapes: R runs, G groups, P bytes of a group's codes, E numbers of a group.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from flexeval.engine.compute.host_kinds import KINDS
from flexeval.engine.compute.host_team import lent


class _Unpacking(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("affine", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_runs", "num_groups", "code_bytes", "bits", "kind")),
        *((name, ctypes.c_int64) for name in ("codes_run", "codes_group", "affine_run", "affine_group", "out_run")),
    )


def unpack(codes_RGP: Tensor, affine_RG2: Tensor, out_RGE: Tensor, *, bits: int) -> bool:
    """Write minimum + scale * code, as `IntegerCodec` has them; False where this is not compiled, or not for such.

    Args:
        codes_RGP: uint8; a group's bytes lie side by side.
        affine_RG2: float16, scale and minimum.
        out_RGE: float32, float16 or bfloat16; a run's numbers lie side by side.
        bits: Of a code: 2, 4 or 8.
    """
    if out_RGE.device.type != "cpu" or out_RGE.dtype not in KINDS:
        return False
    team = lent(torch.get_num_threads())
    if team is None:
        return False
    assert codes_RGP.stride(2) == affine_RG2.stride(2) == out_RGE.stride(2) == 1, "what belongs to a group is apart"
    assert out_RGE.stride(1) == out_RGE.shape[2], "groups of a run are apart"
    work = _Unpacking(
        *(tensor.data_ptr() for tensor in (codes_RGP, affine_RG2, out_RGE)),
        *codes_RGP.shape,
        bits,
        KINDS[out_RGE.dtype],
        *(codes_RGP.stride(axis) for axis in (0, 1)),
        *(affine_RG2.stride(axis) * affine_RG2.itemsize for axis in (0, 1)),
        out_RGE.stride(0) * out_RGE.itemsize,
    )
    team.begin(team.library.flexeval_begin_unpacking, work, (codes_RGP, affine_RG2, out_RGE)).wait()
    return True
