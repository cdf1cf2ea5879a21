"""One layer's parameters as one contiguous run of bytes. Knows names, shapes and offsets; not the layer's arithmetic.

A slab is [tensors kept as they are | coded matrices | expert 0 | expert 1 | ...]. With a codec, every matrix but a
router's is coded along its input dimension, all matrices as one run, so that one unpack serves the whole layer. An
expert is a slab of its own, so that its matrices lie side by side and are read, and unpacked, without the other
experts'.

Shapes: E experts, B bytes of one, V coded numbers of one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from flexeval.engine.codecs.codec import Codec
from flexeval.engine.codecs.coded import Coded
from flexeval.engine.compute.spec import TensorSpec
from flexeval.errors import ModelError

ALIGNMENT = 64
"""Bytes; every tensor starts at a multiple, wide enough for any vector load."""
_FORMAT = 2
"""Raised when this module or a codec lays the same numbers out in another way: slabs on disk are then made anew."""
_PACKED_VALUES = 2**24
"""Numbers moved to the device that codes them at a time, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Raw:
    spec: TensorSpec
    offset: int  # bytes

    @property
    def num_bytes(self) -> int:
        return math.prod(self.spec.shape) * self.spec.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class _Coded:
    spec: TensorSpec
    offset: int  # values
    row_size: int
    padded_row_size: int

    @property
    def num_values(self) -> int:
        return math.prod(self.spec.shape) // self.row_size * self.padded_row_size


class SlabLayout:
    """Where each tensor of one layer lies in the layer's slab."""

    def __init__(self, specs: list[TensorSpec], codec: Codec | None):
        """Lay out `specs` in order, experts last; with a codec, what has two or more dimensions and is no router."""
        self.codec = codec
        stacked = [spec for spec in specs if spec.num_experts]
        self.num_experts = stacked[0].num_experts if stacked else 0
        """Experts whose tensors lie apart."""
        assert all(spec.num_experts == self.num_experts == spec.shape[0] for spec in stacked), stacked
        own = [replace(spec, shape=spec.shape[1:], num_experts=0) for spec in stacked]
        self.expert: SlabLayout | None = SlabLayout(own, codec) if stacked else None
        """The layout of one expert."""
        self._raw: list[_Raw] = []
        self._coded: list[_Coded] = []
        offset = num_values = 0
        for spec in specs:
            if spec.num_experts:
                continue
            if codec is not None and len(spec.shape) >= 2 and not spec.is_router:
                row_size = spec.shape[-2] if spec.is_input_first else spec.shape[-1]
                padded = math.ceil(row_size / codec.group_size) * codec.group_size
                self._coded.append(_Coded(spec=spec, offset=num_values, row_size=row_size, padded_row_size=padded))
                num_values += self._coded[-1].num_values
            else:
                self._raw.append(_Raw(spec=spec, offset=offset))
                offset += math.ceil(self._raw[-1].num_bytes / ALIGNMENT) * ALIGNMENT
        self._num_raw_bytes = offset
        self._num_dense_values = num_values
        self._num_coded_bytes = codec.num_bytes(num_values) if codec is not None and num_values else 0
        self.num_dense_bytes = math.ceil((offset + self._num_coded_bytes) / ALIGNMENT) * ALIGNMENT
        """Length of what lies before the experts."""
        self.num_bytes: int = self.num_dense_bytes
        """Exact length of the slab."""
        self.num_coded_values: int = num_values
        """Numbers the codec unpacks; the caller provides room for them."""
        types = {coded.spec.dtype for coded in self._coded}
        if self.expert is not None:
            self.num_bytes += self.num_experts * self.expert.num_bytes
            self.num_coded_values += self.num_experts * self.expert.num_coded_values
            types |= {coded.spec.dtype for coded in self.expert._coded}
        assert len(types) <= 1, (types, "coded matrices of one layer share a type")
        self.coded_dtype: torch.dtype = types.pop() if types else torch.float32
        """The type coded matrices are unpacked to."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same tensors would be packed to other bytes."""
        experts = (self.num_experts, self.expert.fingerprint) if self.expert else None
        parts = [_FORMAT, self.codec.name if self.codec else None, self._raw, self._coded, experts]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def pack(self, tensors: Mapping[str, Tensor], *, device: torch.device) -> Tensor:
        """The slab of one layer: uint8 `[num_bytes]` on `device`. Raises `ModelError` for what cannot be coded."""
        slab = torch.zeros(self.num_bytes, dtype=torch.uint8, device=device)
        self.pack_into(dict(tensors), slab, device=device)
        return slab

    def pack_into(self, tensors: dict[str, Tensor], slab: Tensor, *, device: torch.device) -> None:
        """Fill a layer's slab, a bounded piece at a time.

        Args:
            tensors: By name. Each is taken out when its turn comes, so that its memory can go.
            slab: uint8 `[num_bytes]`, on any device.
            device: Where matrices are coded.

        Raises:
            ModelError: A matrix cannot be coded; the message names it.
        """
        for raw in self._raw:
            tensor = tensors.pop(raw.spec.name)
            assert tensor.shape == raw.spec.shape, (raw.spec, tensor.shape)
            self._raw_place(raw, slab).copy_(tensor)
        for coded in self._coded:
            tensor = tensors.pop(coded.spec.name)
            assert tensor.shape == coded.spec.shape and self.codec is not None, (coded.spec, tensor.shape)
            try:
                self._encode(coded, tensor, self._coded_run(slab), self.codec, device)
            except ModelError as error:
                raise ModelError(error.what, where=coded.spec.name, mend=error.mend) from error
        if self.expert is not None:
            stacked = {name: tensors.pop(name) for name in self.expert.names}
            assert all(len(tensor) == self.num_experts for tensor in stacked.values()), self.num_experts
            for expert, part in enumerate(self._experts(slab)):
                self.expert.pack_into({name: tensor[expert] for name, tensor in stacked.items()}, part, device=device)

    def _encode(self, coded: _Coded, tensor: Tensor, run: Tensor, codec: Codec, device: torch.device) -> None:
        first = coded.offset
        for rows_RI in self._row_chunks(coded, tensor):
            rows_RI = rows_RI.to(device, self.coded_dtype)
            # The last number of a row is repeated, so that padding never widens a group's range.
            padding_RX = rows_RI[:, -1:].expand(-1, coded.padded_row_size - coded.row_size)
            values = torch.cat([rows_RI, padding_RX], dim=1).view(-1)
            codec.encode_part(values, first, run)
            first += values.numel()

    def unpack(self, slab: Tensor, workspace: Tensor | None) -> dict[str, Tensor]:
        """Every tensor as a view: into `slab` itself, or into `workspace` for what the codec had to unpack.

        Args:
            slab: uint8 `[num_bytes]`.
            workspace: `[>= num_coded_values]` of `coded_dtype` on the same device; None where nothing is coded.
        """
        self.decode_dense(slab, workspace)
        self.decode_experts(slab, workspace, range(self.num_experts))
        return self.tensors(slab, workspace)

    def decode_dense(self, slab: Tensor, workspace: Tensor | None) -> None:
        """Unpack into `workspace` what is no expert's; arguments as for `unpack`."""
        if self._coded:
            assert self.codec is not None and workspace is not None
            self.codec.decode(self._coded_run(slab), workspace[..., : self._num_dense_values])

    def decode_experts(self, slab: Tensor, workspace: Tensor | None, experts: range) -> None:
        """Unpack some neighbouring experts into `workspace`; the other arguments as for `unpack`."""
        if self.expert is not None and self.expert.num_coded_values:
            some = slice(experts.start, experts.stop)
            self.expert.decode_dense(self._experts(slab)[some], self._expert_values(workspace)[some])

    def tensors(self, slab: Tensor, workspace: Tensor | None) -> dict[str, Tensor]:
        """Every tensor as a view, experts stacked; what is coded holds its numbers once they were unpacked."""
        tensors = self._raw_tensors(slab)
        if self._coded:
            assert workspace is not None
            tensors.update((coded.spec.name, self._place(coded, workspace)) for coded in self._coded)
        if self.expert is not None:
            values_EV = self._expert_values(workspace) if self.expert.num_coded_values else None
            tensors.update(self.expert.tensors(self._experts(slab), values_EV))
        return tensors

    def expert_bytes(self, experts: range) -> slice:
        """Where some neighbouring experts lie in the slab."""
        assert self.expert is not None
        start = self.num_dense_bytes + experts.start * self.expert.num_bytes
        return slice(start, start + len(experts) * self.expert.num_bytes)

    @property
    def names(self) -> list[str]:
        """All tensors, experts' last."""
        own = [raw.spec.name for raw in self._raw] + [coded.spec.name for coded in self._coded]
        return own + (self.expert.names if self.expert is not None else [])

    @property
    def coded_names(self) -> frozenset[str]:
        """The tensors that are coded."""
        own = frozenset(coded.spec.name for coded in self._coded)
        return own | self.expert.coded_names if self.expert is not None else own

    def as_it_rests(self, slab: Tensor) -> dict[str, Tensor | Coded]:
        """Every tensor as a view into `slab` (or stacked, into several), coded matrices as they are."""
        tensors: dict[str, Tensor | Coded] = {**self._raw_tensors(slab)}
        if self._coded:
            assert self.codec is not None
            run = self._coded_run(slab)
            view = self.codec.matrix if slab.dim() == 1 else self.codec.matrices
            for coded in self._coded:
                shape = (coded.num_values // coded.padded_row_size, coded.padded_row_size)
                tensors[coded.spec.name] = view(run, coded.offset, shape)
        if self.expert is not None:
            tensors.update(self.expert.as_it_rests(self._experts(slab)))
        return tensors

    def _experts(self, slab: Tensor) -> Tensor:
        """The experts' slabs, `[E, B]`."""
        return slab[self.num_dense_bytes : self.num_bytes].view(self.num_experts, -1)

    def _expert_values(self, workspace: Tensor | None) -> Tensor:
        """The experts' unpacked numbers, `[E, V]`."""
        assert workspace is not None
        return workspace[self._num_dense_values : self.num_coded_values].view(self.num_experts, -1)

    def _raw_tensors(self, slab: Tensor) -> dict[str, Tensor]:
        return {raw.spec.name: self._raw_place(raw, slab) for raw in self._raw}

    def _coded_run(self, slab: Tensor) -> Tensor:
        return slab[..., self._num_raw_bytes : self._num_raw_bytes + self._num_coded_bytes]

    @staticmethod
    def _raw_place(raw: _Raw, slab: Tensor) -> Tensor:
        """The tensor as a view into the slab; of several slabs `[E, B]`, their tensors stacked."""
        place = slab[..., raw.offset : raw.offset + raw.num_bytes].view(raw.spec.dtype)
        return place.view(slab.shape[:-1] + raw.spec.shape)

    @staticmethod
    def _rows(coded: _Coded, values: Tensor) -> Tensor:
        """The matrix's padded rows `[..., num_rows, padded_row_size]` within the coded run (or several)."""
        rows = values[..., coded.offset : coded.offset + coded.num_values]
        return cast(Tensor, rows.unflatten(-1, (-1, coded.padded_row_size)))

    @classmethod
    def _place(cls, coded: _Coded, values: Tensor) -> Tensor:
        """The matrix, in its own shape, as a view into the coded run; of several runs, their matrices stacked."""
        rows = cls._rows(coded, values)[..., : coded.row_size]
        if not coded.spec.is_input_first:
            return cast(Tensor, rows.unflatten(-2, coded.spec.shape[:-1]))
        *lead, _, output = coded.spec.shape
        return cast(Tensor, rows.unflatten(-2, (*lead, output)).transpose(-1, -2))

    @staticmethod
    def _row_chunks(coded: _Coded, tensor: Tensor) -> Iterator[Tensor]:
        """The rows of a matrix, or of each of several, `[R, row_size]`, a bounded number at a time."""
        for matrix in tensor.flatten(0, -3) if tensor.dim() > 2 else (tensor,):
            rows = matrix.T if coded.spec.is_input_first else matrix
            yield from rows.split(max(1, _PACKED_VALUES // coded.padded_row_size))
