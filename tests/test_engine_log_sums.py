"""What our code reads off logits in one pass, against float64 and torch."""

from __future__ import annotations

import pytest
import torch

from flexeval.engine.compute.log_sums import log_sums
from flexeval.engine.cpu_rates import cpu_softmax_rate

TYPES = [torch.float16, torch.bfloat16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("vocab_size", [1, 15, 16, 63, 64, 65, 129, 5000, 70001])
def test_it_equals_float64(dtype: torch.dtype, vocab_size: int, device: str) -> None:
    torch.manual_seed(vocab_size)
    for scale in (0.01, 1.0, 100.0):
        # a part of longer rows, as of a head that is padded
        logits_RV = (scale * torch.randn(7, vocab_size + 3, device=device)).to(dtype)[:, :vocab_size]
        sums = log_sums(logits_RV)
        assert sums is not None
        torch.testing.assert_close(sums.lse_R.double(), logits_RV.double().logsumexp(-1), atol=5e-6, rtol=3e-7)
        assert sums.best_R.tolist() == logits_RV.cpu().argmax(-1).tolist()  # which is the first


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
def test_of_equal_ones_the_first_is_best(dtype: torch.dtype, device: str) -> None:
    logits_RV = torch.zeros(5, 9000, dtype=dtype, device=device)
    for row, places in enumerate([(5, 299), (64, 65), (298, 299), (0, 17), (4100, 5, 8196)]):
        logits_RV[row, list(places)] = 2.5
    sums = log_sums(logits_RV)
    assert sums is not None and sums.best_R.tolist() == [5, 64, 298, 0, 5]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_no_number_is_not_hidden(broken: float, device: str) -> None:
    logits_RV = torch.randn(3, 200, device=device).bfloat16()
    logits_RV[1, 130] = broken
    sums = log_sums(logits_RV)
    assert sums is not None and sums.lse_R.isfinite().tolist() == [True, False, True]
    assert 0 <= int(sums.best_R[1]) < 200


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("broken", [torch.nan, -torch.inf])
def test_nor_are_rows_without_any(broken: float, device: str) -> None:
    sums = log_sums(torch.full((2, 5000), broken, device=device).bfloat16())
    assert sums is not None and not sums.lse_R.isfinite().any()
    assert all(0 <= best < 5000 for best in sums.best_R.tolist())


@pytest.mark.parametrize("device", DEVICES)
def test_words_that_cannot_come_take_nothing(device: str) -> None:
    logits_RV = torch.randn(2, 100, device=device).bfloat16()
    logits_RV[:, 20:] = -torch.inf
    sums = log_sums(logits_RV)
    assert sums is not None
    torch.testing.assert_close(sums.lse_R, logits_RV[:, :20].float().logsumexp(-1))


def test_other_numbers_are_torchs() -> None:
    assert log_sums(torch.randn(2, 10)) is None
    assert log_sums(torch.randn(10, 2).bfloat16().T) is None


def test_the_rate_is_measured() -> None:
    rate = cpu_softmax_rate(torch.bfloat16)
    assert rate is not None and 1e7 < rate < 1e12
    assert cpu_softmax_rate(torch.float32) is None
