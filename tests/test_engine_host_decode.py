"""The compiled attention of the CPU: what a compiler makes of it here, and what happens where there is none."""

from __future__ import annotations

import gc
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from flexeval.engine.codecs.kv_format import CodedFormat, KVCoding, KVLog, KVShape, PlainFormat, make_format
from flexeval.engine.compute import host_team
from flexeval.engine.compute.host_decode import DecodeKernel, Parts
from flexeval.engine.compute.host_team import build
from flexeval.engine.compute.partial import Partial
from flexeval.engine.cpu_rates import cpu_attention_rate
from flexeval.engine.memory.host_rate import host_attention_rate


# v3: vectors of 256 bits, as of processors without AVX-512
@pytest.fixture(params=[("native", False), ("native", True), ("x86-64-v3", False)], ids=["own", "borrowed", "v3"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DecodeKernel:
    processor, borrows = request.param
    if processor != "native":
        flags = tuple(flag.replace("native", processor) for flag in host_team._FLAGS)
        monkeypatch.setattr(host_team, "_FLAGS", flags)
        monkeypatch.setattr(host_team, "library", host_team.library.__wrapped__)
    made = build(3, borrows=borrows)
    assert made is not None, "the tests' machine has a compiler"
    return DecodeKernel(made)


def attend(kernel: DecodeKernel, *work: Any, **how: Any) -> Partial:
    """What comes out of it."""
    partial, job = kernel.begin(*work, **how)
    job.wait()
    return partial


def parts_of(lengths: list[int], num_tokens: int) -> Parts:
    """Parts at random places of one log, each asked for by a token of its own."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    places = torch.cat([torch.randperm(num_tokens)[:length].sort().values for length in lengths]).int()
    return Parts([0] * len(lengths), torch.arange(len(lengths)), bounds, places, [int(places.max()) + 1])


FORMATS = {
    "float32": (torch.float32, None),
    "float16": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
    "kv8": (torch.float32, KVCoding(8, 64)),
    "kv4": (torch.float32, KVCoding(4, 64)),
    "kv4-g32": (torch.float16, KVCoding(4, 32)),
    "kv4-g128": (torch.bfloat16, KVCoding(4, 128)),
    "kv2": (torch.float32, KVCoding(2, 64)),
}


@pytest.mark.parametrize(("key_size", "value_size"), [(64, 64), (80, 80), (576, 512), (16, 128)])
@pytest.mark.parametrize("heads_per_kv", [1, 3, 8])
@pytest.mark.parametrize("name", FORMATS)
def test_it_equals_float64(kernel: DecodeKernel, name: str, heads_per_kv: int, key_size: int, value_size: int) -> None:
    torch.manual_seed(0)
    lengths, num_kv_heads, num_tokens = [1, 2, 15, 16, 17, 100], 5, 120
    dtype, coding = FORMATS[name]
    form = make_format(KVShape(num_kv_heads, key_size, value_size), dtype, coding)
    keys_CKH = (3 * torch.randn(num_tokens, num_kv_heads, key_size)).to(dtype)
    values_CKW = torch.randn(num_tokens, num_kv_heads, value_size).to(dtype)
    log = KVLog(form, torch.empty(num_tokens, form.token_bytes, dtype=torch.uint8))
    form.write(keys_CKH, values_CKW, log.data_CB)
    if coding is not None:
        if form.codec.code_bytes % 16:
            assert not kernel.takes(log), "codes of a group fill no vectors"
            return
        # Codes come back in float32, whatever the type of what was coded.
        keys_CKH, values_CKW = CodedFormat(form.shape, torch.float32, coding).read(log.data_CB, slice(None))
    q_TKMH = torch.randn(len(lengths), num_kv_heads, heads_per_kv, key_size).to(dtype)
    parts = parts_of(lengths, num_tokens)
    assert kernel.takes(log)
    out_PKMW, lse_PKM = attend(kernel, q_TKMH, [log], parts, scale=0.3, softcap=None)
    for part, places in enumerate(parts.places.split(lengths)):
        scores_KMS = 0.3 * torch.einsum("kmh,skh->kms", q_TKMH[part].double(), keys_CKH[places].double())
        expected_KMW = torch.einsum("kms,skw->kmw", scores_KMS.softmax(-1), values_CKW[places].double())
        torch.testing.assert_close(out_PKMW[part].double(), expected_KMW, atol=3e-5, rtol=0)
        torch.testing.assert_close(lse_PKM[part].double(), scores_KMS.logsumexp(-1), atol=1e-5, rtol=1e-6)


def log_of(num_tokens: int, num_kv_heads: int, size: int, dtype: torch.dtype) -> KVLog:
    """Random keys and values."""
    form = PlainFormat(KVShape(num_kv_heads, size, size), dtype)
    log = KVLog(form, torch.empty(num_tokens, form.token_bytes, dtype=torch.uint8))
    keys, values = (torch.randn(num_tokens, num_kv_heads, size).to(dtype) for _ in range(2))
    form.write(keys, values, log.data_CB)
    return log


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_rounds_as_torch_does(kernel: DecodeKernel, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    log, parts = log_of(300, 3, 64, torch.float16), parts_of([1, 300, 17, 40], 300)
    log.format.views(log.data_CB)[1][7, 1, 5] = torch.nan
    log.format.views(log.data_CB)[1][8, 2, 6] = torch.inf
    q_TKMH = 3 * torch.randn(4, 3, 2, 64)
    expected = attend(kernel, q_TKMH, [log], parts, scale=0.3, softcap=None)
    rounded_PKMW = torch.empty(4, 3, 2, 64, dtype=dtype)
    partial, job = kernel.begin(q_TKMH, [log], parts, scale=0.3, softcap=None, rounded_PKMW=rounded_PKMW)
    assert job.wait() > 0 and job.wait() == job.wait()
    assert expected.out_BNQW.isnan().any() and expected.out_BNQW.isinf().any()
    torch.testing.assert_close(rounded_PKMW, expected.out_BNQW.to(dtype), atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(partial.lse_BNQ, expected.lse_BNQ, atol=0, rtol=0)


def test_jobs_are_done_in_turn_whoever_waits(kernel: DecodeKernel) -> None:
    """Many of different sizes at once, waited for from the last to the first, or not at all."""
    torch.manual_seed(0)
    logs = [log_of(200, 2, 32, torch.float32) for _ in range(60)]
    works = [(torch.randn(3, 2, 1, 32), [log], parts_of([1 + index, 9, 100], 200)) for index, log in enumerate(logs)]
    expected = [attend(kernel, *work, scale=0.3, softcap=None) for work in works]
    for _ in range(20):
        begun = [kernel.begin(*work, scale=0.3, softcap=None) for work in works]
        del begun[30]
        for (partial, job), one in reversed(list(zip(begun, expected[:30] + expected[31:], strict=True))):
            job.wait()
            torch.testing.assert_close(partial.out_BNQW, one.out_BNQW, atol=0, rtol=0)
    out_PKMW = torch.zeros(3, 2, 1, 32)
    _, job = kernel.begin(*works[0], scale=0.3, softcap=None, rounded_PKMW=out_PKMW)
    kernel.team.drain()
    torch.testing.assert_close(out_PKMW, expected[0].out_BNQW, atol=0, rtol=0)
    assert job.wait() > 0


@pytest.mark.parametrize("coding", [None, KVCoding(4, 64)], ids=["plain", "kv4"])
def test_what_is_no_number_is_not_hidden(kernel: DecodeKernel, coding: KVCoding | None) -> None:
    form = make_format(KVShape(1, 64, 64), torch.float32, coding)
    log = KVLog(form, torch.empty(20, form.token_bytes, dtype=torch.uint8))
    keys_CKH = torch.randn(20, 1, 64)
    keys_CKH[7, 0, 3] = torch.nan
    form.write(keys_CKH, torch.randn(20, 1, 64), log.data_CB)
    out_PKMW, _ = attend(kernel, torch.randn(1, 1, 1, 64), [log], parts_of([20], 20), scale=1.0, softcap=None)
    assert out_PKMW.isnan().all()


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_without_a_difference_and_queries_of_nothing(kernel: DecodeKernel, bits: int) -> None:
    """Groups whose numbers are all the same have a scale of 0, and a query of zeros has no largest number."""
    torch.manual_seed(0)
    form = make_format(KVShape(13, 64, 128), torch.float32, KVCoding(bits, 64))
    log = KVLog(form, torch.empty(40, form.token_bytes, dtype=torch.uint8))
    keys_CKH, values_CKW = torch.randn(40, 13, 64), torch.randn(40, 13, 128)
    keys_CKH[:, 3], values_CKW[:, 5, 64:], values_CKW[:, 7] = 0.5, -2.0, 0.0
    form.write(keys_CKH, values_CKW, log.data_CB)
    keys_CKH, values_CKW = CodedFormat(form.shape, torch.float32, KVCoding(bits, 64)).read(log.data_CB, slice(None))
    q_TKMH = torch.randn(2, 13, 1, 64)
    q_TKMH[0, 2] = 0
    q_TKMH[1, 9, 0, 11] = torch.nan
    parts = parts_of([40, 40], 40)
    out_PKMW, lse_PKM = attend(kernel, q_TKMH, [log], parts, scale=1.0, softcap=None)
    scores_TKMS = torch.einsum("tkmh,skh->tkms", q_TKMH.double(), keys_CKH.double())
    expected_TKMW = torch.einsum("tkms,skw->tkmw", scores_TKMS.softmax(-1), values_CKW.double())
    torch.testing.assert_close(out_PKMW.double(), expected_TKMW, atol=1e-5, rtol=0, equal_nan=True)
    assert out_PKMW[1, 9].isnan().all() and out_PKMW.isnan().sum() == 128
    torch.testing.assert_close(lse_PKM[0].double(), scores_TKMS[0].logsumexp(-1), atol=1e-5, rtol=0)


def test_it_refuses_what_it_cannot_read(kernel: DecodeKernel) -> None:
    def log(key_size: int, dtype: torch.dtype, coding: KVCoding | None = None) -> KVLog:
        form = make_format(KVShape(2, key_size, 64), dtype, coding)
        return KVLog(form, torch.zeros(4, form.token_bytes, dtype=torch.uint8))

    assert kernel.takes(log(64, torch.float16))
    assert not kernel.takes(log(72, torch.float16))
    assert not kernel.takes(log(64, torch.float64))
    assert kernel.takes(log(64, torch.float16, KVCoding(4, 64)))
    assert not kernel.takes(log(64, torch.float16, KVCoding(4, 16)))


def test_places_behind_a_log_are_not_read(kernel: DecodeKernel) -> None:
    form = PlainFormat(KVShape(1, 16, 16), torch.float32)
    log = KVLog(form, torch.zeros(4, form.token_bytes, dtype=torch.uint8))
    with pytest.raises(AssertionError):
        attend(kernel, torch.zeros(1, 1, 1, 16), [log], parts_of([5], 5), scale=1.0, softcap=None)


def test_threads_end_with_the_kernel() -> None:
    def num_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    gc.collect()  # kernels of other tests
    before = num_threads()
    made = build(6)
    assert num_threads() == before + 6
    del made
    gc.collect()
    assert num_threads() == before


def test_threads_that_are_borrowed_are_torchs() -> None:
    """None of our own, where torch has an OpenMP runtime that is asked as GCC's is: its builds for Linux have."""
    assert host_team._lent() is not None
    torch.ones(1 << 20).sum()
    gc.collect()
    before = len(list(Path("/proc/self/task").iterdir()))
    made = build(torch.get_num_threads(), borrows=True)
    assert made is not None and len(list(Path("/proc/self/task").iterdir())) == before


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_team, "library", host_team.library.__wrapped__)
    for compiler in (str(tmp_path / "missing"), "false"):
        monkeypatch.setenv("FLEXEVAL_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("CC", compiler)
        assert build(2) is None
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the compiler makes no code for these processors")
@pytest.mark.parametrize("processor", ["haswell", "skylake-avx512", "cooperlake", "sapphirerapids"])
@pytest.mark.parametrize("source", host_team.SOURCES)
def test_it_compiles_for_other_processors(source: str, processor: str) -> None:
    """With vectors half as long, without products of pairs, without a matrix unit, with it."""
    compiler = shutil.which("gcc") or pytest.skip("no compiler")
    command = [compiler, f"-march={processor}", "-fsyntax-only", "-Werror", "-w", str(host_team.FOLDER / source)]
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("coding", [None, KVCoding(4, 64)], ids=["plain", "kv4"])
def test_the_rate_is_measured(coding: KVCoding | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexeval.engine.memory.host_rate.LOG_BYTES", 64 * 2**20)
    shape = KVShape(4, 64, 64)
    form = make_format(shape, torch.float32, coding)
    rate = host_attention_rate(form, 8, is_link_busy=False)
    assert 1e8 < rate.bytes_per_s < 1e12 and rate.link_share == 1
    tokens_per_s = cpu_attention_rate(shape, torch.float32, coding, 8)
    assert tokens_per_s is not None
    assert 1e8 < tokens_per_s * form.token_bytes < 1e12


def test_there_is_no_rate_of_what_it_cannot_read() -> None:
    assert cpu_attention_rate(KVShape(2, 8, 8), torch.float32, None, 8) is None


@pytest.mark.gpu
def test_the_rate_is_measured_beside_a_busy_link() -> None:
    form = PlainFormat(KVShape(8, 128, 128), torch.float16)
    rate = host_attention_rate(form, 8, is_link_busy=True)
    assert 1e8 < rate.bytes_per_s < 1e12 and 0.1 < rate.link_share <= 1
