"""Decode attention on a GPU: what the kernels of `decode_kernel.py` are launched with. Knows logs; needs Triton.

Shapes: B sequences, N query heads, K KV heads, S context, Z splits, H size of a key, W size of a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from flexeval.engine.codecs.kv_format import CodedFormat, KVLog, PlainFormat
from flexeval.engine.compute.decode_kernel import decode_kernel, merge_splits_kernel
from flexeval.engine.kernels import num_processors

_BLOCK_TOKENS = 32
"""Context tokens of one step of a program, which is a single warp: it waits for no other."""
_CODED_TOKENS = 16
"""The same where they rest coded: more would take so many registers that few programs run at a time."""
_SPLIT_TOKENS = 256
"""A split of a context has so many tokens at least."""
_PROGRAMS_PER_PROCESSOR = 4
"""The context is split until about so many programs run on each multiprocessor."""


def decode_attention(
    q_BNH: Tensor,
    log: KVLog,
    index_BS: Tensor,
    lengths_B: Tensor,
    out_BNW: Tensor,
    lse_BN: Tensor,
    *,
    max_length: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Attention of one query per sequence over its own context.

    Args:
        q_BNH: Queries.
        log: Keys and values.
        index_BS: int32, place in the log of each context token.
        lengths_B: int32, how many of them are each sequence's.
        out_BNW: Contiguous; filled with the output.
        lse_BN: Contiguous float32; filled with the log-sum-exp of the scores.
        max_length: The largest of `lengths_B`, or more.
        scale: Factor on the scores.
        window: A query sees the last `window` tokens only.
        softcap: Scores become softcap * tanh(score / softcap).
    """
    num_sequences, num_heads, _ = q_BNH.shape
    num_kv_heads, key_size, value_size = log.format.shape
    assert q_BNH.stride(2) == index_BS.stride(1) == 1
    heads_per_kv = num_heads // num_kv_heads
    wanted = _PROGRAMS_PER_PROCESSOR * num_processors(q_BNH.device) // (num_sequences * num_kv_heads)
    num_splits = max(1, min(wanted, triton.cdiv(max_length, _SPLIT_TOKENS)))
    assert out_BNW.is_contiguous() and lse_BN.is_contiguous()
    out_BNZW, lse_BNZ = out_BNW, lse_BN
    if num_splits > 1:
        out_BNZW = q_BNH.new_empty(num_sequences, num_heads, num_splits, value_size, dtype=torch.float32)
        lse_BNZ = q_BNH.new_empty(num_sequences, num_heads, num_splits, dtype=torch.float32)
    source = _source(log)
    block_tokens = _CODED_TOKENS if log.format.is_lossy else _BLOCK_TOKENS
    decode_kernel[(num_sequences, num_kv_heads, num_splits)](
        q_BNH,
        *source.tensors,
        index_BS,
        lengths_B,
        out_BNZW,
        lse_BNZ,
        scale,
        window or 0,
        softcap or 0.0,
        key_size,
        value_size,
        *q_BNH.stride()[:2],
        *source.strides,
        index_BS.stride(0),
        HEADS_PER_KV=heads_per_kv,
        HEADS=max(8, triton.next_power_of_2(heads_per_kv)),
        KEY_SIZE=_padded(key_size, source),
        VALUE_SIZE=_padded(value_size, source),
        BITS=source.bits,
        GROUP=source.group_size,
        ROOM=source.room,
        TOKENS=block_tokens,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        num_warps=1 if q_BNH.element_size() == 2 else 4,
        num_stages=2,
    )
    if num_splits > 1:
        merge_splits_kernel[(num_sequences * num_heads,)](
            out_BNZW,
            lse_BNZ,
            out_BNW,
            lse_BN,
            num_splits,
            value_size,
            SPLITS=triton.next_power_of_2(num_splits),
            VALUE_SIZE=triton.next_power_of_2(value_size),
        )


class _Source(NamedTuple):
    """What the kernel reads keys and values from."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    """Keys and values, or their codes; scales and minima of each."""
    strides: tuple[int, int, int, int]
    """From token to token and from head to head: of the first two tensors, and of the last two."""
    bits: int = 8
    """Of a code."""
    group_size: int = 1
    """Numbers that share a scale; 1 where nothing is coded."""

    @property
    def room(self) -> int:
        """Bytes of a group in a program: a power of two."""
        return int(triton.next_power_of_2(self.group_size * self.bits // 8))


def _source(log: KVLog) -> _Source:
    num_heads, key_size, value_size = log.format.shape
    if isinstance(log.format, PlainFormat):
        keys, values = log.format.views(log.data_CB)
        token_stride, head_stride, _ = keys.stride()
        return _Source((keys, values, keys, values), (token_stride, head_stride, 0, 0))
    assert isinstance(log.format, CodedFormat)
    codec, data_CB = log.format.codec, log.data_CB
    codes = codec.num_code_bytes(log.format.shape.num_values)
    affine = data_CB[:, codes:].view(torch.float16)
    head_bytes, head_groups = codes // num_heads, (key_size + value_size) // codec.group_size
    return _Source(
        (
            data_CB,
            data_CB[:, codec.num_code_bytes(key_size) :],
            affine,
            affine[:, 2 * key_size // codec.group_size :],
        ),
        (data_CB.stride(0), head_bytes, affine.stride(0), 2 * head_groups),
        codec.bits,
        codec.group_size,
    )


def _padded(size: int, source: _Source) -> int:
    """Bytes (where nothing is coded, numbers) of a key or value in a program: a power of two of groups."""
    least = 16  # of a product on tensor cores
    return int(source.room * triton.next_power_of_2(max(size // source.group_size, triton.cdiv(least, source.room))))
