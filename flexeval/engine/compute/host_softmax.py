"""What is read off logits on the CPU, by our compiled code. Knows tensors; not what they are for.

torch's log-softmax writes a log-probability of every word, in float32, of which one or two are looked at; and it finds
the largest of numbers in 16 bits one by one. Logits in float32 stay torch's: its sums of 50,000 words are off by 1e-5,
always to one side, and what transformers and HELM add up over a document is that.

Shapes: R rows of logits, V vocabulary.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from flexeval.engine.compute.host_kinds import KINDS
from flexeval.engine.compute.host_team import lent


class _Rows(ctypes.Structure):
    _fields_ = (
        ("numbers", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("best", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_rows", "size", "stride", "kind")),
    )


class LogSums(NamedTuple):
    """Of rows of logits."""

    lse_R: Tensor
    """Their log-sum-exp, float32."""
    best_R: Tensor
    """The first of the largest."""


def log_sums(logits_RV: Tensor) -> LogSums | None:
    """Read rows of logits in 16 bits; None where this is not compiled."""
    team = lent(torch.get_num_threads())
    if team is None:
        return None
    sums = LogSums(torch.empty(len(logits_RV)), torch.empty(len(logits_RV), dtype=torch.int64))
    pointers = (tensor.data_ptr() for tensor in (logits_RV, *sums))
    work = _Rows(*pointers, *logits_RV.shape, logits_RV.stride(0), KINDS[logits_RV.dtype])
    team.begin(team.library.flexeval_begin_softmax, work, (logits_RV, sums)).wait()
    return sums
