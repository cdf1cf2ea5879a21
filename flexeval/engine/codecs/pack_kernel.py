"""Triton kernels that pack numbers into group-wise integers and unpack them.

Knows the bytes of `IntegerCodec`, which its docstring describes. Needs Triton: import it only where a GPU computes.

Shapes: R runs, G groups of a run, E numbers of a group, P bytes of its codes, T tokens, K KV heads, H size of a key,
W size of a value, B bytes of a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_GROUPS = 64
"""Groups of one program."""


def unpack(codes_RGP: Tensor, affine_RG2: Tensor, out_RGE: Tensor, *, bits: int) -> None:
    """Write minimum + scale * code, for R runs that may lie apart (each of them is contiguous).

    Args:
        codes_RGP: uint8 codes of `bits` bits.
        affine_RG2: float16 scale and minimum of each group.
        out_RGE: Where the numbers go; any float type.
        bits: 8, 4 or 2.
    """
    num_runs, num_groups, num_bytes = codes_RGP.shape
    if num_runs and num_groups:
        _unpack_kernel[(num_runs * triton.cdiv(num_groups, _GROUPS),)](
            codes_RGP,
            affine_RG2,
            out_RGE,
            codes_RGP.stride(0),
            affine_RG2.stride(0),
            out_RGE.stride(0),
            num_groups,
            num_bytes,
            BITS=bits,
            BYTES=triton.next_power_of_2(num_bytes),
            GROUPS=_GROUPS,
        )


@triton.jit
def _unpack_kernel(
    codes,
    affine,
    out,
    codes_stride,
    affine_stride,
    out_stride,
    num_groups,
    num_bytes,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    num_blocks = tl.cdiv(num_groups, GROUPS)
    run, block = tl.program_id(0).to(tl.int64) // num_blocks, tl.program_id(0) % num_blocks
    group = block.to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    byte = tl.arange(0, BYTES)
    is_group = group < num_groups
    is_byte = is_group[:, None] & (byte < num_bytes)[None, :]
    packed = tl.load(codes + run * codes_stride + group[:, None] * num_bytes + byte[None, :], mask=is_byte, other=0)
    pair = affine + run * affine_stride + 2 * group
    scale = tl.load(pair, mask=is_group, other=0.0).to(tl.float32)
    minimum = tl.load(pair + 1, mask=is_group, other=0.0).to(tl.float32)
    target = out + run * out_stride + group[:, None] * (num_bytes * (8 // BITS)) + byte[None, :]
    for part in tl.static_range(8 // BITS):
        code = (packed >> (BITS * part)) & ((1 << BITS) - 1)
        number = minimum[:, None] + scale[:, None] * code.to(tl.float32)
        tl.store(target + part * num_bytes, number.to(out.dtype.element_ty), mask=is_byte)


def pack(
    keys_TKH: Tensor, values_TKW: Tensor, out_CB: Tensor, places_T: Tensor | None, *, bits: int, group_size: int
) -> None:
    """Code keys and values: a run of each token, its heads in order, of each the key and then the value.

    Args:
        keys_TKH: Keys of any float type; a head's numbers lie side by side, as do a value's.
        values_TKW: Values.
        out_CB: uint8, where the bytes go; tokens may lie apart.
        places_T: int64, at which of its tokens; None fills them in order.
        bits: 8, 4 or 2.
        group_size: Numbers of a group; it divides H and W.
    """
    num_tokens, num_heads, key_size = keys_TKH.shape
    value_size = values_TKW.shape[2]
    assert keys_TKH.stride(2) == values_TKW.stride(2) == out_CB.stride(1) == 1
    num_groups = num_tokens * num_heads * (key_size + value_size) // group_size
    if num_groups:
        num_bytes = group_size * bits // 8
        num_code_bytes = num_heads * (key_size + value_size) * bits // 8
        affine = out_CB[:, num_code_bytes:].view(torch.float16)
        _pack_kernel[(triton.cdiv(num_groups, _GROUPS),)](
            keys_TKH,
            values_TKW,
            out_CB,
            affine,
            places_T,
            *keys_TKH.stride()[:2],
            *values_TKW.stride()[:2],
            out_CB.stride(0),
            affine.stride(0),
            num_groups,
            num_heads,
            key_size // group_size,
            value_size // group_size,
            num_bytes,
            HAS_PLACES=places_T is not None,
            BITS=bits,
            BYTES=triton.next_power_of_2(num_bytes),
            GROUPS=_GROUPS,
        )


@triton.jit
def _pack_kernel(
    keys,
    values,
    codes,
    affine,
    places,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    codes_stride,
    affine_stride,
    num_groups,
    num_heads,
    key_groups,
    value_groups,
    num_bytes,
    HAS_PLACES: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The arithmetic of `IntegerCodec.encode_groups`, step by step."""
    TOP: tl.constexpr = (1 << BITS) - 1
    PARTS: tl.constexpr = 8 // BITS
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    is_group = group < num_groups
    head_groups = key_groups + value_groups
    token, of_token = group // (num_heads * head_groups), group % (num_heads * head_groups)
    head, of_head = of_token // head_groups, of_token % head_groups
    is_key = of_head < key_groups
    group_size = num_bytes * PARTS
    key_source = keys + token * key_token_stride + head * key_head_stride + of_head * group_size
    value_source = values + token * value_token_stride + head * value_head_stride + (of_head - key_groups) * group_size
    source = tl.where(is_key, key_source, value_source)
    byte = tl.arange(0, BYTES)
    is_byte = is_group[:, None] & (byte < num_bytes)[None, :]
    low = tl.full((GROUPS,), float("inf"), tl.float32)
    high = tl.full((GROUPS,), -float("inf"), tl.float32)
    is_number = is_group
    for part in tl.static_range(PARTS):
        numbers = tl.load(source[:, None] + part * num_bytes + byte[None, :], mask=is_byte, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(is_byte, numbers, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(is_byte, numbers, -float("inf")), 1))
        is_number &= tl.sum((numbers != numbers).to(tl.int32), 1) == 0
    minimum = tl.where(is_number, low, float("nan")).to(tl.float16)
    scale = tl.div_rn(high - minimum.to(tl.float32), tl.full((GROUPS,), TOP, tl.float32)).to(tl.float16)
    step = tl.where(scale > 0, scale.to(tl.float32), 1.0)
    packed = tl.zeros((GROUPS, BYTES), tl.int32)
    for part in tl.static_range(PARTS):
        numbers = tl.load(source[:, None] + part * num_bytes + byte[None, :], mask=is_byte, other=0.0).to(tl.float32)
        steps = tl.div_rn(numbers - minimum.to(tl.float32)[:, None], tl.broadcast_to(step[:, None], (GROUPS, BYTES)))
        steps = tl.minimum(tl.maximum(steps, 0.0), TOP)
        rounded = (steps + 12582912.0) - 12582912.0  # 1.5 * 2^23: adding it rounds to the nearest even whole number
        packed |= rounded.to(tl.int32) << (BITS * part)
    place = token
    if HAS_PLACES:
        place = tl.load(places + token, mask=is_group, other=0)
    target = codes + place * codes_stride + of_token * num_bytes
    tl.store(target[:, None] + byte[None, :], packed.to(tl.uint8), mask=is_byte)
    pair = affine + place * affine_stride + 2 * of_token
    tl.store(pair, scale, mask=is_group)
    tl.store(pair + 1, minimum, mask=is_group)
