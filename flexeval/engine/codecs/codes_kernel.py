"""What Triton kernels do to read group-wise integers where they lie: functions for them to call.

Knows the bytes of `IntegerCodec`, which its docstring describes. Needs Triton: import it only where a GPU computes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def numbers_of(
    size, part: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ROOM: tl.constexpr
):
    """Which numbers of a key or value the codes in one part of its bytes are, as `codes_of` loads them.

    Returns:
        Their places, and whether each is one.
    """
    place = tl.arange(0, SIZE)
    PART: tl.constexpr = GROUP * BITS // 8
    number = place // ROOM * GROUP + part * PART + place % ROOM
    return number, (place % ROOM < PART) & (number < size)


@triton.jit
def codes_of(
    codes,
    affine,
    is_token,
    size,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Bytes `[tokens, groups, ROOM]` of one head of some tokens, and each group's scale and minimum, float16."""
    PART: tl.constexpr = GROUP * BITS // 8
    group, byte = tl.arange(0, SIZE // ROOM), tl.arange(0, ROOM)
    is_group = is_token[:, None] & (group < size // GROUP)[None, :]
    source = codes[:, None, None] + (group * PART)[None, :, None] + byte[None, None, :]
    packed = tl.load(source, mask=is_group[:, :, None] & (byte < PART)[None, None, :], other=0)
    pair = affine[:, None] + 2 * group[None, :]
    scale = tl.load(pair, mask=is_group, other=0.0)
    minimum = tl.load(pair + 1, mask=is_group, other=0.0)
    return packed, scale, minimum


@triton.jit
def part_of(packed, scale, minimum, part: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """The numbers in one part of the bytes, rounded once."""
    code = (packed >> (part * BITS)) & ((1 << BITS) - 1)
    numbers = minimum[:, :, None].to(tl.float32) + scale[:, :, None].to(tl.float32) * code.to(tl.float32)
    return numbers.to(dtype)


@triton.jit
def nibbles_of(packed, scale, minimum, dtype: tl.constexpr):
    """Both parts of bytes with two codes, rounded once.

    In float16 two numbers at a time: bits 0x6400 + code are the number 1024 + code, which a subtraction makes exact.
    In bfloat16, which has fewer bits than a scale, one at a time in float32: bits 0x3f800000 + (code << 19) are the
    number 1 + code / 16. That is multiplied by 16 scales, and those are taken off the minimum: exactly, but beside a
    minimum below a 256th of the scale, where a millionth of the scale is lost.
    """
    if dtype == tl.float16:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, bias;
            mov.b32 bias, 0x64006400;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            shr.u32 c, a, 4;
            shr.u32 d, b, 4;
            lop3.b32 a, a, 0x000f000f, bias, 0xea;
            lop3.b32 b, b, 0x000f000f, bias, 0xea;
            lop3.b32 c, c, 0x000f000f, bias, 0xea;
            lop3.b32 d, d, 0x000f000f, bias, 0xea;
            sub.f16x2 a, a, bias;
            sub.f16x2 b, b, bias;
            sub.f16x2 c, c, bias;
            sub.f16x2 d, d, bias;
            fma.rn.f16x2 $0, a, $5, $7;
            fma.rn.f16x2 $1, b, $6, $8;
            fma.rn.f16x2 $2, c, $5, $7;
            fma.rn.f16x2 $3, d, $6, $8;
            }""",
            "=r,=r,=r,=r,r,r,r,r,r",
            [packed, scale[:, :, None], minimum[:, :, None]],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    elif dtype == tl.bfloat16:
        steps = 16.0 * scale[:, :, None].to(tl.float32)
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, one;
            .reg .b32 l0, l1, l2, l3, h0, h1, h2, h3;
            mov.b32 one, 0x0000003f;
            shl.b32 a, $4, 3;
            shr.u32 b, $4, 1;
            lop3.b32 a, a, 0x78787878, 0x80808080, 0xea;
            lop3.b32 b, b, 0x78787878, 0x80808080, 0xea;
            prmt.b32 l0, a, one, 0x4055;
            prmt.b32 l1, a, one, 0x4155;
            prmt.b32 l2, a, one, 0x4255;
            prmt.b32 l3, a, one, 0x4355;
            prmt.b32 h0, b, one, 0x4055;
            prmt.b32 h1, b, one, 0x4155;
            prmt.b32 h2, b, one, 0x4255;
            prmt.b32 h3, b, one, 0x4355;
            fma.rn.f32 l0, l0, $5, $9;
            fma.rn.f32 l1, l1, $6, $10;
            fma.rn.f32 l2, l2, $7, $11;
            fma.rn.f32 l3, l3, $8, $12;
            fma.rn.f32 h0, h0, $5, $9;
            fma.rn.f32 h1, h1, $6, $10;
            fma.rn.f32 h2, h2, $7, $11;
            fma.rn.f32 h3, h3, $8, $12;
            cvt.rn.bf16x2.f32 $0, l1, l0;
            cvt.rn.bf16x2.f32 $1, l3, l2;
            cvt.rn.bf16x2.f32 $2, h1, h0;
            cvt.rn.bf16x2.f32 $3, h3, h2;
            }""",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
            [packed, steps, minimum[:, :, None].to(tl.float32) - steps],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        low = part_of(packed, scale, minimum, 0, 4, dtype)
        high = part_of(packed, scale, minimum, 1, 4, dtype)
    return low, high
