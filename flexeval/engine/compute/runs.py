"""Attention of many tokens on a GPU: within runs of them, and to keys before all of them. By our kernel or torch's.

Shapes: T tokens, S keys, N query heads, K KV heads, H size of a key, W size of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import Runs
from flexeval.engine.kernels import has_triton

MAX_SIZE = 256
"""Of a key and of a value, for any of the kernels."""
_OURS_SIZE = 128
"""Up to it our kernel takes less time (3 quarters on an H200, for runs of 60 to 2048 tokens), beyond it torch's."""


def attend_within_runs(
    q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, runs: Runs, options: AttentionOptions
) -> tuple[Tensor, Tensor] | None:
    """Output `[T, N, W]` and log-sum-exp `[T, N]`, float32, without padding; None where no kernel takes such numbers.

    Tokens that are in no run have no output.
    """
    is_torchs = _is_torchs(q_TNH, v_TKW, options)
    if _is_ours(q_TNH, v_TKW) and not (is_torchs and q_TNH.shape[-1] > _OURS_SIZE):
        from flexeval.engine.compute.prompts import attend_to_own

        return attend_to_own(q_TNH, k_TKH, v_TKW, runs.blocks_U3, options)
    return _flash(q_TNH, k_TKH, v_TKW, runs, options) if is_torchs else None


def attend_before(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKW: Tensor,
    positions_T: Tensor,
    first_position: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor] | None:
    """Output `[T, N, W]` and log-sum-exp `[T, N]`, float32, over keys that lie before all queries.

    `first_position` is that of the first key. None where that is for another kernel: where all keys are seen, torch's
    takes as long or less.
    """
    if not _is_ours(q_TNH, v_SKW) or (options.window is None and _is_torchs(q_TNH, v_SKW, options)):
        return None
    from flexeval.engine.compute.prompts import attend_to_all

    return attend_to_all(q_TNH, k_SKH, v_SKW, positions_T, first_position, options)


def _is_ours(q_TNH: Tensor, v_TKW: Tensor) -> bool:
    """Whether our kernel takes them."""
    is_16_bits = q_TNH.element_size() == 2
    return is_16_bits and has_triton(q_TNH.device) and max(q_TNH.shape[-1], v_TKW.shape[-1]) <= MAX_SIZE


def _is_torchs(q_TNH: Tensor, v_TKW: Tensor, options: AttentionOptions) -> bool:
    """Whether torch's kernel takes them."""
    size = q_TNH.shape[-1]
    is_16_bits = q_TNH.is_cuda and q_TNH.element_size() == 2
    return is_16_bits and size == v_TKW.shape[-1] and size % 8 == 0 and size <= MAX_SIZE and options.softcap is None


def _flash(q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, runs: Runs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """FlashAttention-2 (Dao 2023)."""
    window = options.window
    out_TNW, lse_NT, *_ = torch.ops.aten._flash_attention_forward(
        q_TNH,
        k_TKH,
        v_TKW,
        runs.bounds,
        runs.bounds,
        runs.longest,
        runs.longest,
        0.0,
        True,
        False,
        scale=options.scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0 if window is not None else -1,
    )
    return out_TNW, lse_NT.transpose(0, 1)
