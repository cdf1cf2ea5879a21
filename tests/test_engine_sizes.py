"""The sizes a policy is chosen from are the sizes that the engine really takes up; workloads are counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config, tiny_model

from flexeval.engine.checkpoint import StateDictCheckpoint
from flexeval.engine.codecs.codec import Codec, IntegerCodec
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.executor import Executor
from flexeval.engine.memory.disk import DiskTier
from flexeval.engine.memory.slab import SlabLayout
from flexeval.engine.sizes import measure_workload, model_shape
from flexeval.policy.policy import Policy, Split
from flexeval.policy.work import MOST_CLASSES, SizeClass, Workload, classify
from flexeval.request import TokenRequest

CPU = torch.device("cpu")
every_family = pytest.mark.parametrize("family", ["opt", "llama", "gemma3_text", "gpt2", "mixtral", "deepseek_v3"])


@every_family
@pytest.mark.parametrize("codec", [None, IntegerCodec(4, 32)], ids=["none", "w4"])
def test_layer_bytes_are_those_of_the_real_slabs(family: str, codec: Codec | None) -> None:
    anatomy = Anatomy(tiny_config(family), torch.float32)
    checkpoint = StateDictCheckpoint(anatomy, tiny_model(family).state_dict())

    def largest(codec: Codec | None) -> int:
        layers = range(anatomy.num_layers)
        layouts = [SlabLayout(anatomy.layer_specs(layer), codec) for layer in layers]
        return max(layouts[layer].pack(checkpoint.layer(layer), device=CPU).numel() for layer in layers)

    shape = model_shape(anatomy, codec, CPU)
    assert shape.layer_bytes == largest(codec)
    assert shape.layer_compute_bytes == largest(None)
    assert shape.is_packed == (codec is not None)


@every_family
def test_resident_bytes_are_those_of_everything_but_the_layers_tied_tensors_once(family: str) -> None:
    model, anatomy = tiny_model(family), Anatomy(tiny_config(family), torch.float32)
    rest = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for name, tensor in model.state_dict().items()
        if not name.startswith(anatomy.layers_name)
    }
    assert model_shape(anatomy, None, CPU).resident_bytes == sum(rest.values())


@every_family
def test_kv_and_hidden_bytes_are_those_that_the_stores_take(family: str, tmp_path: Path) -> None:
    anatomy = Anatomy(tiny_config(family), torch.float32)
    shape = model_shape(anatomy, None, CPU)
    checkpoint = StateDictCheckpoint(anatomy, tiny_model(family).state_dict())

    def disk_bytes(policy: Policy, requests: list[TokenRequest]) -> int:
        disk = DiskTier(tmp_path)
        with Executor(anatomy, checkpoint, policy, codec=None, device=CPU, disk_tier=disk) as executor:
            executor.execute(requests)
        return disk.peak_bytes

    generating = TokenRequest(prompt_ids=tuple(range(5, 25)), max_tokens=6)
    num_tokens = 20 + 6 - 1  # the last token drawn is never computed
    in_cache = disk_bytes(Policy(kv=Split(disk=1.0)), [generating])
    assert in_cache == shape.num_layers * num_tokens * shape.kv_bytes_per_token
    scoring = [TokenRequest(prompt_ids=(first, *range(5, 15)), max_tokens=1) for first in (3, 4)]
    between_layers = disk_bytes(Policy(hidden=Split(disk=1.0), row_tokens=11), scoring)
    assert between_layers == 2 * 11 * shape.hidden_bytes_per_token


def test_only_active_experts_count_as_parameters_that_a_token_meets() -> None:
    dense = model_shape(Anatomy(tiny_config("llama"), torch.float32), None, CPU)
    attention = 64 * 64 * 2 + 64 * 32 * 2
    assert dense.layer_params == attention + 3 * 64 * 128
    mixtral = model_shape(Anatomy(tiny_config("mixtral"), torch.float32), None, CPU)
    assert mixtral.layer_params == attention + 4 * 64 + 2 * 3 * 64 * 128, "two experts of four, and the router"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_steps_are_recorded_but_for_requests_that_are_kept_apart(family: str) -> None:
    anatomy = Anatomy(tiny_config(family), torch.float32)
    assert model_shape(anatomy, None, CPU).is_recordable
    assert not model_shape(anatomy, None, CPU, is_apart=True).is_recordable


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_codec_leaves_routers_as_they_are(family: str) -> None:
    anatomy = Anatomy(tiny_config(family), torch.float32)
    layout = SlabLayout(anatomy.layer_specs(2), IntegerCodec(4, 32))
    matrices = {spec.name for spec in anatomy.layer_specs(2) if len(spec.shape) >= 2 and "bias" not in spec.name}
    assert matrices - layout.coded_names == {"mlp.router.weight" if family == "gpt_oss" else "mlp.gate.weight"}


def test_types_scale_everything() -> None:
    full, half = (
        model_shape(Anatomy(tiny_config("llama"), dtype), None, CPU) for dtype in (torch.float32, torch.bfloat16)
    )
    for name in ("layer_bytes", "resident_bytes", "kv_bytes_per_token", "hidden_bytes_per_token", "dtype_bytes"):
        assert getattr(full, name) == 2 * getattr(half, name), name


def tokens(first: int, length: int) -> tuple[int, ...]:
    return tuple(range(first, first + length))


HEADER = tokens(0, 40)
WORKLOADS = {
    "mixed": (
        [
            TokenRequest(prompt_ids=HEADER + tokens(100, 5), max_tokens=4),
            TokenRequest(prompt_ids=HEADER + tokens(200, 7), max_tokens=10),
            TokenRequest(prompt_ids=HEADER + tokens(300, 6), max_tokens=1),
            TokenRequest(prompt_ids=tokens(400, 50), max_tokens=0, score_prompt=True),
            TokenRequest(prompt_ids=tokens(500, 3), max_tokens=1),
        ],
        Workload(
            num_sequences=5,
            num_scoring_sequences=3,
            num_prompt_tokens=40 + 5 + 7 + 6 + 49 + 3,  # nothing follows the last of 50 tokens that are only scored
            num_scoring_tokens=6 + 49 + 3,
            num_shared_tokens=40,
            max_prompt_tokens=49,
            max_own_tokens=7 + 10,
            mean_context_tokens=(45 + 47 + 46 + 49 + 3) / 5,
            num_generated_tokens=4 + 10,
            max_generated_tokens=10,
            num_prompt_pairs=40 * 40 + 5 * 45 + 7 * 47 + 6 * 46 + 49 * 49 + 3 * 3,
            num_hidden_pairs=40 * 39 // 2 + 5 * 4 // 2 + 7 * 6 // 2 + 6 * 5 // 2 + 49 * 48 // 2 + 3 * 2 // 2,
            num_prompt_parts=40 + 2 * (5 + 7 + 6) + 49 + 3,
            num_logits_rows=4 + 50,
            max_logits_rows=5 + 50,
            size_classes=(SizeClass(9, 1, 3), SizeClass(17, 1, 9)),
        ),
    ),
    "a-header-that-is-a-prompt-itself": (
        [
            TokenRequest(prompt_ids=HEADER, max_tokens=8),
            TokenRequest(prompt_ids=HEADER + tokens(100, 10), max_tokens=0, score_prompt=True),
        ],
        Workload(
            num_sequences=2,
            num_scoring_sequences=1,
            num_prompt_tokens=49,
            num_scoring_tokens=9,
            num_shared_tokens=40,
            max_prompt_tokens=40,
            max_own_tokens=8,
            mean_context_tokens=(40 + 49) / 2,
            num_generated_tokens=8,
            max_generated_tokens=8,
            num_prompt_pairs=40 * 40 + 9 * 49,
            num_hidden_pairs=40 * 39 // 2 + 9 * 8 // 2,
            num_prompt_parts=40 + 2 * 9,
            num_logits_rows=1 + 50,
            max_logits_rows=2 + 50,
            size_classes=(SizeClass(8, 1, 7),),
        ),
    ),
    "equal-prompts": (
        [TokenRequest(prompt_ids=tokens(0, 20), max_tokens=5, temperature=1.0, seed=seed) for seed in (0, 1, 2, 2)],
        Workload(
            num_sequences=3,
            num_scoring_sequences=0,
            num_prompt_tokens=20,
            num_scoring_tokens=0,
            num_shared_tokens=20,
            max_prompt_tokens=20,
            max_own_tokens=5,
            mean_context_tokens=20,
            num_generated_tokens=15,
            max_generated_tokens=5,
            num_prompt_pairs=20 * 20,
            num_hidden_pairs=20 * 19 // 2,
            num_prompt_parts=20,
            num_logits_rows=3,
            max_logits_rows=3,
            size_classes=(SizeClass(5, 3, 12),),
        ),
    ),
    "a-header-that-only-scoring-prompts-share": (
        [TokenRequest(prompt_ids=HEADER + tokens(100 * n, 2), max_tokens=1) for n in (1, 2)],
        Workload(
            num_sequences=2,
            num_scoring_sequences=2,
            num_prompt_tokens=44,
            num_scoring_tokens=44,
            num_shared_tokens=40,
            max_prompt_tokens=40,
            max_own_tokens=0,
            mean_context_tokens=42,
            num_generated_tokens=0,
            max_generated_tokens=1,
            num_prompt_pairs=40 * 40 + 2 * 2 * 42,
            num_hidden_pairs=40 * 39 // 2 + 2 * 1 // 2 + 2 * 1 // 2,
            num_prompt_parts=40 + 2 * 4,
            num_logits_rows=2,
            max_logits_rows=2,
        ),
    ),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_counted_as_by_hand(name: str) -> None:
    requests, expected = WORKLOADS[name]
    assert measure_workload(requests) == expected
    assert measure_workload(requests[::-1]) == expected


def test_sequences_are_told_apart_by_size_in_classes_of_as_many_steps() -> None:
    assert classify([]) == ()
    assert classify([(5, 2), (5, 3)]) == (SizeClass(5, 2, 5),), "equal sizes stay together"
    classes = classify([(100 * size, size) for size in range(1, 65)])
    assert 6 <= len(classes) <= MOST_CLASSES
    assert (sum(c.num_sequences for c in classes), sum(c.num_steps for c in classes)) == (64, 65 * 32)
    assert [c.num_tokens for c in classes] == sorted(c.num_tokens for c in classes) and classes[-1].num_tokens == 6400
    assert max(c.num_steps for c in classes) < 1.5 * 65 * 32 / MOST_CLASSES


def test_the_feed_forward_width_is_that_of_all_experts_that_a_token_passes() -> None:
    opt, llama, mixtral, deepseek = (tiny_config(name) for name in ("opt", "llama", "mixtral", "deepseek_v3"))
    expected = [
        (opt, opt.ffn_dim),
        (llama, llama.intermediate_size),
        (mixtral, mixtral.intermediate_size * mixtral.num_experts_per_tok),
        (deepseek, max(deepseek.intermediate_size, deepseek.moe_intermediate_size * deepseek.num_experts_per_tok)),
    ]
    for config, width in expected:
        assert model_shape(Anatomy(config, torch.float32), None, CPU).intermediate_size == width, config.model_type
