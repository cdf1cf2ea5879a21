"""Dense attention as a device has it. Where the CPU computes everything, our compiled kernel attends for decode rows.

Knows rows; not where KV rests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexeval.engine.codecs.kv_format import KVFormat
from flexeval.engine.compute.attention import Attention, Context, PackedAttention
from flexeval.engine.compute.host_attention import HostAttention
from flexeval.engine.compute.host_kernel import HostKernel, build, can_read
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import Row
from flexeval.engine.kernels import has_triton


class CpuAttention:
    """Prompts by torch, decode rows by our kernel where it can read their logs; used by one thread at a time."""

    is_recordable = False

    def __init__(self, kernel: HostKernel) -> None:
        """Torch's part is spread over as many threads as the caller's."""
        self._packed = PackedAttention()
        self._kernel = kernel
        self._host = HostAttention(kernel, torch.get_num_threads())

    def __call__(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions, row: Row, context: Context
    ) -> Tensor:
        """Attention output `[T, N, W]` of the row's new tokens, whose KV `context` already holds."""
        if row.decode and not row.fresh and all(self._kernel.takes(context.own_log(batch)) for batch in row.decode):
            return self._host.begin(q_TNH, options, row, context).wait()
        return self._packed(q_TNH, k_TKH, v_TKW, options, row, context)


def dense_attention(device: torch.device) -> Attention:
    """How rows attend on a device to all that they see."""
    kernel = build(torch.get_num_threads(), borrows=True) if device.type == "cpu" else None
    return PackedAttention() if kernel is None else CpuAttention(kernel)


def decode_copies(device: torch.device, form: KVFormat, *, heads_per_kv: int) -> int:
    """Copies of a group's KV that decode attention makes: gathered, and on a GPU repeated for every query head."""
    if has_triton(device) or (device.type == "cpu" and can_read(form)):
        return 0
    return 1 + heads_per_kv if device.type == "cuda" and heads_per_kv > 1 else 1
