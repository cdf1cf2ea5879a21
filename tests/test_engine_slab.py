"""A layer's slab: tensors go in and come out as they were, aligned, apart, and without a byte too many."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from flexeval.engine.codecs.codec import Codec, IntegerCodec
from flexeval.engine.compute.spec import TensorSpec
from flexeval.engine.memory.slab import ALIGNMENT, SlabLayout
from flexeval.errors import ModelError

CPU = torch.device("cpu")
RAW = [
    TensorSpec(name="norm", shape=(5,), dtype=torch.float32),
    TensorSpec(name="flag", shape=(3,), dtype=torch.bool),
    TensorSpec(name="scalar", shape=(), dtype=torch.float16),
    TensorSpec(name="count", shape=(9,), dtype=torch.int64),
]
MATRICES = [
    TensorSpec(name="linear", shape=(6, 70), dtype=torch.bfloat16),
    TensorSpec(name="fits", shape=(3, 64), dtype=torch.bfloat16),
    TensorSpec(name="conv1d", shape=(70, 6), dtype=torch.bfloat16, is_input_first=True),
    TensorSpec(name="experts", shape=(4, 5, 33), dtype=torch.bfloat16),
    TensorSpec(name="experts_input_first", shape=(4, 33, 5), dtype=torch.bfloat16, is_input_first=True),
]
SPECS = [RAW[0], *MATRICES[:2], RAW[1], *MATRICES[2:], *RAW[2:]]


def fill(specs: list[TensorSpec]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {spec.name: (torch.randn(spec.shape, generator=generator) * 9).to(spec.dtype) for spec in specs}


def unpack(layout: SlabLayout, slab: Tensor) -> dict[str, Tensor]:
    return layout.unpack(slab, torch.full((layout.num_coded_values,), 7, dtype=layout.coded_dtype))


def padded(num_bytes: int) -> int:
    return math.ceil(num_bytes / ALIGNMENT) * ALIGNMENT


def through_codec(matrix: Tensor, spec: TensorSpec, codec: Codec) -> Tensor:
    """One matrix by itself: input dimension last, each row filled up with its last number, coded and decoded."""
    rows = matrix.transpose(-1, -2) if spec.is_input_first else matrix
    missing = -rows.shape[-1] % codec.group_size
    filled = pad(rows.flatten(0, -2).float(), (0, missing), mode="replicate").to(matrix.dtype).contiguous()
    out = torch.empty_like(filled)
    codec.decode(codec.encode(filled.view(-1)), out.view(-1))
    rows = out[:, : rows.shape[-1]].view(rows.shape)
    return rows.transpose(-1, -2) if spec.is_input_first else rows


def test_tensors_lie_aligned_and_apart() -> None:
    layout = SlabLayout(SPECS, None)
    slab = layout.pack(fill(SPECS), device=CPU)
    tensors = layout.unpack(slab, None)
    places = sorted((t.data_ptr() - slab.data_ptr(), t.numel() * t.element_size()) for t in tensors.values())
    assert all(start % ALIGNMENT == 0 for start, _ in places)
    assert all(start + num_bytes <= following for (start, num_bytes), (following, _) in pairwise(places))
    assert slab.shape == (layout.num_bytes,)
    assert layout.num_bytes == sum(padded(num_bytes) for _, num_bytes in places)


def test_without_a_codec_everything_comes_back_bit_for_bit() -> None:
    layout, tensors = SlabLayout(SPECS, None), fill(SPECS)
    unpacked = layout.unpack(layout.pack(tensors, device=CPU), None)
    assert list(unpacked) == [spec.name for spec in SPECS]
    for spec in SPECS:
        assert unpacked[spec.name].dtype == spec.dtype
        assert torch.equal(unpacked[spec.name], tensors[spec.name]), spec


def test_a_checkpoint_of_another_type_is_cast() -> None:
    spec = TensorSpec(name="linear", shape=(4, 8), dtype=torch.bfloat16)
    matrix = torch.randn(8, 4).T  # not contiguous either
    for codec in (None, IntegerCodec(4, 32)):
        layout = SlabLayout([spec], codec)
        unpacked = unpack(layout, layout.pack({"linear": matrix}, device=CPU))["linear"]
        expected = matrix.bfloat16() if codec is None else through_codec(matrix.bfloat16(), spec, codec)
        assert torch.equal(unpacked, expected)


@pytest.mark.parametrize("group_size", [32, 64])
def test_with_a_codec_matrices_are_coded_along_their_input_and_the_rest_is_not(group_size: int) -> None:
    codec = IntegerCodec(4, group_size)
    layout, tensors = SlabLayout(SPECS, codec), fill(SPECS)
    slab = layout.pack(tensors, device=CPU)
    unpacked = unpack(layout, slab)
    for spec in RAW:
        assert torch.equal(unpacked[spec.name], tensors[spec.name]), spec
    for spec in MATRICES:
        assert unpacked[spec.name].shape == spec.shape
        assert torch.equal(unpacked[spec.name], through_codec(tensors[spec.name], spec, codec)), spec
    num_values = sum(
        math.prod(spec.shape) // size * math.ceil(size / group_size) * group_size
        for spec in MATRICES
        for size in [spec.shape[-2 if spec.is_input_first else -1]]
    )
    assert layout.num_coded_values == num_values
    raw_bytes = sum(padded(tensors[spec.name].numel() * spec.dtype.itemsize) for spec in RAW)
    assert slab.numel() == layout.num_bytes == padded(raw_bytes + codec.num_bytes(num_values))


@settings(max_examples=60, deadline=None)
@given(row_size=st.integers(1, 200), num_rows=st.integers(1, 5), is_input_first=st.booleans())
def test_padding_never_widens_the_range_of_a_group(row_size: int, num_rows: int, is_input_first: bool) -> None:
    """Numbers between 1000 and 1008 next to padding of 0 would come back with steps of 67."""
    shape = (row_size, num_rows) if is_input_first else (num_rows, row_size)
    spec = TensorSpec(name="w", shape=shape, dtype=torch.float32, is_input_first=is_input_first)
    matrix = 1000 + 8 * torch.rand(shape, generator=torch.Generator().manual_seed(row_size))
    layout = SlabLayout([spec], IntegerCodec(4, 64))
    unpacked = unpack(layout, layout.pack({"w": matrix}, device=CPU))["w"]
    assert (unpacked - matrix).abs().max() <= 8.5 / 15 / 2 + 0.01


def test_what_is_unpacked_are_views() -> None:
    layout = SlabLayout(SPECS, IntegerCodec(4, 32))
    slab = layout.pack(fill(SPECS), device=CPU)
    workspace = torch.full((layout.num_coded_values + 100,), 7, dtype=layout.coded_dtype)
    tensors = layout.unpack(slab, workspace)
    assert workspace[layout.num_coded_values :].eq(7).all(), "no more than its own part of the workspace is written"
    for name, tensor in tensors.items():
        owner = slab if name in {spec.name for spec in RAW} else workspace
        assert tensor.untyped_storage().data_ptr() == owner.untyped_storage().data_ptr(), name


@pytest.mark.parametrize("name", [spec.name for spec in MATRICES])
def test_a_matrix_that_cannot_be_coded_is_named(name: str) -> None:
    tensors = fill(SPECS)
    tensors[name].view(-1)[7] = torch.nan
    with pytest.raises(ModelError, match=rf"NaN.*\({name}\).*none"):
        SlabLayout(SPECS, IntegerCodec(4, 32)).pack(tensors, device=CPU)
