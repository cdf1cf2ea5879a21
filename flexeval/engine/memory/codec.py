"""How numbers rest as bytes. Knows arithmetic on groups of numbers; not which numbers, nor where the bytes rest.

A codec works on a flat run of numbers whose length is a multiple of its group size, and says to the byte what it needs.
Where it has a kernel for it, it also multiplies a few tokens by a matrix as it rests.

Shapes: R runs, V numbers of a run, G groups, E numbers of a group, P bytes of its codes, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flexeval.engine.compute.kernels import has_triton
from flexeval.engine.compute.linear import CodedMatrix
from flexeval.errors import ModelError


class Codec(Protocol):
    """Turns a run of numbers into bytes and back."""

    name: str
    """As it appears in a setting."""
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

    def few_tokens(self, device: torch.device) -> int:
        """Up to how many tokens a matrix is better multiplied as it rests than unpacked; 0 where it cannot be."""
        ...

    def matrix(self, coded: Tensor, first: int, shape: tuple[int, int]) -> CodedMatrix:
        """The matrix `shape` (outputs, padded inputs) whose numbers begin at `first` of the run `coded`."""
        ...


_CHUNK_VALUES = 2**24
"""Numbers unpacked at a time at most: bounds the temporary memory to 100 MB."""
_ENCODED_VALUES = {"cpu": 2**18, "cuda": 2**24}
"""Numbers coded at a time: on a CPU what its cache holds, on a GPU what 300 MB of temporary memory hold."""


class Int4Codec:
    """Group-wise asymmetric 4-bit integers (Shen et al. 2020; FlexGen section 5).

    A group of g numbers is stored as round((x - min) / scale) with scale = (max - min) / 15, two to a byte: low nibbles
    hold the first half of the group, high nibbles the second. Scale and minimum are float16. All codes of a run come
    first, then a (scale, minimum) pair per group.
    """

    def __init__(self, group_size: int = 64):
        self.name = f"int4-g{group_size}"
        self.group_size = group_size

    def num_bytes(self, num_values: int) -> int:
        """Half a byte a number and four bytes a group."""
        assert num_values % self.group_size == 0, (num_values, self.group_size)
        return num_values // 2 + 4 * (num_values // self.group_size)

    def encode(self, values: Tensor) -> Tensor:
        """Quantize; what is decoded lies within half a step, and float16's rounding of its minimum and scale."""
        coded = torch.empty(self.num_bytes(values.numel()), dtype=torch.uint8, device=values.device)
        self.encode_part(values, 0, coded)
        return coded

    def encode_part(self, values: Tensor, first: int, run: Tensor) -> None:
        """Quantize a part of a run, a bounded number of groups at a time."""
        num_code_bytes = run.numel() * self.group_size // (self.group_size + 8)
        affine = run[num_code_bytes:].view(torch.float16).view(-1, 2)
        step = _ENCODED_VALUES[values.device.type]
        for start in range(0, values.numel(), step):
            packed_GP, affine_G2 = self._encode_groups(values[start : start + step].view(-1, self.group_size))
            code, group = (first + start) // 2, (first + start) // self.group_size
            run[code : code + packed_GP.numel()].view(packed_GP.shape).copy_(packed_GP)
            affine[group : group + affine_G2.shape[0]].copy_(affine_G2)

    def _encode_groups(self, values_GE: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[G, E / 2]` and (scale, minimum) `[G, 2]`; the same on every device."""
        groups_GE = values_GE.float()
        minimum_G1 = groups_GE.amin(1, keepdim=True).half()
        fifteen = torch.full((), 15.0, device=values_GE.device)  # by a plain number, a GPU would multiply with 1 / 15
        scale_G1 = ((groups_GE.amax(1, keepdim=True) - minimum_G1.float()) / fifteen).half()
        top_G1 = minimum_G1.float() + 15 * scale_G1.float()
        if not torch.isfinite(top_G1.to(values_GE.dtype)).all():  # covers every number: NaN and infinity spread to it
            raise ModelError(
                "a weight is infinite, NaN or too large, and cannot be quantized", mend="Use the setting none"
            )
        step_G1 = scale_G1.float().where(scale_G1 > 0, torch.ones_like(scale_G1, dtype=torch.float32))
        codes_GE = (groups_GE - minimum_G1.float()).div_(step_G1).round_().clamp_(0, 15).to(torch.int8)
        half = self.group_size // 2
        packed_GP = torch.add(codes_GE[:, :half], codes_GE[:, half:], alpha=16)  # wraps around as if unsigned
        return packed_GP.view(torch.uint8), torch.cat([scale_G1, minimum_G1], dim=1)

    def decode(self, coded: Tensor, out: Tensor) -> None:
        """Write minimum + scale * code, computed in float32, a bounded number of groups at a time."""
        num_values = out.shape[-1]
        assert coded.shape == (*out.shape[:-1], self.num_bytes(num_values)), (coded.shape, out.shape)
        coded_RB, out_RV = (coded[None], out[None]) if out.dim() == 1 else (coded, out)
        num_runs, num_groups = out_RV.shape[0], num_values // self.group_size
        packed_RGP = coded_RB[:, : num_values // 2].view(num_runs, num_groups, self.group_size // 2)
        affine_RG2 = coded_RB[:, num_values // 2 :].view(torch.float16).view(num_runs, num_groups, 2)
        out_RGE = out_RV.view(num_runs, num_groups, self.group_size)
        if has_triton(coded.device):
            from flexeval.engine.memory import int4_kernel

            return int4_kernel.unpack(packed_RGP, affine_RG2, out_RGE)
        step = _CHUNK_VALUES // self.group_size
        for packed_GP, affine_G2, out_GE in zip(packed_RGP, affine_RG2, out_RGE, strict=True):
            for first in range(0, num_groups, step):
                part = slice(first, first + step)
                self._decode_groups(packed_GP[part], affine_G2[part].float(), out_GE[part])

    def few_tokens(self, device: torch.device) -> int:
        """What the kernel is good for; without one, matrices are always unpacked."""
        if not has_triton(device):
            return 0
        from flexeval.engine.memory import int4_kernel

        return int4_kernel.MAX_TOKENS

    def matrix(self, coded: Tensor, first: int, shape: tuple[int, int]) -> CodedMatrix:
        """Views into the run: codes and scales of the matrix's groups."""
        num_outputs, num_inputs = shape
        num_groups = num_outputs * num_inputs // self.group_size
        num_code_bytes = coded.numel() * self.group_size // (self.group_size + 8)
        codes = coded[first // 2 : (first + num_outputs * num_inputs) // 2]
        affine = coded[num_code_bytes + first // self.group_size * 4 :][: 4 * num_groups]
        return Int4Matrix(
            codes.view(num_outputs, -1, self.group_size // 2), affine.view(torch.float16).view(num_outputs, -1, 2)
        )

    @staticmethod
    def _decode_groups(packed_GP: Tensor, affine_G2: Tensor, out_GE: Tensor) -> None:
        """Unpack some groups: in place, a pass over whole rows each, which a CPU does fastest."""
        half = packed_GP.shape[1]
        codes_GE = torch.empty(out_GE.shape, dtype=torch.uint8, device=out_GE.device)
        torch.bitwise_and(packed_GP, 15, out=codes_GE[:, :half])
        torch.bitwise_right_shift(packed_GP, 4, out=codes_GE[:, half:])
        is_float32 = out_GE.dtype == torch.float32
        values_GE = out_GE if is_float32 else torch.empty_like(codes_GE, dtype=torch.float32)
        values_GE.copy_(codes_GE).mul_(affine_G2[:, :1]).add_(affine_G2[:, 1:])
        if not is_float32:
            out_GE.copy_(values_GE)


class Int4Matrix(NamedTuple):
    """A matrix of `Int4Codec` as it rests on a GPU."""

    packed_OGP: Tensor
    """Codes of each row's groups."""
    affine_OG2: Tensor
    """Scale and minimum of each."""

    def multiply(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """`x @ W.T + bias`."""
        from flexeval.engine.memory import int4_kernel

        return int4_kernel.multiply(x_TI, self.packed_OGP, self.affine_OG2, bias_O)
