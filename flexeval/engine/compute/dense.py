"""Dense attention as a device has it. Where the CPU computes everything, our compiled kernels attend where they can.

Knows rows; not where KV rests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexeval.engine.codecs.kv_format import KVFormat
from flexeval.engine.compute.attention import Attention, Context, PackedAttention
from flexeval.engine.compute.host_attention import HostAttention
from flexeval.engine.compute.host_decode import can_read
from flexeval.engine.compute.host_prompts import PromptKernel
from flexeval.engine.compute.host_team import Team, lent
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import Row
from flexeval.engine.kernels import has_triton


class CpuAttention:
    """Decode rows and prompts by our kernels, by torch what they cannot read; used by one thread at a time."""

    is_recordable = False

    def __init__(self, team: Team) -> None:
        """Torch's part is spread over as many threads as the caller's."""
        self._packed = PackedAttention()
        self._decode = HostAttention(team, torch.get_num_threads())
        self._prompts = PromptKernel(team)

    def __call__(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions, row: Row, context: Context
    ) -> Tensor:
        """Attention output `[T, N, W]` of the row's new tokens, whose KV `context` already holds."""
        if row.decode and not row.fresh and self._decode.reads([context.own_log(batch) for batch in row.decode]):
            return self._decode.begin(q_TNH, options, row, context).wait()
        if row.fresh and not row.decode and self._prompts.takes(q_TNH, k_TKH, v_TKW):
            return self._prompts(q_TNH, k_TKH, v_TKW, options, row, context)
        return self._packed(q_TNH, k_TKH, v_TKW, options, row, context)


def dense_attention(device: torch.device) -> Attention:
    """How rows attend on a device to all that they see."""
    team = lent(torch.get_num_threads()) if device.type == "cpu" else None
    return PackedAttention() if team is None else CpuAttention(team)


def decode_copies(device: torch.device, form: KVFormat, *, heads_per_kv: int) -> int:
    """Copies of a group's KV that decode attention makes: gathered, and on a GPU repeated for every query head."""
    if has_triton(device) or (device.type == "cpu" and can_read(form)):
        return 0
    return 1 + heads_per_kv if device.type == "cuda" and heads_per_kv > 1 else 1
