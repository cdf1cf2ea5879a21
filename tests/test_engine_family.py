"""Families are held against transformers first: right ones pass once, wrong ones are refused with a figure."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from flexeval.engine import family
from flexeval.engine.compute.attention import PackedAttention
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.family import check_family, shrink
from flexeval.errors import UnsupportedModelError


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEXEVAL_CACHE", str(tmp_path))
    return tmp_path


def distort(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let the engine's attention ignore something that a family asks for."""
    right = PackedAttention.__call__

    def wrong(self: PackedAttention, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *rest: Any) -> Tensor:
        return right(self, q, k, v, dataclasses.replace(options, **changes), *rest)

    monkeypatch.setattr(PackedAttention, "__call__", wrong)


def fail(*_: object) -> None:
    raise AssertionError("a model is built")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss", "deepseek_v3"])
def test_a_family_that_is_answered_rightly_passes_once_and_for_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_family(tiny_config(name))
    monkeypatch.setattr(family, "_compare", fail)
    check_family(tiny_config(name))
    check_family(tiny_config(name, num_hidden_layers=7))  # more of the same layers are no other family
    with pytest.raises(AssertionError, match="a model is built"):
        check_family(tiny_config(name, tie_word_embeddings=not tiny_config(name).tie_word_embeddings))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("falcon", "does not let its attention be replaced"),
        ("gpt_neo", "does not let its attention be replaced"),
        ("bloom", "does not attend through transformers' interface"),
        ("qwen3_next", "does not attend through transformers' interface"),
        ("mamba", "not built of attention layers"),
        ("t5", "no decoder-only language model"),
        ("musicgen", "cannot be made small"),
        ("diffllama", "attends outside a sweep, or twice"),
        ("llama4_text", "answered wrongly"),  # scales scores by the place in the row, from 8192 on
        ("mpt", "AttributeError"),
        ("bert", "answered wrongly"),
    ],
)
def test_a_family_that_cannot_be_answered_rightly_is_refused_in_one_line(
    name: str, why: str, empty_cache: Path
) -> None:
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=why) as caught:
            check_family(AutoConfig.for_model(name))
        message = str(caught.value)
        assert name.partition("_")[0] in message.lower() and "Choose" in message
        assert "\n" not in message and len(message) < 400
    assert not list(empty_cache.rglob(f"{name}-*")), "a refusal is not remembered as a success"


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("gpt_oss", {"sinks_N": None}),
        ("gpt_oss", {"window": None}),
        ("mistral", {"window": None}),
        ("gemma2", {"softcap": None}),
        ("granite", {"scale": 0.1}),
    ],
)
def test_a_family_whose_wishes_were_ignored_would_be_refused_with_the_figure(
    name: str, ignored: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    distort(monkeypatch, **ignored)
    with pytest.raises(UnsupportedModelError, match=rf"{name} family would be answered wrongly.*by \d.*0\.0001"):
        check_family(tiny_config(name))
    monkeypatch.undo()
    check_family(tiny_config(name))


@pytest.mark.parametrize("whose", ["the engine's", "transformers'"])
def test_what_differs_only_once_is_told_from_a_family_that_cannot_run(
    whose: str, monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    answer, num_asked = family._answer_both_ways, 0

    def disturbed(config: PretrainedConfig) -> family._Answers:
        nonlocal num_asked
        num_asked += 1
        measured, expected = answer(config)
        if num_asked == 1:
            (measured if whose == "the engine's" else expected)[5] += 2e-4
        return family._Answers(measured, expected)

    monkeypatch.setattr(family, "_answer_both_ways", disturbed)
    with pytest.raises(UnsupportedModelError, match=rf"by 0\.0002 .* by \d\S* when .* again; {whose} have") as caught:
        check_family(tiny_config("llama"))
    assert "Run the same command again" in str(caught.value) and num_asked == 2
    check_family(tiny_config("llama"))


def test_a_configuration_that_makes_no_sense_is_told_from_a_family_that_cannot_run() -> None:
    with pytest.raises(UnsupportedModelError, match=r"transformers makes no model of this.*sulu"):
        check_family(tiny_config("llama", hidden_act="sulu"))


def test_checking_leaves_the_random_stream_and_the_default_type_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check_family(tiny_config("qwen2"))
    assert torch.equal(torch.rand(4), expected)
    assert torch.get_default_dtype() == torch.float32


def published(name: str, **values: Any) -> PretrainedConfig:
    """A configuration of a published size."""
    return AutoConfig.for_model(name, **values)


@pytest.mark.parametrize("name", ["cohere2", "starcoder2", "glm4", "olmoe", "smollm3", "stablelm", "persimmon"])
def test_families_nobody_wrote_code_for_are_answered_rightly(name: str) -> None:
    check_family(published(name))


CONFIGS = {
    "gemma3_text": published("gemma3_text", num_hidden_layers=34),
    "gpt_oss": published("gpt_oss"),
    "deepseek_v3": published("deepseek_v3"),
    "qwen3_moe": published("qwen3_moe"),
    "opt": published(
        "opt", hidden_size=1024, word_embed_proj_dim=512, num_attention_heads=16, do_layer_norm_before=False
    ),
    "llama": published("llama", num_key_value_heads=8),
    "gpt2": published("gpt2"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_shrinking_changes_sizes_and_nothing_else_and_not_the_original(name: str) -> None:
    config = CONFIGS[name]
    before = copy.deepcopy(config.to_dict())
    tiny = shrink(config)
    assert config.to_dict() == before
    assert type(tiny) is type(config)
    flags = {key: value for key, value in before.items() if isinstance(value, bool | str)}
    assert {key: tiny.to_dict()[key] for key in flags} == flags
    assert tiny.num_hidden_layers <= 6 and tiny.vocab_size <= 160
    assert shrink(tiny).to_dict() == tiny.to_dict(), "what is tiny stays as it is"


def test_shrinking_keeps_every_kind_of_layer() -> None:
    gemma = shrink(CONFIGS["gemma3_text"])
    assert gemma.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert gemma.num_hidden_layers == 6 and gemma.sliding_window == 8
    oss = shrink(CONFIGS["gpt_oss"])
    assert oss.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    deepseek = shrink(CONFIGS["deepseek_v3"])
    assert (deepseek.first_k_dense_replace, deepseek.num_hidden_layers) == (1, 3), "one dense layer, then experts"


def test_shrinking_keeps_the_ratio_of_heads_and_their_size() -> None:
    llama = shrink(CONFIGS["llama"])
    assert (llama.num_attention_heads, llama.num_key_value_heads, llama.hidden_size) == (4, 1, 4 * 128)
    opt = shrink(CONFIGS["opt"])
    assert (opt.hidden_size, opt.word_embed_proj_dim) == (4 * 64, 2 * 64), "a projection stays one"
    assert shrink(CONFIGS["gpt2"]).n_embd == 4 * 64
