"""Keys and values at rest: exact bytes, groups that fit the heads, what comes back; the kernels against the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexeval.engine.codecs.kv_format import CodedFormat, KVCoding, KVLog, KVShape, PlainFormat, make_format
from flexeval.engine.compute.partial import reference_attention
from flexeval.errors import UnsupportedModelError

SHAPES = [KVShape(3, 64, 64), KVShape(2, 128, 128), KVShape(2, 80, 80), KVShape(1, 96, 48), KVShape(3, 24, 8)]
CODINGS = [None, KVCoding(8, 64), KVCoding(4, 64), KVCoding(4, 32), KVCoding(2, 128)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_coding = pytest.mark.parametrize("coding", CODINGS, ids=str)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def numbers(shape: KVShape, num_tokens: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Keys and values, as layers hand them over: heads before tokens in memory."""
    generator = torch.Generator().manual_seed(num_tokens)
    keys_KTH = torch.randn(shape.num_heads, num_tokens, shape.key_size, generator=generator) * 2
    values_KTW = torch.randn(shape.num_heads, num_tokens, shape.value_size, generator=generator) + 1
    return tuple(part.to(dtype).to(device).transpose(0, 1) for part in (keys_KTH, values_KTW))  # type: ignore


def written(shape: KVShape, coding: KVCoding | None, dtype: torch.dtype, device: str = "cpu") -> tuple[KVLog, Tensor]:
    """A log of 45 tokens within a larger one, and its numbers `[C, K, X]`."""
    form = make_format(shape, dtype, coding)
    keys, values = numbers(shape, 45, dtype, device)
    data_CB = torch.zeros(49, form.token_bytes, dtype=torch.uint8, device=device)[2:47]
    form.write(keys, values, data_CB)
    return KVLog(form, data_CB), torch.cat([keys, values], dim=-1)


@every_shape
@every_coding
@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_read_is_what_was_written_to_half_a_step(
    shape: KVShape, coding: KVCoding | None, dtype: torch.dtype, device: str
) -> None:
    log, given = written(shape, coding, dtype, device)
    back = torch.cat(log.at(slice(None)), dim=-1)
    assert (back.dtype, back.shape, log.format.is_lossy) == (dtype, given.shape, coding is not None)
    if coding is None:
        assert torch.equal(back, given)
        return
    assert isinstance(log.format, CodedFormat)
    groups = given.float().reshape(-1, log.format.codec.group_size)
    half_step = (groups.amax(1) - groups.amin(1)) / (2**coding.bits - 1) / 2
    error = (back.float().reshape(groups.shape) - groups).abs().amax(1)
    rounding = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype] * groups.abs().amax(1)
    in_float16 = 2**-10 * groups.abs().amax(1)
    assert (error <= half_step + rounding + in_float16).all()
    assert error.max() > 0


@every_shape
@every_coding
@devices
def test_any_tokens_can_be_read(shape: KVShape, coding: KVCoding | None, device: str) -> None:
    log, _ = written(shape, coding, torch.float32, device)
    keys, values = log.at(slice(None))
    index = torch.tensor([[7, 3, 3], [0, 44, 1]], device=device)
    for places in (slice(4, 40, 3), index):
        some_keys, some_values = log.at(places)
        assert torch.equal(some_keys, keys[places]) and torch.equal(some_values, values[places])


@pytest.mark.parametrize(
    ("shape", "coding", "group_size"),
    [
        (KVShape(1, 128, 128), KVCoding(4, 64), 64),
        (KVShape(1, 128, 128), KVCoding(4, 128), 128),
        (KVShape(1, 64, 64), KVCoding(4, 128), 64),
        (KVShape(1, 80, 80), KVCoding(4, 64), 40),
        (KVShape(1, 96, 96), KVCoding(2, 64), 48),
        (KVShape(1, 192, 128), KVCoding(4, 64), 64),
        (KVShape(1, 24, 16), KVCoding(4, 64), 8),
    ],
)
def test_groups_cut_keys_and_values_without_a_rest(shape: KVShape, coding: KVCoding, group_size: int) -> None:
    form = CodedFormat(shape, torch.float16, coding)
    assert form.codec.group_size == group_size
    assert form.token_bytes == shape.num_values * coding.bits // 8 + shape.num_values // group_size * 4


def test_heads_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"keys of 16 and values of 9 .* 4 bits.*without kv"):
        CodedFormat(KVShape(2, 16, 9), torch.float16, KVCoding(4, 64))


@every_coding
@devices
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_comes_back_as_none(coding: KVCoding | None, wrong: float, device: str) -> None:
    """So it reaches the log-probabilities, which are refused then."""
    shape = KVShape(2, 16, 16)
    form = make_format(shape, torch.float32, coding)
    keys, values = numbers(shape, 3, torch.float32, device)
    keys[1, 0, 5] = wrong
    data_CB = torch.zeros(3, form.token_bytes, dtype=torch.uint8, device=device)
    form.write(keys, values, data_CB)
    back, others = form.read(data_CB, slice(None))
    assert not back[1, 0].isfinite().all()
    back[1, 0] = 0
    assert back.isfinite().all() and others.isfinite().all()


@pytest.mark.gpu
@every_shape
@pytest.mark.parametrize("coding", CODINGS[1:], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_writes_the_same_bytes(shape: KVShape, coding: KVCoding, dtype: torch.dtype) -> None:
    on_cpu, on_gpu = (written(shape, coding, dtype, device)[0] for device in ("cpu", "cuda"))
    assert torch.equal(on_gpu.data_CB.cpu(), on_cpu.data_CB)


@pytest.mark.gpu
@every_shape
@every_coding
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 9])
def test_decode_attention_reads_tokens_as_they_lie(
    shape: KVShape, coding: KVCoding | None, dtype: torch.dtype, window: int | None
) -> None:
    from flexeval.engine.compute.decode import decode_attention

    log, _ = written(shape, coding, dtype, "cuda")
    q_BNH = torch.randn(3, 2 * shape.num_heads, shape.key_size, device="cuda").to(dtype)
    index_BS = torch.stack([torch.randperm(45, device="cuda")[:40] for _ in range(3)]).int()
    lengths = (40, 17, 1)
    out_BNW = q_BNH.new_empty(*q_BNH.shape[:2], shape.value_size)
    lse_BN = torch.empty(q_BNH.shape[:2], device="cuda")
    lengths_B = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    decode_attention(q_BNH, log, index_BS, lengths_B, out_BNW, lse_BN, max_length=40, scale=0.2, window=window)
    for sequence, length in enumerate(lengths):
        places = index_BS[sequence, max(0, length - (window or length)) : length].long()
        keys, values = (part.transpose(0, 1)[None].double() for part in log.at(places))
        want = reference_attention(q_BNH[sequence][None, :, None].double(), keys, values, scale=0.2)
        tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
        got = out_BNW[sequence].double()
        assert (got - want.out_BNQW[0, :, 0]).norm() < tolerance * want.out_BNQW.norm()
        torch.testing.assert_close(lse_BN[sequence], want.lse_BNQ[0, :, 0].float(), atol=1e-2, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("coding", CODINGS[1:], ids=str)
def test_large_logs_give_the_same_every_time(coding: KVCoding) -> None:
    """Large enough that every multiprocessor is at work: races show here."""
    from flexeval.engine.compute.decode import decode_attention

    shape = KVShape(56, 128, 128)
    form = CodedFormat(shape, torch.float16, coding)
    generator = torch.Generator("cuda").manual_seed(0)
    keys, values, q_BNH = (
        torch.randn(n, 56, 128, generator=generator, device="cuda", dtype=torch.float16) for n in (8192, 8192, 16)
    )
    data_CB = torch.empty(8192, form.token_bytes, dtype=torch.uint8, device="cuda")
    form.write(keys, values, data_CB)
    index_BS = torch.arange(8192, device="cuda", dtype=torch.int32).view(16, 512)
    lengths_B = torch.full((16,), 512, dtype=torch.int32, device="cuda")
    outs = []
    for _ in range(20):
        out_BNW, lse_BN = torch.empty_like(q_BNH), torch.empty(16, 56, device="cuda")
        log = KVLog(form, data_CB)
        decode_attention(q_BNH, log, index_BS, lengths_B, out_BNW, lse_BN, max_length=512, scale=0.1)
        again = torch.empty_like(data_CB)
        form.write(keys, values, again)
        assert torch.equal(again, data_CB)
        outs.append(out_BNW)
    assert all(torch.equal(out, outs[0]) for out in outs)
    own = form.read(data_CB, index_BS[5].long())
    plain = PlainFormat(shape, torch.float16)
    plain_CB = torch.empty(512, plain.token_bytes, dtype=torch.uint8, device="cuda")
    plain.write(*own, plain_CB)
    out_BNW, lse_BN = torch.empty_like(q_BNH[:1]), torch.empty(1, 56, device="cuda")
    decode_attention(
        q_BNH[5:6], KVLog(plain, plain_CB), index_BS[:1], lengths_B[:1], out_BNW, lse_BN, max_length=512, scale=0.1
    )
    assert (outs[0][5:6].float() - out_BNW.float()).norm() < 2e-3 * out_BNW.float().norm()
