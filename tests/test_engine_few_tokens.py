"""Products of a matrix by few tokens: as torch has them of tokens by a matrix, and only where they are faster."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from flexeval.engine.compute.few_tokens import (
    LEAST_TURNED_NUMBERS,
    MAX_READ_TOKENS,
    MAX_TURNED_TOKENS,
    multiply_few,
)
from flexeval.engine.compute.host_passes import has_tiles, turn
from flexeval.engine.compute.host_products import has_products, multiply
from flexeval.engine.compute.linear import CodedLinear

BFLOAT16 = torch.bfloat16
NUM_OUTPUTS, NUM_INPUTS = 1000, 640
assert NUM_OUTPUTS * NUM_INPUTS >= LEAST_TURNED_NUMBERS
needs_tiles = pytest.mark.skipif(not has_tiles(), reason="the processor has no matrix unit")
needs_products = pytest.mark.skipif(not has_products(), reason="the processor adds up no products of pairs")
needs_either = pytest.mark.skipif(not (has_tiles() or has_products()), reason="the processor has neither")


def assert_multiplied(
    out_TO: torch.Tensor, x_TI: torch.Tensor, matrix_OI: torch.Tensor, bias_O: torch.Tensor | None
) -> None:
    exact_TO = x_TI.double() @ matrix_OI.double().T + (0 if bias_O is None else bias_O.double())
    assert out_TO.is_contiguous()
    torch.testing.assert_close(out_TO.double(), exact_TO, rtol=2**-8, atol=1e-3)


@needs_either
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 9, 16, 17, MAX_READ_TOKENS])
@pytest.mark.parametrize("has_bias", [False, True])
def test_few_tokens_are_multiplied_as_float64_does(num_tokens: int, has_bias: bool) -> None:
    x_TI = torch.randn(num_tokens, 2 * NUM_INPUTS).to(BFLOAT16)[:, :NUM_INPUTS]  # rows that do not follow each other
    matrix_OI = torch.randn(NUM_OUTPUTS, NUM_INPUTS).to(BFLOAT16)
    bias_O = torch.randn(NUM_OUTPUTS).to(BFLOAT16) if has_bias else None
    out_TO = multiply_few(x_TI, matrix_OI, bias_O)
    assert out_TO is not None
    assert_multiplied(out_TO, x_TI, matrix_OI, bias_O)


@needs_products
@pytest.mark.parametrize("num_tokens", [1, 2, 4, 5, 8, 9, 13, 17, 21])
@pytest.mark.parametrize("num_inputs", [1, 31, 32, 65])
@pytest.mark.parametrize("num_outputs", [1, 3, 32, 35])
def test_products_of_any_shape_are_what_float64_has(num_tokens: int, num_inputs: int, num_outputs: int) -> None:
    x_TI = torch.randn(num_tokens, num_inputs + 3).to(BFLOAT16)[:, :num_inputs]
    matrix_OI = torch.randn(num_outputs, num_inputs + 5).to(BFLOAT16)[:, :num_inputs]  # as rows of whole groups rest
    bias_O = torch.randn(num_outputs).to(BFLOAT16)
    assert_multiplied(multiply(x_TI, matrix_OI, bias_O), x_TI, matrix_OI, bias_O)


@needs_products
def test_a_token_comes_to_the_same_whoever_is_beside_it() -> None:
    x_TI = torch.randn(MAX_READ_TOKENS, NUM_INPUTS).to(BFLOAT16)
    matrix_OI = torch.randn(NUM_OUTPUTS, NUM_INPUTS).to(BFLOAT16)
    together_TO = multiply(x_TI, matrix_OI, None)
    assert torch.equal(together_TO, torch.cat([multiply(x_TI[i : i + 1], matrix_OI, None) for i in range(len(x_TI))]))


@needs_products
def test_what_is_no_number_stays_none() -> None:
    x_TI, matrix_OI = torch.zeros(5, NUM_INPUTS, dtype=BFLOAT16), torch.ones(NUM_OUTPUTS, NUM_INPUTS, dtype=BFLOAT16)
    x_TI[1, 7], x_TI[3, -1] = torch.nan, -torch.inf
    out_TO = multiply(x_TI, matrix_OI, None)
    assert out_TO[1].isnan().all() and (out_TO[3] == -torch.inf).all() and (out_TO[[0, 2, 4]] == 0).all()


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.randn(4, NUM_INPUTS), id="float32"),
        pytest.param(torch.randn(0, NUM_INPUTS).to(BFLOAT16), id="none"),
        pytest.param(torch.randn(MAX_TURNED_TOKENS + 1, NUM_INPUTS).to(BFLOAT16), id="many"),
    ],
)
def test_other_products_are_as_ever(x: torch.Tensor) -> None:
    assert multiply_few(x, torch.randn(NUM_OUTPUTS, x.shape[1]).to(x.dtype), None) is None


@needs_tiles
def test_small_matrices_are_not_turned() -> None:
    x_TI, matrix_OI = torch.randn(16, 64).to(BFLOAT16), torch.randn(NUM_OUTPUTS, 64).to(BFLOAT16)
    assert multiply_few(x_TI, matrix_OI, None) is None


def test_columns_that_lie_side_by_side_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexeval.engine.compute.few_tokens.has_tiles", lambda: False)
    matrix_OI = torch.randn(NUM_INPUTS, NUM_OUTPUTS).to(BFLOAT16).T
    assert multiply_few(torch.randn(4, NUM_INPUTS).to(BFLOAT16), matrix_OI, None) is None


def test_without_such_a_processor_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexeval.engine.compute.few_tokens.has_tiles", lambda: False)
    monkeypatch.setattr("flexeval.engine.compute.few_tokens.has_products", lambda: False)
    x_TI, matrix_OI = torch.randn(4, NUM_INPUTS).to(BFLOAT16), torch.randn(NUM_OUTPUTS, NUM_INPUTS).to(BFLOAT16)
    assert multiply_few(x_TI, matrix_OI, None) is None


@needs_either
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
