"""Prompts' attention on a GPU: what the kernel of `prompt_kernel.py` is launched with. Needs Triton.

Shapes: T tokens, S keys, N query heads, K KV heads, H size of a key, W size of a value, U blocks of queries.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.prompt_kernel import prompt_kernel
from flexeval.engine.compute.row import QUERY_BLOCK

_STEPS = ((32, 3), (32, 2), (16, 2))
"""Keys of a step and steps whose keys and values are on their way; the first that fits, most first."""
_KEPT_BYTES = 2**13
"""Of a program's memory, for what the compiler puts there."""
_LEAST = 16
"""Numbers of a tensor core's product."""


def attend_to_own(
    q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, blocks_U3: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Causal attention within runs of tokens.

    Args:
        q_TNH: Queries of all runs, in 16 bits.
        k_TKH: Their keys.
        v_TKW: Their values.
        blocks_U3: int32, as `Runs` has them.
        options: Scale, window and soft cap.

    Returns:
        Output `[T, N, W]` and log-sum-exp of the scores `[T, N]`, float32.
    """
    return _launch(q_TNH, k_TKH, v_TKW, blocks_U3, None, len(blocks_U3), options)


def attend_to_all(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKW: Tensor,
    positions_T: Tensor,
    first_position: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Attention of all queries to all keys, or to those of them in the window before each.

    Args:
        q_TNH: Queries, in 16 bits.
        k_SKH: Keys that lie before all of them.
        v_SKW: Their values.
        positions_T: int64, contiguous, the position of each query.
        first_position: Of the first key.
        options: Scale, window and soft cap.

    Returns:
        Output `[T, N, W]` and log-sum-exp of the scores `[T, N]`, float32, -inf where a query sees none of the keys.
    """
    positions = _Positions(positions_T, first_position)
    num_blocks = triton.cdiv(len(q_TNH), QUERY_BLOCK)
    return _launch(q_TNH, k_SKH, v_SKW, None, positions, num_blocks, options)


class _Positions(NamedTuple):
    queries_T: Tensor
    first_key: int


def _launch(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKW: Tensor,
    blocks_U3: Tensor | None,
    positions: _Positions | None,
    num_blocks: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, key_size = q_TNH.shape
    value_size = v_SKW.shape[-1]
    assert q_TNH.element_size() == 2, q_TNH.dtype
    assert q_TNH.stride(2) == k_SKH.stride(2) == v_SKW.stride(2) == 1, (q_TNH.stride(), k_SKH.stride(), v_SKW.stride())
    main = max(_LEAST, triton.next_power_of_2(key_size + 1) // 2)
    rest = max(0, key_size - main)
    value_room = max(_LEAST, triton.next_power_of_2(value_size))
    num_keys, num_stages = _steps(q_TNH.device, key_size, value_room)
    out_TNW = q_TNH.new_empty(num_tokens, num_heads, value_size)
    lse_TN = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q_TNH.device)
    if num_blocks:
        prompt_kernel[(num_blocks, num_heads)](
            q_TNH,
            k_SKH,
            v_SKW,
            blocks_U3,
            None if positions is None else positions.queries_T,
            out_TNW,
            lse_TN,
            num_tokens,
            len(k_SKH),
            0 if positions is None else positions.first_key,
            options.scale,
            options.softcap or 0.0,
            options.window or 0,
            *q_TNH.stride()[:2],
            *k_SKH.stride()[:2],
            *v_SKW.stride()[:2],
            HEADS_PER_KV=num_heads // k_SKH.shape[1],
            KEY_SIZE=key_size,
            KEY_MAIN=main,
            KEY_REST=max(_LEAST, triton.next_power_of_2(rest)) if rest else 0,
            VALUE_SIZE=value_size,
            VALUE_ROOM=value_room,
            QUERIES=QUERY_BLOCK,
            KEYS=num_keys,
            IS_CAUSAL=blocks_U3 is not None,
            HAS_WINDOW=options.window is not None,
            HAS_SOFTCAP=options.softcap is not None,
            num_warps=4,
            num_stages=num_stages,
        )
    return out_TNW, lse_TN


@cache
def _steps(device: torch.device, key_size: int, value_size: int) -> tuple[int, int]:
    room = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"] - _KEPT_BYTES
    per_key = 2 * (key_size + value_size)
    fitting = [step for step in _STEPS if 2 * QUERY_BLOCK * key_size + step[0] * step[1] * per_key <= room]
    return fitting[0] if fitting else _STEPS[-1]
