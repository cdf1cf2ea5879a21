"""Products of a matrix by few tokens: as torch has them of tokens by a matrix, and only where they are faster."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from flexeval.engine.compute.few_tokens import LEAST_NUMBERS, MAX_TOKENS, multiply_few
from flexeval.engine.compute.host_passes import has_tiles, turn
from flexeval.engine.compute.linear import CodedLinear

BFLOAT16 = torch.bfloat16
NUM_OUTPUTS, NUM_INPUTS = 1000, 640
assert NUM_OUTPUTS * NUM_INPUTS >= LEAST_NUMBERS
needs_tiles = pytest.mark.skipif(not has_tiles(), reason="the processor has no matrix unit")


@needs_tiles
@pytest.mark.parametrize("num_tokens", [2, 15, 16, 17, 64, MAX_TOKENS])
@pytest.mark.parametrize("has_bias", [False, True])
def test_few_tokens_are_multiplied_as_float64_does(num_tokens: int, has_bias: bool) -> None:
    x_TI = torch.randn(num_tokens, 2 * NUM_INPUTS).to(BFLOAT16)[:, :NUM_INPUTS]  # rows that do not follow each other
    matrix_OI = torch.randn(NUM_OUTPUTS, NUM_INPUTS).to(BFLOAT16)
    bias_O = torch.randn(NUM_OUTPUTS).to(BFLOAT16) if has_bias else None
    out_TO = multiply_few(x_TI, matrix_OI, bias_O)
    exact_TO = x_TI.double() @ matrix_OI.double().T + (0 if bias_O is None else bias_O.double())
    assert out_TO is not None and out_TO.is_contiguous()
    torch.testing.assert_close(out_TO.double(), exact_TO, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.randn(4, NUM_INPUTS), id="float32"),
        pytest.param(torch.randn(1, NUM_INPUTS).to(BFLOAT16), id="one token"),
        pytest.param(torch.randn(0, NUM_INPUTS).to(BFLOAT16), id="none"),
        pytest.param(torch.randn(MAX_TOKENS + 1, NUM_INPUTS).to(BFLOAT16), id="many"),
        pytest.param(torch.randn(4, 64).to(BFLOAT16), id="small matrix"),
    ],
)
def test_other_products_are_as_ever(x: torch.Tensor) -> None:
    assert multiply_few(x, torch.randn(NUM_OUTPUTS, x.shape[1]).to(x.dtype), None) is None


def test_without_a_matrix_unit_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexeval.engine.compute.few_tokens.has_tiles", lambda: False)
    x_TI, matrix_OI = torch.randn(4, NUM_INPUTS).to(BFLOAT16), torch.randn(NUM_OUTPUTS, NUM_INPUTS).to(BFLOAT16)
    assert multiply_few(x_TI, matrix_OI, None) is None


@needs_tiles
@pytest.mark.parametrize("shape", [(3, NUM_INPUTS), (2, 5, NUM_INPUTS)])
def test_a_linear_layer_multiplies_few_tokens_so(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = CodedLinear(NUM_INPUTS, NUM_OUTPUTS, dtype=BFLOAT16), torch.randn(shape).to(BFLOAT16)
    expected = linear(x, layer.weight, layer.bias)
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *_: pytest.fail("torch multiplies"))
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected, rtol=2**-7, atol=1e-2)


@needs_tiles
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (33, 17), (5000, 3), (100, 128)])
def test_what_is_turned_is_the_same(shape: tuple[int, int]) -> None:
    y_OT = torch.randn(shape).to(BFLOAT16)
    assert torch.equal(turn(y_OT), y_OT.T)
