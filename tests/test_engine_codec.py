"""Every codec keeps its word: exact sizes, bounded errors, the same numbers in every type, nothing made infinite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexeval.engine.codecs import codec as codec_module
from flexeval.engine.codecs import hqq
from flexeval.engine.codecs.codec import Codec, IntegerCodec
from flexeval.engine.codecs.hqq import HqqCodec
from flexeval.engine.compute import host_team
from flexeval.errors import ModelError

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (IntegerCodec(4, 32), IntegerCodec(4, 64), IntegerCodec(4, 128), IntegerCodec(8, 64), HqqCodec(4, 64))
}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
REFINED = [HqqCodec(4, 64), HqqCodec(4, 32), HqqCodec(8, 128)]
every_refined = pytest.mark.parametrize("codec", REFINED, ids=lambda c: c.name)
inputs = given(
    seed=st.integers(0, 2**32 - 1),
    offset=st.floats(-3e4, 3e4) | st.sampled_from([0.0, -0.0, 2.0**-24, 3e-8, 1e-40]),
    log2_spread=st.floats(-149, 13) | st.none(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)


def decode(codec: IntegerCodec, coded: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full((coded.numel() * codec.group_size // codec.num_bytes(codec.group_size),), torch.nan, dtype=dtype)
    codec.decode(coded, out)
    return out


def float16_rounding(value: np.ndarray) -> np.ndarray:
    """The most that rounding to float16 moves a number: half a unit in the last of its 11 bits."""
    exponent = np.floor(np.log2(np.maximum(np.abs(value), 2.0**-14)))
    return 2.0 ** (exponent - 11)


def error_bound(groups: np.ndarray, bits: int) -> np.ndarray:
    """Half a step; or, at either end of the range, what float16 takes from the minimum and from all steps."""
    top = 2**bits - 1
    low, high = groups.min(1), groups.max(1)
    step = (high - low + float16_rounding(low)) / top
    at_ends = np.maximum(float16_rounding(low), top * float16_rounding(step))
    in_float32 = 2.0**-22 * np.abs(groups).max(1)
    return np.maximum((step + float16_rounding(step)) / 2, at_ends) + in_float32


@every_codec
@pytest.mark.parametrize("num_groups", [1, 3, 10])
def test_stored_bytes_are_exact(codec: IntegerCodec, num_groups: int) -> None:
    num_values = num_groups * codec.group_size
    coded = codec.encode(torch.randn(num_values))
    assert (coded.dtype, coded.shape) == (torch.uint8, (codec.num_bytes(num_values),))
    assert codec.num_bytes(num_values) == num_values * codec.bits // 8 + num_groups * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [4, 20, 64, 200])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compiled_code_unpacks_to_the_bit_as_torch_does(
    bits: int, group_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several runs that lie apart, and of some rows of a matrix; groups that no vector divides, and huge numbers."""
    if host_team.library() is None:
        pytest.skip("there is no C compiler")
    group_size *= 2 if group_size * bits % 16 else 1
    codec = IntegerCodec(bits, group_size)
    num_values, scales = 300 * group_size, torch.tensor([1e-6, 1.0, 5e3])
    coded_RB = torch.stack([codec.encode(scale * torch.randn(num_values)) for scale in scales])
    apart_RB = torch.cat([coded_RB, torch.zeros(3, 32, dtype=torch.uint8)], dim=1)[:, :-32]
    which = torch.tensor([299, 0, 7, 7])

    def unpacked() -> list[Tensor]:
        runs_RV = torch.full((3, num_values + 8), torch.nan, dtype=dtype)
        codec.decode(apart_RB, runs_RV[:, :num_values])
        rows_RV = torch.full((len(which), group_size), torch.nan, dtype=dtype)
        codec.decode_rows(coded_RB[1], 300, which, rows_RV)
        return [runs_RV, rows_RV]

    ours = unpacked()
    monkeypatch.setattr(codec_module.host_unpack, "unpack", lambda *_, **__: False)
    for our, torchs in zip(ours, unpacked(), strict=True):
        assert torch.equal(our.view(torch.uint8), torchs.view(torch.uint8))
    assert ours[0][:, :num_values].isfinite().all() and ours[0][:, num_values:].isnan().all()


def noise(codec: IntegerCodec, seed: int, offset: float, log2_spread: float | None, dtype: torch.dtype) -> Tensor:
    """Five groups."""
    unit = np.random.default_rng(seed).uniform(-1, 1, 5 * codec.group_size)
    return torch.tensor(offset + (0.0 if log2_spread is None else 2.0**log2_spread) * unit).to(dtype)


def errors(codec: IntegerCodec, values: Tensor) -> np.ndarray:
    """Of each number, by group."""
    error = decode(codec, codec.encode(values)).double() - values.double()
    return error.abs().view(-1, codec.group_size).numpy()


@pytest.mark.parametrize(
    "codec", [codec for codec in CODECS.values() if type(codec) is IntegerCodec], ids=lambda c: c.name
)
@settings(max_examples=150, deadline=None)
@inputs
def test_decoded_numbers_are_close(
    codec: IntegerCodec, seed: int, offset: float, log2_spread: float | None, dtype: torch.dtype
) -> None:
    values = noise(codec, seed, offset, log2_spread, dtype)
    groups = values.double().view(-1, codec.group_size).numpy()
    assert (errors(codec, values).max(1) <= error_bound(groups, codec.bits)).all()


@every_refined
@settings(max_examples=150, deadline=None)
@inputs
def test_refined_minima_are_never_worse_in_any_group(
    codec: HqqCodec, seed: int, offset: float, log2_spread: float | None, dtype: torch.dtype
) -> None:
    """Under the norm that is made small, but for float32's rounding of what is decoded."""
    values = noise(codec, seed, offset, log2_spread, dtype)
    plain = IntegerCodec(codec.bits, codec.group_size)
    refined_norm, plain_norm = ((errors(one, values) ** 0.75).sum(1) for one in (codec, plain))
    rounding = codec.group_size * (2.0**-22 * values.abs().max().item()) ** 0.75
    assert (refined_norm <= plain_norm * 1.00001 + rounding).all()
    assert codec.num_bytes(len(values)) == plain.num_bytes(len(values))
    assert torch.equal(codec.split(codec.encode(values))[1][:, 0], plain.split(plain.encode(values))[1][:, 0])


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_refined_minima_of_4_bits_are_better_by_any_measure(group_size: int) -> None:
    codec = HqqCodec(4, group_size)
    values = torch.randn(500 * codec.group_size, generator=torch.Generator().manual_seed(0))
    refined, plain = errors(codec, values), errors(IntegerCodec(codec.bits, codec.group_size), values)
    for power in (0.75, 1.0, 2.0):
        assert (refined**power).mean() < 0.99 * (plain**power).mean()


@every_refined
def test_a_group_is_refined_without_a_look_at_others(codec: HqqCodec) -> None:
    values = torch.randn(9 * codec.group_size)
    codes, affine = codec.split(codec.encode(values))
    for group, own in enumerate(values.view(9, -1)):
        own_codes, own_affine = codec.split(codec.encode(own))
        assert torch.equal(own_codes[0], codes[group]) and torch.equal(own_affine[0], affine[group])


@every_codec
def test_numbers_that_are_a_whole_number_of_steps_apart_come_back_as_they_were(codec: IntegerCodec) -> None:
    top = 2**codec.bits - 1
    codes = torch.randint(0, top + 1, (7, codec.group_size), generator=torch.Generator().manual_seed(0))
    codes[:, 0], codes[:, -1] = 0, top
    values = (codes * 0.25 - 2.5).flatten()
    assert torch.equal(decode(codec, codec.encode(values)), values)


@every_codec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_are_float32_rounded_once(codec: IntegerCodec, dtype: torch.dtype) -> None:
    coded = codec.encode(torch.randn(9 * codec.group_size))
    assert torch.equal(decode(codec, coded, dtype), decode(codec, coded).to(dtype))


@every_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_in_chunks_changes_nothing(
    codec: IntegerCodec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded = codec.encode(torch.randn(10 * codec.group_size))
    whole = decode(codec, coded, dtype)
    monkeypatch.setattr(codec_module, "_CHUNK_VALUES", 3 * codec.group_size + 1)
    assert torch.equal(decode(codec, coded, dtype), whole)


@every_codec
@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([torch.inf], torch.float32),
        ([-torch.inf], torch.bfloat16),
        ([torch.nan], torch.float16),
        ([1e5, 1e5], torch.float32),  # the minimum is beyond float16
        ([-1e5, 0], torch.bfloat16),
        ([0, 3e38], torch.float32),  # the step is
        ([-65504, 65504], torch.float16),  # the steps, rounded up, end beyond the type that is decoded to
    ],
)
def test_what_cannot_be_decoded_to_finite_numbers_is_refused(
    codec: IntegerCodec, values: list[float], dtype: torch.dtype
) -> None:
    run = torch.full((3 * codec.group_size,), values[-1], dtype=dtype)
    run[codec.group_size : codec.group_size + len(values)] = torch.tensor(values, dtype=dtype)
    with pytest.raises(ModelError, match="cannot be quantized"):
        codec.encode(run)


@every_codec
def test_numbers_beyond_float16_in_a_range_that_fits_survive(codec: IntegerCodec) -> None:
    values = torch.linspace(0, 2**18, codec.group_size)
    half_step = 2**18 / (2**codec.bits - 1) / 2
    assert (decode(codec, codec.encode(values)) - values).abs().max() <= half_step * (1.001 if codec.bits < 8 else 1.1)


def test_roots_are_rounded_to_the_nearest() -> None:
    """Else groups would be coded in other ways on other devices, under one name."""
    numbers = torch.rand(2**18, generator=torch.Generator().manual_seed(0)) ** 3
    nearest = np.sqrt(numbers.numpy().astype(np.float64)).astype(np.float32)
    assert np.array_equal(hqq._root(numbers).numpy(), nearest)
    assert torch.equal(hqq._root(torch.tensor([0.0, 2.0**-140, 4.0])), torch.tensor([0.0, 2.0**-70, 2.0]))
