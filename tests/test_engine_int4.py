"""Matrices multiplied as they rest: the kernels against float64, the way through a model against unpacked weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import assert_equal_results, tiny_case, tiny_config, tiny_model
from torch import Tensor

from flexeval.engine.checkpoint import StateDictCheckpoint
from flexeval.engine.codecs.codec import IntegerCodec
from flexeval.engine.codecs.coded import CodedMatrices, CodedMatrix, Int4Matrix, Route
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.host_products import has_products, multiply
from flexeval.engine.executor import Executor
from flexeval.engine.memory.disk import DiskTier
from flexeval.policy.policy import Policy, Split
from flexeval.request import TokenResult

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
needs_products = pytest.mark.skipif(not has_products(), reason="the processor adds up no products of pairs")
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def random_run(codec: IntegerCodec, num_values: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(num_values)
    return codec.encode(torch.randn(num_values, generator=generator) * 0.02 + 0.01).to(device)


def decoded(codec: IntegerCodec, coded: Tensor, num_values: int) -> Tensor:
    out = torch.empty(num_values)
    codec.decode(coded.cpu(), out)
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_unpacking_on_a_gpu_gives_the_cpus_numbers(group_size: int, dtype: torch.dtype) -> None:
    codec = IntegerCodec(4, group_size)
    num_values = 1001 * group_size
    coded = random_run(codec, num_values, CUDA)
    out = torch.full((num_values,), torch.nan, dtype=dtype, device=CUDA)
    codec.decode(coded, out)
    unit = {torch.float32: 2e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]  # a unit in the last place, relative
    torch.testing.assert_close(out.cpu().float(), decoded(codec, coded, num_values), rtol=unit, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("group_size", "dtype"), [*((64, dtype) for dtype in TOLERANCE), (32, torch.float16), (128, torch.bfloat16)]
)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(20, 64), (100, 576), (1536, 200), (3000, 7168)])
@pytest.mark.parametrize("num_tokens", [1, 33, 128])
def test_a_product_with_a_matrix_as_it_rests(
    num_tokens: int, num_outputs: int, num_inputs: int, group_size: int, dtype: torch.dtype
) -> None:
    codec = IntegerCodec(4, group_size)
    padded = -(-num_inputs // group_size) * group_size
    num_values, before = num_outputs * padded, 3 * group_size
    coded = random_run(codec, before + num_values + group_size, CUDA)
    weight_OI = decoded(codec, coded, before + num_values + group_size)[before : before + num_values]
    weight_OI = weight_OI.view(num_outputs, padded)[:, :num_inputs].double()
    x_TI, bias_O = torch.randn(num_tokens, num_inputs).to(dtype), torch.randn(num_outputs).to(dtype)
    matrix = codec.matrix(coded, before, (num_outputs, padded))
    y_TO = matrix.multiply(x_TI.to(CUDA), bias_O.to(CUDA))
    assert (y_TO.dtype, y_TO.shape) == (dtype, (num_tokens, num_outputs))
    expected_TO = x_TI.double() @ weight_OI.T + bias_O.double()
    assert (y_TO.cpu().double() - expected_TO).norm() / expected_TO.norm() < TOLERANCE[dtype]
    assert torch.equal(matrix.multiply(x_TI.to(CUDA), bias_O.to(CUDA)), y_TO), "the same sum in the same order"


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0.0, 0.002, 0.05, 1.0, -1.0])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_product_with_a_matrix_as_it_rests_rounds_its_numbers_once(dtype: torch.dtype, offset: float) -> None:
    """Times the identity it is the matrix itself: minima beside scales of all sizes, and of exactly zero."""
    codec, (num_outputs, num_inputs) = IntegerCodec(4, 32), (640, 128)
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(num_outputs * num_inputs, generator=generator) * 0.05 + offset
    coded = codec.encode(values)
    matrix = codec.matrix(coded.to(CUDA), 0, (num_outputs, num_inputs))
    y_OI = matrix.multiply(torch.eye(num_inputs, dtype=dtype, device=CUDA), None).T.cpu()
    wanted_OI = decoded(codec, coded, len(values)).view(num_outputs, num_inputs)
    assert (y_OI == wanted_OI.to(dtype)).float().mean() > 0.995, "a number halfway between two may go either way"
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y_OI.float(), wanted_OI, rtol=unit, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [8, 32, 64, 128])
def test_a_large_product_is_the_same_every_time(num_tokens: int) -> None:
    """Large enough that every multiprocessor is at work: races show here."""
    codec, (num_outputs, num_inputs) = IntegerCodec(4, 64), (28672, 7168)
    generator = torch.Generator(CUDA).manual_seed(num_tokens)
    weight_OI = torch.randn(num_outputs, num_inputs, generator=generator, device=CUDA, dtype=torch.float16) * 0.02
    coded = codec.encode(weight_OI.view(-1))
    codec.decode(coded, weight_OI.view(-1))
    x_TI = torch.randn(num_tokens, num_inputs, generator=generator, device=CUDA, dtype=torch.float16)
    matrix = codec.matrix(coded, 0, (num_outputs, num_inputs))
    y_TO = matrix.multiply(x_TI, None)
    expected_TO = x_TI.double() @ weight_OI.double().T
    assert (y_TO.double() - expected_TO).norm() / expected_TO.norm() < 1e-3
    for _ in range(30):
        assert torch.equal(matrix.multiply(x_TI, None), y_TO)


def route_of(expert_S: Tensor, num_experts: int) -> Route:
    order_S = expert_S.argsort()
    return Route(order_S, torch.bincount(expert_S, minlength=num_experts).cumsum(0).int())


@pytest.mark.gpu
@pytest.mark.parametrize(("group_size", "dtype"), [*((64, dtype) for dtype in TOLERANCE), (32, torch.bfloat16)])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(20, 64), (300, 200), (1536, 2048)])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "per_token"), [(1, 128, 8), (9, 4, 1), (60, 5, 3), (128, 128, 8), (128, 2, 2)]
)
def test_products_with_experts_matrices_as_they_rest(
    num_tokens: int,
    num_experts: int,
    per_token: int,
    num_outputs: int,
    num_inputs: int,
    group_size: int,
    dtype: torch.dtype,
) -> None:
    """Some experts are chosen by none, one by all, more than a program takes at a time; their runs lie apart."""
    codec = IntegerCodec(4, group_size)
    padded = -(-num_inputs // group_size) * group_size
    num_values, before = num_outputs * padded, 3 * group_size
    run_values = before + num_values + group_size
    coded_XB = torch.zeros(num_experts, 64 + codec.num_bytes(run_values) + 128, dtype=torch.uint8, device=CUDA)
    values_XV = torch.randn(num_experts, run_values, device=CUDA) * 0.02 + 0.01
    runs_XB = coded_XB[:, 64 : 64 + codec.num_bytes(run_values)]
    for run_B, values_V in zip(runs_XB, values_XV, strict=True):
        run_B.copy_(codec.encode(values_V))
    codec.decode(runs_XB, values_XV)
    weight_XOI = values_XV[:, before : before + num_values].view(num_experts, num_outputs, padded)[..., :num_inputs]
    matrices = codec.matrices(runs_XB, before, (num_outputs, padded))

    favourite_T1 = torch.full((num_tokens, 1), num_experts - 1, device=CUDA)
    further_TC = torch.rand(num_tokens, num_experts - 1, device=CUDA).topk(per_token - 1).indices
    expert_S = torch.cat([favourite_T1, further_TC], dim=1).view(-1)
    route = route_of(expert_S, num_experts)
    for num_rows in (num_tokens, len(expert_S)):
        x_RI = torch.randn(num_rows, num_inputs, device=CUDA).to(dtype)
        y_SO = matrices.multiply(x_RI, route)
        assert (y_SO.dtype, y_SO.shape) == (dtype, (len(expert_S), num_outputs))
        x_SI = x_RI.repeat_interleave(len(expert_S) // num_rows, 0).double()
        expected_SO = torch.stack(
            [weight_XOI[expert].double() @ x_I for expert, x_I in zip(expert_S.tolist(), x_SI, strict=True)]
        )
        assert (y_SO.double() - expected_SO).norm() / expected_SO.norm() < TOLERANCE[dtype]
        for _ in range(5):
            assert torch.equal(matrices.multiply(x_RI, route), y_SO), "the same sum in the same order"


@needs_products
@pytest.mark.parametrize("group_size", [8, 32, 64, 96, 128])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(3, 64), (101, 200), (64, 576)])
@pytest.mark.parametrize("num_tokens", [1, 7, 64])
def test_a_cpu_multiplies_by_codes_as_by_the_numbers_they_stand_for(
    num_tokens: int, num_outputs: int, num_inputs: int, group_size: int
) -> None:
    codec = IntegerCodec(4, group_size)
    padded = -(-num_inputs // group_size) * group_size
    num_values, before = num_outputs * padded, 3 * group_size
    coded = random_run(codec, before + num_values + group_size, CPU)
    weight_V = torch.empty(before + num_values + group_size, dtype=torch.bfloat16)
    codec.decode(coded, weight_V)
    weight_OI = weight_V[before : before + num_values].view(num_outputs, padded)[:, :num_inputs]
    x_TI, bias_O = torch.randn(num_tokens, 2 * num_inputs).bfloat16()[:, ::2], torch.randn(num_outputs).bfloat16()
    matrix = codec.matrix(coded, before, (num_outputs, padded))
    for bias in (bias_O, None):
        assert torch.equal(matrix.multiply(x_TI, bias), multiply(x_TI.contiguous(), weight_OI, bias))


@needs_products
def test_a_cpu_multiplies_by_experts_codes() -> None:
    codec, num_experts, num_outputs, num_inputs = IntegerCodec(4, 32), 5, 40, 64
    values_XOI = torch.randn(num_experts, num_outputs, num_inputs)
    coded_XB = torch.stack([codec.encode(one.flatten()) for one in values_XOI])
    matrices = codec.matrices(coded_XB, 0, (num_outputs, num_inputs))
    expert_S = torch.tensor([4, 0, 0, 2, 4, 1, 0, 4])  # nobody chose the fourth
    for num_rows in (4, 8):
        x_RI = torch.randn(num_rows, num_inputs).bfloat16()
        y_SO = matrices.multiply(x_RI, route_of(expert_S, num_experts))
        for choice, expert in enumerate(expert_S.tolist()):
            row = choice * num_rows // len(expert_S)
            one = codec.matrix(coded_XB[expert], 0, (num_outputs, num_inputs))
            assert torch.equal(y_SO[choice], one.multiply(x_RI[row : row + 1], None)[0])


@needs_products
@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_a_cpu_answers_the_same_by_codes_and_by_numbers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, but for experts' numbers, which torch multiplies in another order."""
    by_codes, num_products = Int4Matrix.multiply, 0

    def count(self: Int4Matrix, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        nonlocal num_products
        num_products += 1
        return by_codes(self, x_TI, bias_O)

    def answers() -> list[TokenResult]:
        anatomy = Anatomy(tiny_config(family), torch.bfloat16)
        checkpoint = StateDictCheckpoint(anatomy, {n: t.bfloat16() for n, t in tiny_model(family).state_dict().items()})
        policy = Policy(row_tokens=24, sweep_tokens=40, group_sequences=2, num_groups=2)
        with Executor(anatomy, checkpoint, policy, codec=IntegerCodec(4, 32), device=CPU, disk_tier=None) as executor:
            return [replace(result, elapsed_s=0.0) for result in executor.execute(tiny_case(family).requests)]

    monkeypatch.setattr(Int4Matrix, "multiply", count)
    with_codes = answers()
    assert num_products > 0
    monkeypatch.setattr(IntegerCodec, "few_tokens", lambda *_: 0)
    num_products, with_numbers = 0, answers()
    assert num_products == 0
    if family != "mixtral":
        assert with_codes == with_numbers
    for one, other in zip(with_codes, with_numbers, strict=True):
        assert one.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=0.05)


class UnpackedMatrix:
    """A coded matrix without a kernel: unpacked for every product, which counts them."""

    num_products = 0

    def __init__(self, weight_OI: Tensor):
        self._weight_OI = weight_OI

    def multiply(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        UnpackedMatrix.num_products += 1
        return torch.nn.functional.linear(x_TI, self._weight_OI[:, : x_TI.shape[1]], bias_O)


class UnpackedMatrices:
    """The same of experts."""

    def __init__(self, weight_XOI: Tensor):
        self._weight_XOI = weight_XOI

    def multiply(self, x_RI: Tensor, route: Route) -> Tensor:
        UnpackedMatrix.num_products += 1
        expert_S = torch.empty_like(route.order_S)
        expert_S[route.order_S] = torch.searchsorted(route.end_X, torch.arange(len(expert_S)), right=True)
        x_SI = x_RI.repeat_interleave(len(expert_S) // len(x_RI), 0)
        return torch.einsum("soi,si->so", self._weight_XOI[expert_S][..., : x_RI.shape[1]], x_SI)


class CodecWithoutUnpacking(IntegerCodec):
    """Multiplies matrices as they rest on a CPU, up to a number of tokens."""

    def __init__(self, few_tokens: int):
        super().__init__(4, 32)
        self._few_tokens = few_tokens

    def few_tokens(self, device: torch.device, dtype: torch.dtype) -> int:
        return self._few_tokens

    def matrix(self, coded: Tensor, first: int, shape: tuple[int, int]) -> CodedMatrix:
        values = decoded(self, coded, coded.numel() // self.num_bytes(32) * 32)
        return UnpackedMatrix(values[first : first + shape[0] * shape[1]].view(shape))

    def matrices(self, coded_XB: Tensor, first: int, shape: tuple[int, int]) -> CodedMatrices:
        values_XV = torch.empty(len(coded_XB), coded_XB.shape[1] // self.num_bytes(32) * 32)
        self.decode(coded_XB, values_XV)
        return UnpackedMatrices(values_XV[:, first : first + shape[0] * shape[1]].view(-1, *shape))


@pytest.mark.parametrize("weights", [Split(cpu=1.0), Split(cpu=0.5, disk=0.5)])
@pytest.mark.parametrize(
    ("family", "takes_coded"),
    [("gpt2", False), *((family, True) for family in ("llama", "opt", "mixtral", "gpt_oss", "deepseek_v3"))],
)
def test_few_tokens_are_multiplied_by_matrices_as_they_rest(
    family: str, takes_coded: bool, weights: Split, tmp_path: Path
) -> None:
    """Some rows are short, some are long, so layers are bound now one way and now the other.

    Of layers on disk, experts come as they are chosen.
    """
    results = []
    for few_tokens in (0, 9):
        anatomy = Anatomy(tiny_config(family), torch.float32)
        checkpoint = StateDictCheckpoint(anatomy, tiny_model(family).state_dict())
        policy = Policy(weights=weights, row_tokens=24, sweep_tokens=40, group_sequences=2, num_groups=2)
        UnpackedMatrix.num_products = 0
        with Executor(
            anatomy,
            checkpoint,
            policy,
            codec=CodecWithoutUnpacking(few_tokens),
            device=CPU,
            disk_tier=DiskTier(tmp_path),
        ) as executor:
            results.append(executor.execute(tiny_case(family).requests))
        assert (UnpackedMatrix.num_products > 0) == (takes_coded and few_tokens > 0)
    assert_equal_results(results[1], results[0])


def test_a_model_is_placed_again_after_its_matrices_were_multiplied_as_they_rest(tmp_path: Path) -> None:
    """As where a batch wants another policy: nothing is left of the weights that were there first."""
    anatomy, case = Anatomy(tiny_config("llama"), torch.float32), tiny_case("llama")
    checkpoint = StateDictCheckpoint(anatomy, tiny_model("llama").state_dict())
    results, sizes = [], []
    for group_sequences in (2, 4):
        policy, codec = Policy(group_sequences=group_sequences), CodecWithoutUnpacking(9)
        with Executor(anatomy, checkpoint, policy, codec=codec, device=CPU, disk_tier=None) as executor:
            results.append(executor.execute(case.requests))
            sizes.append(executor.peak_bytes()["cpu"])
        assert all(tensor.is_meta for layer in anatomy.layers for tensor in layer.state_dict(keep_vars=True).values())
    assert_equal_results(*results)
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2), "all weights again"
