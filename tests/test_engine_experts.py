"""Experts: only chosen ones are moved and unpacked, wherever a layer rests, and answers stay transformers'."""

from __future__ import annotations

import copy
import math
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from dispatch_tapes import DispatchTapes, let_torch_compute
from tiny_models import assert_equal_results, dequantized, ragged_requests, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from flexeval.backends.transformers import answer
from flexeval.engine.checkpoint import StateDictCheckpoint
from flexeval.engine.codecs.codec import Codec, IntegerCodec
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.replay import Replay
from flexeval.engine.compute.spec import TensorSpec
from flexeval.engine.executor import Executor
from flexeval.engine.memory.disk import DiskTier
from flexeval.engine.memory.slab import SlabLayout
from flexeval.engine.memory.weights import neighbours
from flexeval.engine.sizes import model_shape
from flexeval.engine.trace import SweepTrace
from flexeval.errors import UnsupportedModelError
from flexeval.policy.experts import BY_NEED_SHARE, chosen_share, fetched_part, is_by_need
from flexeval.policy.policy import Policy, Split
from flexeval.request import TokenRequest, TokenResult

CPU = torch.device("cpu")
NUM_EXPERTS, PER_TOKEN = 16, 2
CHANGES = {
    "qwen3_moe": {"num_experts": NUM_EXPERTS, "num_experts_per_tok": PER_TOKEN},
    "gpt_oss": {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": PER_TOKEN},
    "deepseek_v3": {"n_routed_experts": NUM_EXPERTS, "num_experts_per_tok": PER_TOKEN},
}
DISK = Policy(weights=Split(disk=1.0), row_tokens=24, sweep_tokens=80, group_sequences=2, num_groups=2)
PLACEMENTS = {"cpu": Policy(group_sequences=2, num_groups=1), "disk": DISK}


def config_of(family: str) -> PretrainedConfig:
    return tiny_config(family, **CHANGES[family])


@cache
def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config_of(family)), attn_implementation="eager").eval()


@cache
def expected(family: str) -> list[TokenResult]:
    return [answer(model_of(family), request) for request in ragged_requests()]


def execute(
    family: str,
    policy: Policy,
    requests: list[TokenRequest],
    folder: Path,
    *,
    codec: Codec | None = None,
    device: torch.device = CPU,
    overlap: bool | None = None,
) -> tuple[list[TokenResult], list[SweepTrace]]:
    anatomy = Anatomy(config_of(family), torch.float32)
    with Executor(
        anatomy,
        StateDictCheckpoint(anatomy, model_of(family).state_dict()),
        policy,
        codec=codec,
        device=device,
        disk_tier=DiskTier(folder),
        overlap=overlap,
    ) as executor:
        return executor.execute(requests), executor.trace.sweeps


def one_sequence() -> list[TokenRequest]:
    """A prompt that needs all experts, and a token a sweep that needs two."""
    rng = random.Random(5)
    return [TokenRequest(prompt_ids=tuple(rng.randrange(5, 200) for _ in range(60)), max_tokens=6)]


@pytest.mark.parametrize("family", CHANGES)
@pytest.mark.parametrize(("placement", "overlap"), [("cpu", False), ("disk", False), ("disk", True)])
def test_answers_are_transformers(family: str, placement: str, overlap: bool, tmp_path: Path) -> None:
    results, sweeps = execute(family, PLACEMENTS[placement], ragged_requests(), tmp_path, overlap=overlap)
    assert_equal_results(results, expected(family))
    tokens = [sweep.num_fresh_tokens + sweep.num_decode_tokens for sweep in sweeps]
    by_need = [is_by_need(NUM_EXPERTS, PER_TOKEN, number) for number in tokens]
    assert any(by_need) and not all(by_need), "both ways are taken"


@pytest.mark.parametrize("overlap", [False, True])
def test_what_a_failed_short_sweep_has_sent_for_serves_no_long_one(
    overlap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds no experts: those would have followed as they were chosen."""
    anatomy = Anatomy(config_of("qwen3_moe"), torch.float32)
    checkpoint = StateDictCheckpoint(anatomy, model_of("qwen3_moe").state_dict())
    long = [TokenRequest(prompt_ids=tuple(range(5, 75)), max_tokens=1)]

    def fail(*_: object) -> None:
        raise RuntimeError("before the first layer")

    with Executor(
        anatomy, checkpoint, DISK, codec=None, device=CPU, disk_tier=DiskTier(tmp_path), overlap=overlap
    ) as executor:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="before the first layer"):
            patch.setattr(Anatomy, "embed", fail)
            executor.execute([TokenRequest(prompt_ids=(7, 9), max_tokens=1)])
        assert_equal_results(executor.execute(long), [answer(model_of("qwen3_moe"), long[0])])


@pytest.mark.parametrize("family", CHANGES)
@pytest.mark.parametrize("codec", [None, IntegerCodec(4, 32)], ids=["none", "w4"])
@pytest.mark.parametrize("may_replay", [False, True])
def test_a_short_sweep_moves_what_all_tokens_need_and_the_experts_that_were_chosen(
    may_replay: bool, family: str, codec: Codec | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are not filled up then, as those that are replayed are: that would choose experts, too."""
    if may_replay:
        let_torch_compute(monkeypatch)
        tapes = DispatchTapes()
        replay = lambda self: Replay(self._anatomy, lambda: tapes, self._weights.bind_in_place)  # noqa: E731
        monkeypatch.setattr(Executor, "_make_replay", replay)
    anatomy = Anatomy(config_of(family), torch.float32)
    layouts = [SlabLayout(anatomy.layer_specs(layer), codec) for layer in range(anatomy.num_layers)]
    _, sweeps = execute(family, DISK, one_sequence(), tmp_path, codec=codec)
    whole = sum(layout.num_bytes for layout in layouts)
    needed = 0
    for layout in layouts:
        in_experts = layout.expert.num_bytes if layout.expert is not None else 0
        needed += layout.num_bytes - (layout.num_experts - PER_TOKEN) * in_experts
    assert needed < 0.7 * whole
    prompt, *decode = sweeps
    assert len(decode) == 5
    ahead = layouts[0].num_bytes if layouts[0].expert is None else 0  # a dense first layer comes with the sweep before
    assert prompt.lanes["weights"].num_bytes == whole + ahead
    assert [sweep.lanes["weights"].num_bytes for sweep in decode] == [needed] * 4 + [needed - ahead]
    if family != "deepseek_v3":  # whose first layer is dense
        shape = model_shape(anatomy, codec, CPU)
        assert shape.num_layers * shape.layer_bytes * fetched_part(shape, 1) == pytest.approx(needed)


class CountingCodec(IntegerCodec):
    """Notes how many numbers each call unpacks."""

    def __init__(self) -> None:
        super().__init__(4, 32)
        self.calls: list[int] = []

    def decode(self, coded: Tensor, out: Tensor) -> None:
        self.calls.append(out.numel())
        super().decode(coded, out)


def test_a_short_sweep_unpacks_only_chosen_experts_of_layers_that_rest_in_memory(tmp_path: Path) -> None:
    codec = CountingCodec()
    anatomy = Anatomy(config_of("qwen3_moe"), torch.float32)
    layout = SlabLayout(anatomy.layer_specs(0), codec)
    assert layout.expert is not None
    dense = layout.num_coded_values - NUM_EXPERTS * layout.expert.num_coded_values
    execute("qwen3_moe", Policy(), one_sequence(), tmp_path, codec=codec)
    short = dense + PER_TOKEN * layout.expert.num_coded_values
    assert sum(codec.calls) == anatomy.num_layers * (layout.num_coded_values + 5 * short)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_w4_answers_are_transformers_on_dequantized_weights(family: str, placement: str, tmp_path: Path) -> None:
    check_w4(family, PLACEMENTS[placement], tmp_path, CPU)


def check_w4(family: str, policy: Policy, folder: Path, device: torch.device) -> None:
    codec = IntegerCodec(4, 32)
    model = dequantized(model_of(family), codec)
    want = [answer(model, request) for request in ragged_requests()]
    results, _ = execute(family, policy, ragged_requests(), folder, codec=codec, device=device)
    assert_equal_results(results, want)
    assert [r.logprobs for r in want] != [r.logprobs for r in expected(family)], "w4 changed nothing"


@pytest.mark.gpu
@pytest.mark.parametrize("family", CHANGES)
@pytest.mark.parametrize("share", ["gpu", "cpu", "disk"])
@pytest.mark.parametrize("setting", ["none", "w4"])
def test_answers_are_transformers_on_gpu(family: str, share: str, setting: str, tmp_path: Path) -> None:
    policy = Policy(weights=Split(**{share: 1.0}), kv=Split(gpu=1.0), hidden=Split(gpu=1.0), group_sequences=2)
    device = torch.device("cuda", 0)
    if setting == "w4":
        check_w4(family, policy, tmp_path, device)
    else:
        results, _ = execute(family, policy, ragged_requests(), tmp_path, device=device)
        assert_equal_results(results, expected(family))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_products_of_experts_that_lie_apart_are_those_of_stacked_ones_on_gpu(family: str) -> None:
    """In bfloat16, where the GPU's own grouped product takes matrices at the distance they have in a slab."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    device = torch.device("cuda", 0)
    anatomy = Anatomy(config_of(family), torch.bfloat16)
    experts, layer = anatomy.experts[0], anatomy.layers[0]
    assert experts is not None
    layout = SlabLayout(anatomy.layer_specs(0), None)
    prefix = f"{anatomy.layers_name}.0."
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in model_of(family).state_dict().items()
        if name.startswith(prefix)
    }
    tensors = layout.unpack(layout.pack(own, device=device), None)
    hidden_TD = torch.randn(9, 64, device=device, dtype=torch.bfloat16)
    top_TC = torch.rand(9, NUM_EXPERTS, device=device).topk(PER_TOKEN).indices
    weights_TC = torch.rand(9, PER_TOKEN, device=device, dtype=torch.bfloat16)
    outputs = []
    for bound in (tensors, {name: tensor.contiguous() for name, tensor in tensors.items()}):
        anatomy.bind_layer(0, bound)
        module = layer.get_submodule(experts.name)
        outputs.append(grouped_mm_experts_forward(module, hidden_TD, top_TC, weights_TC))
    assert not tensors[f"{experts.name}.gate_up_proj"].is_contiguous()
    assert torch.equal(*outputs) and outputs[0].abs().max() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_runs_that_lie_apart_are_unpacked_at_once_on_gpu(dtype: torch.dtype) -> None:
    codec = IntegerCodec(4, 64)
    values = torch.randn(5, 77 * 64)
    coded = torch.zeros(5, codec.num_bytes(77 * 64) + 192, dtype=torch.uint8)
    for run, part in zip(values, coded, strict=True):
        part[64:-128] = codec.encode(run)
    out = torch.full((7, 77 * 64), torch.nan, dtype=dtype, device="cuda")
    codec.decode(coded.cuda()[1:4, 64:-128], out[2:5])
    want = torch.full((3, 77 * 64), torch.nan, dtype=dtype)
    codec.decode(coded[1:4, 64:-128], want)
    torch.testing.assert_close(out[2:5].cpu(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-6)
    assert out[:2].isnan().all() and out[5:].isnan().all()


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "granitemoe", "qwen2_moe", "llama"]
)
def test_experts_are_found(family: str) -> None:
    anatomy = Anatomy(tiny_config(family), torch.float32)
    names = {experts.name.rpartition(".")[2] for experts in anatomy.experts if experts is not None}
    assert names == (set() if family == "llama" else {"experts"})
    for layer, experts in enumerate(anatomy.experts):
        stacked = {spec.name for spec in anatomy.layer_specs(layer) if len(spec.shape) == 3}
        apart = {spec.name for spec in anatomy.layer_specs(layer) if spec.num_experts}
        assert stacked <= apart == (experts.parameters if experts is not None else set())
        assert experts is None or experts.per_token == anatomy.config.num_experts_per_tok


def test_experts_that_run_past_the_interface_are_refused(tmp_path: Path) -> None:
    anatomy = Anatomy(config_of("qwen3_moe"), torch.float32)
    experts = anatomy.experts[2]
    assert experts is not None
    module = anatomy.layers[2].get_submodule(experts.name)
    module.forward = lambda hidden, *_: 2 * hidden  # type: ignore[method-assign]
    checkpoint = StateDictCheckpoint(anatomy, model_of("qwen3_moe").state_dict())
    with (
        Executor(anatomy, checkpoint, Policy(), codec=None, device=CPU, disk_tier=None) as executor,
        pytest.raises(UnsupportedModelError, match=r"layer 2 .* experts"),
    ):
        executor.execute(one_sequence())


SPECS = [
    TensorSpec(name="norm", shape=(5,), dtype=torch.bfloat16),
    TensorSpec(name="up", shape=(4, 6, 33), dtype=torch.bfloat16, num_experts=4),
    TensorSpec(name="linear", shape=(6, 70), dtype=torch.bfloat16),
    TensorSpec(name="down", shape=(4, 33, 6), dtype=torch.bfloat16, is_input_first=True, num_experts=4),
    TensorSpec(name="bias", shape=(4, 6), dtype=torch.bfloat16, num_experts=4),
]


@pytest.mark.parametrize("codec", [None, IntegerCodec(4, 32)], ids=["none", "w4"])
def test_an_expert_is_one_run_of_bytes(codec: Codec | None) -> None:
    generator = torch.Generator().manual_seed(0)
    given = {spec.name: torch.randn(spec.shape, generator=generator).to(spec.dtype) for spec in SPECS}
    layout = SlabLayout(SPECS, codec)
    slab = layout.pack(given, device=CPU)

    def unpacked(slab: Tensor) -> dict[str, Tensor]:
        room = torch.zeros(layout.num_coded_values, dtype=torch.bfloat16) if codec is not None else None
        return {name: tensor.clone() for name, tensor in layout.unpack(slab, room).items()}

    whole = unpacked(slab)
    assert {name: tensor.shape for name, tensor in whole.items()} == {spec.name: spec.shape for spec in SPECS}
    torch.testing.assert_close(whole["bias"], given["bias"], rtol=0, atol=0)
    for name in ("up", "down"):
        step = 0.0 if codec is None else 0.5 * float(given[name].amax() - given[name].amin()) / 15 + 0.02
        torch.testing.assert_close(whole[name], given[name], rtol=0, atol=step)
    only = torch.zeros_like(slab)
    only[layout.expert_bytes(range(1, 3))] = slab[layout.expert_bytes(range(1, 3))]
    for name, tensor in unpacked(only).items():
        if name in ("up", "down", "bias"):
            assert torch.equal(tensor[1:3], whole[name][1:3]) and not tensor[[0, 3]].any(), name
        else:
            assert not tensor.any(), name


def test_neighbours_are_runs_without_gaps() -> None:
    assert list(neighbours([])) == []
    assert list(neighbours([3])) == [range(3, 4)]
    assert list(neighbours([0, 1, 2, 5, 7, 8])) == [range(0, 3), range(5, 6), range(7, 9)]


@pytest.mark.parametrize(("num_experts", "per_token", "num_tokens"), [(8, 2, 1), (8, 2, 3), (64, 8, 5), (128, 8, 40)])
def test_the_expected_share_is_that_of_many_draws(num_experts: int, per_token: int, num_tokens: int) -> None:
    rng = random.Random(0)
    draws = [
        len({expert for _ in range(num_tokens) for expert in rng.sample(range(num_experts), per_token)})
        for _ in range(4000)
    ]
    assert chosen_share(num_experts, per_token, num_tokens) == pytest.approx(
        sum(draws) / len(draws) / num_experts, rel=0.02
    )


def test_a_sweep_waits_for_the_choice_while_few_experts_are_expected() -> None:
    assert [tokens for tokens in range(1, 100) if is_by_need(64, 8, tokens)] == list(range(1, 11))
    assert not is_by_need(4, 4, 1), "every expert, always"
    assert chosen_share(8, 2, 4) == pytest.approx(1 - 0.75**4) and 1 - 0.75**4 < BY_NEED_SHARE < 1 - 0.75**5
    assert math.isclose(chosen_share(1, 1, 1), 1.0)
