"""What is read off logits in one pass over them, by our code for their device. Knows tensors; not what they are for.

Shapes: R rows of logits, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexeval.engine.compute import host_softmax
from flexeval.engine.compute.host_softmax import LogSums
from flexeval.engine.kernels import has_triton


def log_sums(logits_RV: Tensor) -> LogSums | None:
    """Read rows of logits; None where torch is to: of float32, without our code for the device, or in columns."""
    if logits_RV.dtype not in (torch.float16, torch.bfloat16) or logits_RV.stride(1) != 1:
        return None
    if has_triton(logits_RV.device):
        from flexeval.engine.compute import softmax_kernel

        return LogSums(*softmax_kernel.log_sums(logits_RV))
    return host_softmax.log_sums(logits_RV) if logits_RV.device.type == "cpu" else None
