"""How numbers rest as bytes. Knows arithmetic on groups of numbers; not which numbers, nor where the bytes rest.

A codec works on a flat run of numbers whose length is a multiple of its group size, and says to the byte what it needs.
Where it has a kernel for it, it also multiplies a few tokens by a matrix as it rests.

Shapes: R runs, V numbers of a run, B bytes of a run, G groups, E numbers of a group, P bytes of its codes, T tokens,
I inputs, O outputs, X experts.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flexeval.engine.codecs.coded import CodedMatrices, CodedMatrix, Int4Matrices, Int4Matrix
from flexeval.engine.compute import host_unpack
from flexeval.engine.compute.few_tokens import most_read_tokens
from flexeval.engine.kernels import has_triton
from flexeval.errors import ModelError


class Codec(Protocol):
    """Turns a run of numbers into bytes and back."""

    name: str
    """It names the bytes: equal names, equal bytes."""
    group_size: int
    """Numbers that are coded together."""

    def num_bytes(self, num_values: int) -> int:
        """Exact bytes of `num_values` coded numbers, a multiple of `group_size`."""
        ...

    def encode(self, values: Tensor) -> Tensor:
        """Code a 1-D run as uint8 `[num_bytes]`. Raises `ModelError` for what would not come back as finite numbers."""
        ...

    def encode_part(self, values: Tensor, first: int, run: Tensor) -> None:
        """Code the part `values` of a longer run, which begins at its number `first`, into the run's bytes `run`.

        The bytes may rest on another device. Raises `ModelError` as `encode` does.
        """
        ...

    def decode(self, coded: Tensor, out: Tensor) -> None:
        """Fill runs.

        Args:
            coded: uint8 `[..., num_bytes(V)]`, a run or several that lie apart.
            out: `[..., V]` of any float type, on the same device.
        """
        ...

    def decode_rows(self, coded: Tensor, num_rows: int, which: slice | Tensor, out: Tensor) -> None:
        """Fill rows of a matrix that was coded as one run.

        Args:
            coded: uint8 `[num_bytes(V)]`.
            num_rows: Rows of the matrix, which are whole groups.
            which: A slice of them, or an index `[R]`.
            out: `[R, V / num_rows]` of any float type, on the same device.
        """
        ...

    def few_tokens(self, device: torch.device, dtype: torch.dtype) -> int:
        """Up to how many tokens of a type a matrix is better multiplied as it rests than unpacked; 0 for none."""
        ...

    def matrix(self, coded: Tensor, first: int, shape: tuple[int, int]) -> CodedMatrix:
        """The matrix `shape` (outputs, padded inputs) whose numbers begin at `first` of the run `coded`."""
        ...

    def matrices(self, coded_XB: Tensor, first: int, shape: tuple[int, int]) -> CodedMatrices:
        """A matrix of each run, as `matrix` finds it."""
        ...


AFFINE_BYTES = 4
"""A group's scale and minimum."""
_CHUNK_VALUES = 2**24
"""Numbers unpacked at a time at most: bounds the temporary memory to 100 MB."""
_ENCODED_VALUES = {"cpu": 2**18, "cuda": 2**24}
"""Numbers coded at a time: on a CPU what its cache holds, on a GPU what 300 MB of temporary memory hold."""


class Affine(NamedTuple):
    """How groups are cut into steps: a code stands for minimum + scale * code."""

    scale_G1: Tensor
    """float16, not negative."""
    minimum_G1: Tensor
    """float16."""


class IntegerCodec:
    """Group-wise asymmetric integers of 8, 4 or 2 bits (Shen et al. 2020; FlexGen section 5).

    A group of g numbers is stored as round((x - min) / scale) with scale = (max - min) / (2^bits - 1). A byte holds 8 /
    bits codes: the lowest bits are of the first part of the group, the next ones of its second part, and so on. Scale
    and minimum are float16. All codes of a run come first, then a (scale, minimum) pair per group.
    """

    def __init__(self, bits: int = 4, group_size: int = 64):
        assert bits in (2, 4, 8) and group_size * bits % 16 == 0, (bits, group_size, "float16 comes after the codes")
        self.name = f"int{bits}-g{group_size}"
        self.bits = bits
        self.group_size = group_size
        self.code_bytes = group_size * bits // 8
        """Bytes of a group's codes."""

    def num_bytes(self, num_values: int) -> int:
        """`bits` a number and four bytes a group."""
        assert num_values % self.group_size == 0, (num_values, self.group_size)
        return num_values // self.group_size * (self.code_bytes + AFFINE_BYTES)

    def encode(self, values: Tensor) -> Tensor:
        """Quantize; what is decoded lies within half a step, and float16's rounding of its minimum and scale."""
        coded = torch.empty(self.num_bytes(values.numel()), dtype=torch.uint8, device=values.device)
        self.encode_part(values, 0, coded)
        return coded

    def encode_part(self, values: Tensor, first: int, run: Tensor) -> None:
        """Quantize a part of a run, a bounded number of groups at a time."""
        codes_GP, affine_G2 = self.split(run)
        step = _ENCODED_VALUES[values.device.type]
        for start in range(0, values.numel(), step):
            values_GE = values[start : start + step].view(-1, self.group_size)
            packed_GP, affine = self.encode_groups(values_GE)
            # Covers every number: NaN and infinity spread to the ends of their group.
            if not torch.isfinite((affine[:, 1].float() + self.top * affine[:, 0].float()).to(values.dtype)).all():
                raise ModelError(
                    "a weight is infinite, NaN or too large, and cannot be quantized", mend="Use the setting none"
                )
            group = slice((first + start) // self.group_size, (first + start) // self.group_size + len(values_GE))
            codes_GP[group].copy_(packed_GP)
            affine_G2[group].copy_(affine)

    def encode_groups(self, values_GE: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[G, P]` and (scale, minimum) `[G, 2]`; the same on every device."""
        groups_GE = values_GE.float()
        scale_G1, minimum_G1 = self.choose(groups_GE)
        codes_GE = (groups_GE - minimum_G1.float()).div_(step_of(scale_G1)).round_().clamp_(0, self.top)
        codes_GE = codes_GE.to(torch.uint8)
        packed_GP = codes_GE[:, : self.code_bytes]
        for part in range(1, self._parts):
            own = slice(part * self.code_bytes, (part + 1) * self.code_bytes)
            packed_GP = torch.add(packed_GP, codes_GE[:, own], alpha=1 << self.bits * part)
        return packed_GP, torch.cat([scale_G1, minimum_G1], dim=1)

    def choose(self, groups_GE: Tensor) -> Affine:
        """Scale and minimum of float32 groups: the ends of each are its first and last code."""
        minimum_G1 = groups_GE.amin(1, keepdim=True).half()
        top = torch.full((), float(self.top), device=groups_GE.device)  # by a plain number, a GPU would multiply
        return Affine(((groups_GE.amax(1, keepdim=True) - minimum_G1.float()) / top).half(), minimum_G1)

    def decode(self, coded: Tensor, out: Tensor) -> None:
        """Write minimum + scale * code, computed in float32, a bounded number of groups at a time."""
        assert coded.shape == (*out.shape[:-1], self.num_bytes(out.shape[-1])), (coded.shape, out.shape)
        coded_RB, out_RV = (coded[None], out[None]) if out.dim() == 1 else (coded, out)
        self._decode(*self.split(coded_RB), out_RV)

    def decode_rows(self, coded: Tensor, num_rows: int, which: slice | Tensor, out: Tensor) -> None:
        """Unpack some rows of a matrix."""
        codes_GP, affine_G2 = self.split(coded)
        self._decode(codes_GP.unflatten(0, (num_rows, -1))[which], affine_G2.unflatten(0, (num_rows, -1))[which], out)

    def _decode(self, codes_RGP: Tensor, affine_RG2: Tensor, out_RV: Tensor) -> None:
        out_RGE = out_RV.view(*codes_RGP.shape[:2], self.group_size)
        if has_triton(out_RV.device):
            from flexeval.engine.codecs import pack_kernel

            return pack_kernel.unpack(codes_RGP, affine_RG2, out_RGE, bits=self.bits)
        if host_unpack.unpack(codes_RGP, affine_RG2, out_RGE, bits=self.bits):
            return None
        num_runs, num_groups = codes_RGP.shape[:2]
        num_at_once = max(1, _CHUNK_VALUES // self.group_size)
        runs_at_once = max(1, num_at_once // max(1, num_groups))
        for run in range(0, num_runs, runs_at_once):
            for group in range(0, num_groups, num_at_once):
                part = slice(run, run + runs_at_once), slice(group, group + num_at_once)
                self._decode_groups(codes_RGP[part], affine_RG2[part].float(), out_RGE[part])

    def num_code_bytes(self, num_values: int) -> int:
        """Of these, the bytes of the codes."""
        return num_values // self.group_size * self.code_bytes

    def split(self, coded: Tensor) -> tuple[Tensor, Tensor]:
        """Views of runs `[..., B]`: codes `[..., G, P]`, float16 scales and minima `[..., G, 2]`."""
        num_groups = coded.shape[-1] // (self.code_bytes + AFFINE_BYTES)
        num_code_bytes = num_groups * self.code_bytes
        codes = coded[..., :num_code_bytes].unflatten(-1, (num_groups, self.code_bytes))
        return codes, coded[..., num_code_bytes:].view(torch.float16).unflatten(-1, (num_groups, 2))

    def few_tokens(self, device: torch.device, dtype: torch.dtype) -> int:
        """What the kernel is good for; without one, matrices are always unpacked."""
        if self.bits == 4 and has_triton(device):
            from flexeval.engine.codecs import product_kernel

            return int(product_kernel.MAX_TOKENS)
        is_ours = self.bits == 4 and device.type == "cpu" and dtype == torch.bfloat16
        return most_read_tokens() if is_ours else 0

    def matrix(self, coded: Tensor, first: int, shape: tuple[int, int]) -> CodedMatrix:
        """Views into the run: codes and scales of the matrix's groups."""
        return Int4Matrix(*self._rows(coded, first, shape))

    def matrices(self, coded_XB: Tensor, first: int, shape: tuple[int, int]) -> CodedMatrices:
        """Views into the runs."""
        return Int4Matrices(*self._rows(coded_XB, first, shape))

    def _rows(self, coded: Tensor, first: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Codes `[..., O, G, P]`, scales and minima `[..., O, G, 2]` of a matrix within each run."""
        num_outputs, num_inputs = shape
        groups = slice(first // self.group_size, (first + num_outputs * num_inputs) // self.group_size)
        codes, affine = (part[..., groups, :].unflatten(-2, (num_outputs, -1)) for part in self.split(coded))
        return codes, affine

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def _parts(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    def _decode_groups(self, codes: Tensor, affine: Tensor, out: Tensor) -> None:
        """Unpack groups `[..., P]` to `[..., E]`: in place, a pass over whole rows each, which a CPU does fastest."""
        codes_E = codes if self.bits == 8 else torch.empty(out.shape, dtype=torch.uint8, device=out.device)
        for part in range(self._parts if self.bits < 8 else 0):
            own = codes_E[..., part * self.code_bytes : (part + 1) * self.code_bytes]
            torch.bitwise_right_shift(codes, self.bits * part, out=own)
            if part < self._parts - 1:
                own.bitwise_and_(self.top)
        is_float32 = out.dtype == torch.float32
        values = out if is_float32 else torch.empty(out.shape, dtype=torch.float32, device=out.device)
        values.copy_(codes_E).mul_(affine[..., :1]).add_(affine[..., 1:])
        if not is_float32:
            out.copy_(values)


def step_of(scale: Tensor) -> Tensor:
    """What to divide by for codes, float32: 1 where all numbers of a group are alike."""
    return scale.float().where(scale > 0, torch.ones_like(scale, dtype=torch.float32))
