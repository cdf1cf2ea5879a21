"""The engine gives transformers' answers: for every family, placement, codec and order of work."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import every_pair
from tiny_models import (
    FAMILIES,
    assert_equal_results,
    dequantized,
    ragged_requests,
    tiny_case,
    tiny_config,
    tiny_model,
)

from flexeval.backends.native import Engine
from flexeval.backends.setting_attention import find_key_channels, register_attention
from flexeval.backends.transformers import TransformersBackend, answer
from flexeval.engine.checkpoint import StateDictCheckpoint
from flexeval.engine.codecs.codec import Codec, IntegerCodec
from flexeval.engine.codecs.hqq import HqqCodec
from flexeval.engine.codecs.kv_format import KVCoding
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.executor import Executor
from flexeval.engine.memory.disk import DiskTier
from flexeval.models import ModelSource
from flexeval.policy.policy import Policy, Split
from flexeval.request import Request, TokenRequest, TokenResult

CPU = torch.device("cpu")
SMALL = {"row_tokens": 24, "sweep_tokens": 80, "group_sequences": 2, "num_groups": 2}


def everything(**share: float) -> dict[str, Split]:
    return {kind: Split(**share) for kind in ("weights", "kv", "hidden")}


PLACEMENTS = {
    "cpu": Policy(),
    "cpu-small-rows": Policy(**SMALL),
    "disk": Policy(**everything(disk=1.0), **SMALL),
    "cpu+disk": Policy(
        **everything(cpu=0.5, disk=0.5), row_tokens=30, sweep_tokens=200, group_sequences=4, num_groups=3
    ),
    "kv-on-disk": Policy(kv=Split(disk=1.0), **SMALL),
    "short-logs": Policy(group_sequences=4, num_groups=2, group_tokens=60, row_tokens=24, sweep_tokens=80),
    "short-logs-on-disk": Policy(**everything(disk=1.0), group_sequences=6, group_tokens=100),
    "host-attention": Policy(host_attention=1.0, **SMALL),
    "half-host-attention": Policy(
        **everything(cpu=0.5, disk=0.5), host_attention=0.5, row_tokens=30, group_sequences=3, num_groups=3
    ),
}
GPU_PLACEMENTS = {
    "gpu": Policy(**everything(gpu=1.0), **SMALL),
    "offloaded": Policy(**everything(cpu=1.0), **SMALL),
    "gpu+cpu": Policy(**everything(gpu=0.5, cpu=0.5), **SMALL),
    "short-logs": Policy(**everything(gpu=0.5, cpu=0.5), group_sequences=6, group_tokens=100),
    "gpu+cpu+disk": Policy(**everything(gpu=0.25, cpu=0.25, disk=0.5), **SMALL),
    "disk": Policy(**everything(disk=1.0), **SMALL),
    "host-attention": Policy(**everything(cpu=1.0), host_attention=1.0, **SMALL),
    "half-host-attention": Policy(**everything(gpu=0.25, cpu=0.75), host_attention=0.5, **SMALL),
}


@pytest.fixture(autouse=True)
def spare_in_short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer leaves tokens out that nothing is read off, however few they are."""
    monkeypatch.setattr("flexeval.engine.compute.row.LEAST_SPARED", 1)


def run(
    family: str,
    policy: Policy,
    requests: list[TokenRequest],
    folder: Path,
    *,
    codec: Codec | None = None,
    kv_coding: KVCoding | None = None,
    has_key_channels: bool = False,
    device: torch.device = CPU,
    overlap: bool | None = None,
) -> list[TokenResult]:
    anatomy = Anatomy(tiny_config(family), torch.float32)
    checkpoint = StateDictCheckpoint(anatomy, tiny_model(family).state_dict())
    with Executor(
        anatomy,
        checkpoint,
        policy,
        codec=codec,
        kv_coding=kv_coding,
        device=device,
        disk_tier=DiskTier(folder),
        overlap=overlap,
    ) as executor:
        if has_key_channels:
            executor.find_key_channels()
        return executor.execute(requests)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family: str, placement: str, tmp_path: Path) -> None:
    case = tiny_case(family)
    assert_equal_results(run(family, PLACEMENTS[placement], case.requests, tmp_path), case.expected)


def test_the_last_layer_goes_on_with_needed_tokens_alone() -> None:
    num_tokens = [0, 0]
    anatomy, case = Anatomy(tiny_config("llama"), torch.float32), tiny_case("llama")
    for place in (0, 1):

        def count(module: Any, args: tuple[torch.Tensor], output: Any, place: int = place) -> None:
            num_tokens[place] += args[0].shape[1]

        anatomy.layers[place - 2].mlp.register_forward_hook(count)
    checkpoint = StateDictCheckpoint(anatomy, tiny_model("llama").state_dict())
    requests = [
        TokenRequest(prompt_ids=case.requests[0].prompt_ids[:1] + tuple(range(5, 30)), max_tokens=1),
        TokenRequest(prompt_ids=tuple(range(40, 90)), max_tokens=0, score_prompt=True),
        TokenRequest(prompt_ids=tuple(range(90, 120)), max_tokens=1),
    ]
    with Executor(anatomy, checkpoint, Policy(row_tokens=50), codec=None, device=CPU, disk_tier=None) as executor:
        executor.execute(requests)
    assert num_tokens == [26 + 49 + 30, 1 + 49 + 1]  # nothing follows the last of 50


@pytest.mark.gpu
@pytest.mark.parametrize("placement", GPU_PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_on_gpu(family: str, placement: str, tmp_path: Path) -> None:
    case = tiny_case(family)
    device = torch.device("cuda", 0)
    measured = run(family, GPU_PLACEMENTS[placement], case.requests, tmp_path, device=device)
    assert_equal_results(measured, case.expected)


W8, W4, W4_HQQ = IntegerCodec(8, 32), IntegerCodec(4, 32), HqqCodec(4, 32)
WEIGHT_CASES = [
    *((family, W4) for family in ("llama", "gpt2", "mixtral", "gpt_oss")),
    *((family, W8) for family in ("llama", "gpt_oss")),
    *((family, W4_HQQ) for family in ("llama", "mixtral")),
]


def name_of(value: Any) -> str:
    return str(getattr(value, "name", value))


def in_every_place(cases: list[tuple[str, Any]]) -> list[tuple[str, Any, str]]:
    return [(*case, placement) for case in cases for placement in PLACEMENTS]


@every_pair("family,codec,placement", in_every_place(WEIGHT_CASES), ids=name_of, apart_from=("family", "placement"))
def test_coded_weights_equal_transformers_on_dequantized_weights(
    family: str, codec: Codec, placement: str, tmp_path: Path
) -> None:
    check_weights(family, codec, PLACEMENTS[placement], tmp_path, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "codec"), [("opt", W4), *WEIGHT_CASES], ids=name_of)
@pytest.mark.parametrize("placement", GPU_PLACEMENTS)
def test_coded_weights_equal_transformers_on_dequantized_weights_on_gpu(
    family: str, codec: Codec, placement: str, tmp_path: Path
) -> None:
    """Rows of few tokens multiply matrices of 4 bits as they rest, others unpack them."""
    check_weights(family, codec, GPU_PLACEMENTS[placement], tmp_path, torch.device("cuda", 0))


@cache
def answers_on_coded_weights(family: str, codec: Codec) -> list[TokenResult]:
    model = dequantized(tiny_model(family), codec)
    return [answer(model, request) for request in ragged_requests()]


def check_weights(family: str, codec: Codec, policy: Policy, folder: Path, device: torch.device) -> None:
    expected = answers_on_coded_weights(family, codec)
    measured = run(family, policy, ragged_requests(), folder, codec=codec, device=device)
    assert_equal_results(measured, expected)
    assert [r.logprobs for r in expected] != [r.logprobs for r in tiny_case(family).expected], (
        "the codec changed nothing"
    )


KV_CASES = [*((family, 4) for family in FAMILIES), ("llama", 8), ("llama", 2), ("gpt_oss", 2)]


@every_pair("family,bits,placement", in_every_place(KV_CASES), apart_from=("family", "placement"))
def test_coded_kv_equals_transformers_on_coded_kv(family: str, bits: int, placement: str, tmp_path: Path) -> None:
    check_kv(family, PLACEMENTS[placement], KVCoding(bits, 64), tmp_path, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "bits"), KV_CASES)
@pytest.mark.parametrize("placement", GPU_PLACEMENTS)
def test_coded_kv_equals_transformers_on_coded_kv_on_gpu(
    family: str, bits: int, placement: str, tmp_path: Path
) -> None:
    check_kv(family, GPU_PLACEMENTS[placement], KVCoding(bits, 64), tmp_path, torch.device("cuda", 0))


CHANNEL_CASES = [("opt", 4), ("llama", 2), ("gemma2", 4), ("gpt_oss", 4), ("deepseek_v3", 4)]
"""Plain, with fewer KV heads, capped, with sinks, with keys and values of unequal sizes."""


@every_pair("family,bits,placement", in_every_place(CHANNEL_CASES), apart_from=("family", "placement"))
def test_keys_by_channel_equal_transformers_on_such_keys(
    family: str, bits: int, placement: str, tmp_path: Path
) -> None:
    check_kv(family, PLACEMENTS[placement], KVCoding(bits, 64), tmp_path, CPU, has_key_channels=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "bits"), CHANNEL_CASES)
@pytest.mark.parametrize("placement", GPU_PLACEMENTS)
def test_keys_by_channel_equal_transformers_on_such_keys_on_gpu(
    family: str, bits: int, placement: str, tmp_path: Path
) -> None:
    device = torch.device("cuda", 0)
    check_kv(family, GPU_PLACEMENTS[placement], KVCoding(bits, 64), tmp_path, device, has_key_channels=True)


@cache
def answers_on_coded_kv(family: str, coding: KVCoding, has_key_channels: bool) -> list[TokenResult]:
    model = copy.deepcopy(tiny_model(family))
    model.set_attn_implementation(register_attention(coding, None, has_key_channels=has_key_channels))
    if has_key_channels:
        find_key_channels(model, Anatomy(tiny_config(family), torch.float32).context_length)
    return [answer(model, request) for request in tiny_case(family).requests]


def check_kv(
    family: str,
    policy: Policy,
    coding: KVCoding,
    folder: Path,
    device: torch.device,
    *,
    has_key_channels: bool = False,
) -> None:
    """Prompts that are only scored see coded keys and values as well.

    A number in a hundred thousand lies so near the edge between two codes that float32's rounding decides, and a router
    may choose another expert then; so what differs is held against what coding does.
    """
    expected, plain = answers_on_coded_kv(family, coding, has_key_channels), tiny_case(family).expected
    measured = run(
        family,
        policy,
        tiny_case(family).requests,
        folder,
        kv_coding=coding,
        has_key_channels=has_key_channels,
        device=device,
    )
    assert [result.token_ids for result in measured] == [result.token_ids for result in expected]
    difference = prompt_logprobs(measured) - prompt_logprobs(expected)
    effect = prompt_logprobs(expected) - prompt_logprobs(plain)
    share = 0.1 if coding.bits == 8 else 0.02 if device == CPU else 0.05
    assert difference.norm() < share * effect.norm()


def prompt_logprobs(results: list[TokenResult]) -> torch.Tensor:
    return torch.tensor([logprob for result in results for logprob in result.prompt_logprobs])


@pytest.mark.parametrize("placement", ["cpu+disk", "host-attention", "half-host-attention"])
def test_overlap_changes_nothing(placement: str, tmp_path: Path) -> None:
    requests = tiny_case("llama").requests
    inline = run("llama", PLACEMENTS[placement], requests, tmp_path, overlap=False)
    threads = run("llama", PLACEMENTS[placement], requests, tmp_path, overlap=True)
    plain = [dataclasses.replace(result, elapsed_s=0.0) for result in inline]
    assert plain == [dataclasses.replace(result, elapsed_s=0.0) for result in threads]


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("family", ["opt", "llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_the_cpu_attends_in_parts_too(
    family: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts here are short: cut in parts nevertheless, all ways through the CPU's attention are taken."""
    monkeypatch.setattr("flexeval.engine.compute.host_plan.MIN_PART_TOKENS", 4)
    monkeypatch.setattr("flexeval.engine.compute.host_plan.PIECES_PER_THREAD", 40)
    policy = Policy(host_attention=share, row_tokens=40, group_sequences=2, num_groups=3)
    case = tiny_case(family)
    assert_equal_results(run(family, policy, case.requests, tmp_path, overlap=True), case.expected)


def test_stops_at_end_of_text_and_at_stop_sequences(tmp_path: Path) -> None:
    free = tiny_case("llama").expected[1]
    asked = tiny_case("llama").requests[1]
    third = free.token_ids[2]
    at_eos = dataclasses.replace(asked, eos_ids=frozenset({third}))
    at_stop = dataclasses.replace(asked, is_stopped=lambda ids: third in ids)
    end = free.token_ids.index(third) + 1
    for request, reason in ((at_eos, "endoftext"), (at_stop, "stop")):
        (result,) = run("llama", Policy(), [request], tmp_path)
        assert (result.token_ids, result.finish_reason) == (free.token_ids[:end], reason)


def test_samples_depend_on_the_request_alone(tmp_path: Path) -> None:
    hot = [
        dataclasses.replace(request, temperature=1.5, top_p=0.9, seed=index)
        for index, request in enumerate(tiny_case("qwen2").requests)
    ]
    together = run("qwen2", PLACEMENTS["cpu-small-rows"], hot, tmp_path)
    expected = [answer(tiny_model("qwen2"), request) for request in hot]
    assert_equal_results(together, expected)
    greedy = tiny_case("qwen2").expected
    assert [r.token_ids for r in together] != [r.token_ids for r in greedy]


@pytest.mark.parametrize("setting", ["none", "w4"])
def test_smollm2_equals_transformers(smollm2: ModelSource, setting: str) -> None:
    header = "Answer the questions.\n\n" + "Question: What is two and two?\nA. 4\nB. 5\nAnswer: A\n\n" * 3
    requests = [
        *(Request(prompt=f"{header}Question: What is {n} and {n}?\nAnswer:", max_tokens=1) for n in range(3)),
        *(Request(prompt=f"Count on: {n}, {n + 1},", max_tokens=9, stop=("\n",), top_logprobs=2) for n in range(2)),
        Request(prompt="The capital of France is Paris, naïve 東京.", max_tokens=0, echo=True),
        Request(prompt="Once upon a time", max_tokens=8, temperature=0.8, num_completions=2, seed=3),
    ]
    with Engine.load(smollm2, setting=setting, dtype="float32", device="cpu") as engine:
        measured = engine.generate(requests)
    expected = TransformersBackend(smollm2, setting=setting, dtype="float32", device="cpu").generate(requests)
    for got, want in zip(measured, expected, strict=True):
        for one, other in zip((got, *got.alternatives), (want, *want.alternatives), strict=True):
            assert (one.text, one.token_ids, one.tokens) == (other.text, other.token_ids, other.tokens)
            assert one.finish_reason == other.finish_reason
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
