"""ReLUs that a product does on its way: only where nothing else takes what it makes, and to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from flexeval.backends import loading
from flexeval.engine.compute import rectified
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.elementwise import results_per_token
from flexeval.engine.compute.fusion import Fusion
from flexeval.engine.compute.linear import CodedLinear, make_coded
from flexeval.engine.compute.rectified import fuse_relus

WIDTH, INNER = 48, 80


class AsOnAGpu(Fusion):
    def applies(self, x: Tensor) -> bool:
        return True


class Block(nn.Module):
    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, INNER, bias=bias), nn.Linear(INNER, WIDTH, bias=bias)
        self.activation_fn, self.other = nn.ReLU(), nn.ReLU()
        make_coded(self)

    def forward(self, x: Tensor) -> Any:
        return self.fc2(self.activation_fn(self.fc1(x)))


class AlsoAdded(Block):
    def forward(self, x: Tensor) -> Any:
        made = self.fc1(x)
        return self.fc2(self.activation_fn(made) + made)


class AlsoReturned(Block):
    def forward(self, x: Tensor) -> Any:
        made = self.fc1(x)
        return self.fc2(self.activation_fn(made)), made


class Twice(Block):
    def forward(self, x: Tensor) -> Any:
        return self.fc2(self.activation_fn(self.fc1(x)) + self.fc1(x))


class ScaledBefore(Block):
    def forward(self, x: Tensor) -> Any:
        return self.fc2(self.activation_fn(2 * self.fc1(x)))


class RectifiedBefore(Block):
    def forward(self, x: Tensor) -> Any:
        return self.fc2(2 * self.fc1(self.activation_fn(x)))


class BothRectify(Block):
    def forward(self, x: Tensor) -> Any:
        made = self.fc1(x)
        return self.fc2(self.activation_fn(made) + self.other(made))


class Unusable(Block):
    """Without memory."""

    def forward(self, x: Tensor) -> Any:
        made = self.activation_fn(self.fc1(x))
        return self.fc2(made) if made.sum() > 0 else made


def pairs_of(block: Block) -> list[tuple[CodedLinear, nn.Module]]:
    linears = [module for module in block.modules() if isinstance(module, CodedLinear)]
    without_memory = block.to("meta")
    return rectified._find_pairs(
        linears, [block.activation_fn, block.other], lambda: without_memory(torch.empty(3, WIDTH, device="meta"))
    )


def fused(fusion: Fusion) -> Block:
    block = Block().bfloat16()
    assert isinstance(block.fc1, CodedLinear)
    rectified._fuse(block.fc1, block.activation_fn, fusion)
    return block


def test_what_a_relu_alone_takes_is_found() -> None:
    with torch.inference_mode():
        block = Block()
        assert pairs_of(block) == [(block.fc1, block.activation_fn)]


@pytest.mark.parametrize("kind", [AlsoAdded, AlsoReturned, Twice, ScaledBefore, RectifiedBefore, BothRectify, Unusable])
def test_what_anything_else_takes_stays(kind: type[Block]) -> None:
    with torch.inference_mode():
        assert pairs_of(kind()) == []


def test_without_a_bias_it_stays() -> None:
    with torch.inference_mode():
        assert pairs_of(Block(bias=False)) == []


@pytest.mark.parametrize(
    ("module", "is_relu"), [(nn.ReLU(), True), (nn.ReLU6(), False), (nn.GELU(), False), (nn.LeakyReLU(1e-4), False)]
)
def test_a_relu_is_known_by_what_it_computes(module: nn.Module, is_relu: bool) -> None:
    assert rectified._is_relu(module) == is_relu


@pytest.mark.parametrize(
    ("family", "changes", "is_found"),
    [
        ("opt", {}, True),
        ("opt", {"activation_function": "gelu"}, False),
        ("opt", {"enable_bias": False}, False),
        ("gpt_neox", {"hidden_act": "relu"}, True),
        ("llama", {"hidden_act": "relu"}, False),
    ],
)
def test_families_with_such_products_write_less_on_a_gpu(family: str, changes: dict[str, Any], is_found: bool) -> None:
    anatomy = Anatomy(tiny_config(family, **changes), torch.float16)
    before = [results_per_token(anatomy, torch.device(device)) for device in ("cpu", "cuda")]
    fuse_relus(anatomy)
    after = [results_per_token(anatomy, torch.device(device)) for device in ("cpu", "cuda")]
    inner = 128
    assert after == [before[0], before[1] - inner * is_found]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_that_is_opened_for_a_gpu_has_them(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "pick_device", torch.device)
    opened = loading.open_model("dummy:opt-125m", setting="none", device=device, dtype="float16")
    assert ("forward" in vars(opened.anatomy.layers[-1].get_submodule("fc1"))) == (device == "cuda")


@torch.inference_mode()
def test_it_is_rectified_once_and_the_same_whatever_a_weight_is() -> None:
    """On a CPU, as on a GPU: by torch's own product of both."""
    block, x = fused(AsOnAGpu()), torch.randn(2, 5, WIDTH).bfloat16()
    made = block.fc1(x)
    assert torch.equal(made, relu(linear(x, block.fc1.weight, block.fc1.bias))) and made.shape == (2, 5, INNER)
    assert block.activation_fn(made) is made
    assert torch.equal(block.activation_fn(made - 1), relu(made - 1))  # it is another tensor

    class Negating:
        """In a coded matrix' place."""

        def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
            return -torch.ones(len(x), INNER).bfloat16()

    block.fc1.coded = Negating()  # type: ignore[assignment]
    assert block.fc1(x).max() == -1 and block.activation_fn(block.fc1(x)).max() == 0


@torch.inference_mode()
def test_a_cpu_and_float32_do_one_after_the_other() -> None:
    for block, x in (
        (fused(Fusion()), torch.randn(5, WIDTH).bfloat16()),
        (fused(AsOnAGpu()).float(), torch.randn(5, WIDTH)),
    ):
        made = block.fc1(x)
        assert torch.equal(made, linear(x, block.fc1.weight, block.fc1.bias))
        assert torch.equal(block.activation_fn(made), relu(made))


def launches(run: Callable[[], object]) -> list[str]:
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not name.startswith("Mem")]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "width", "inner"), [(1, 64, 256), (8, 7168, 28672), (300, 48, 80), (4096, 2560, 10240)]
)
@torch.inference_mode()
def test_on_a_gpu_a_product_that_rectifies_is_the_same_to_the_last_bit(
    num_tokens: int, width: int, inner: int, dtype: torch.dtype
) -> None:
    """As a product and a ReLU after it, with one launch less."""
    block = Block()
    block.fc1 = nn.Linear(width, inner)
    make_coded(block)
    block.cuda().to(dtype)
    x = torch.randn(num_tokens, width, device="cuda").to(dtype)

    def run() -> Tensor:
        return block.activation_fn(block.fc1(x))  # type: ignore[no-any-return]

    expected, before = run(), launches(run)
    assert isinstance(block.fc1, CodedLinear)
    rectified._fuse(block.fc1, block.activation_fn, Fusion())
    after = launches(run)
    assert torch.equal(run(), expected), f"{(run() != expected).sum()} of {expected.numel()} differ"
    assert num_tokens == 1 or len(after) == len(before) - 1, (before, after)


@pytest.mark.gpu
@torch.inference_mode()
def test_such_a_product_is_recorded() -> None:
    block, x = fused(Fusion()).cuda(), torch.randn(8, WIDTH, device="cuda").bfloat16()
    block(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, block(x))
