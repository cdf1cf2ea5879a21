"""Tiny random models of many families, and what transformers itself says of them."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from flexeval.backends.transformers import answer
from flexeval.engine.codecs.codec import Codec
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.memory.slab import SlabLayout
from flexeval.request import TokenRequest, TokenResult

VOCAB_SIZE = 200
NUM_KEPT = 4
"""Most probable tokens that requests keep, and as many others."""
_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLP = {"intermediate_size": 128}
_GQA = {"num_key_value_heads": 2, **_MLP}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "init_std": 0.15},
    "llama": _GQA,
    "qwen2": _GQA,
    "qwen3": {**_GQA, "head_dim": 16},
    "mistral": {**_GQA, "head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"num_key_value_heads": 1, **_MLP, "head_dim": 16, "sliding_window": 8},
    "gpt2": {"n_inner": 128},
    "gpt_neox": _MLP,
    "phi3": {**_GQA, "pad_token_id": 0},
    "mixtral": {**_GQA, "num_local_experts": 4},
    "qwen3_moe": {**_GQA, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "olmo2": _MLP,
    # beyond the first twelve: sinks, soft caps, latent attention, multipliers
    "gpt_oss": {**_GQA, "head_dim": 16, "num_local_experts": 4, "sliding_window": 8},
    "gemma2": {**_GQA, "head_dim": 16, "sliding_window": 8},
    "granite": _GQA,
    "deepseek_v3": {
        **_MLP,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "first_k_dense_replace": 1,
    },
}


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model(family, **(_BASE | FAMILIES.get(family, {}) | changes))


@cache
def tiny_model(family: str) -> PreTrainedModel:
    """A random model of a family, as transformers runs it."""
    torch.manual_seed(0)
    config = copy.deepcopy(tiny_config(family))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


class Case(NamedTuple):
    requests: list[TokenRequest]
    expected: list[TokenResult]


def ragged_requests(*, num_steps: int = 9) -> list[TokenRequest]:
    """Prompts of 1 to 80 tokens, alone and under shared headers, that score, generate, or do both."""
    rng = random.Random(1)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(5, VOCAB_SIZE) for _ in range(count)]

    header = tokens(40)
    longer = header + tokens(35)
    prompts = [
        header + tokens(7),
        header + tokens(11),
        longer + tokens(5),
        longer + tokens(9),
        longer,
        tokens(3),
        tokens(50),
        tokens(1),
        header + tokens(20),
    ]
    max_tokens = (0, num_steps, 4, 1)
    return [
        TokenRequest(
            prompt_ids=tuple(prompt),
            max_tokens=max_tokens[index % 4],
            score_prompt=index % 2 == 0,
            num_top_logprobs=3,
            keep_top=NUM_KEPT,
        )
        for index, prompt in enumerate(prompts)
    ]


@cache
def tiny_case(family: str) -> Case:
    """Requests and transformers' own answers."""
    requests = ragged_requests()
    return Case(requests, [answer(tiny_model(family), request) for request in requests])


def assert_equal_results(measured: list[TokenResult], expected: list[TokenResult], *, tolerance: float = 1e-4) -> None:
    """Same tokens, same reasons, log-probabilities within `tolerance`."""
    assert len(measured) == len(expected)
    for index, (got, want) in enumerate(zip(measured, expected, strict=True)):
        assert got.token_ids == want.token_ids, index
        assert got.finish_reason == want.finish_reason, index
        torch.testing.assert_close(torch.tensor(got.logprobs), torch.tensor(want.logprobs), atol=tolerance, rtol=0)
        torch.testing.assert_close(
            torch.tensor(got.prompt_logprobs), torch.tensor(want.prompt_logprobs), atol=tolerance, rtol=0
        )
        for got_top, want_top in zip(
            (*got.top_logprobs, *got.prompt_top_logprobs), (*want.top_logprobs, *want.prompt_top_logprobs), strict=True
        ):
            assert [logprob for _, logprob in got_top] == [
                logprob if abs(logprob - other) > tolerance else other
                for (_, logprob), (_, other) in zip(want_top, got_top, strict=True)
            ], index
    assert_equal_kept(measured, expected, tolerance=tolerance)


def assert_equal_kept(measured: list[TokenResult], expected: list[TokenResult], *, tolerance: float) -> None:
    """The same most probable tokens, sample and threshold at every position, but for a near tie in a hundred."""
    num_same = num_all = 0
    for got, want in zip(measured, expected, strict=True):
        assert (got.kept is None) == (want.kept is None)
        if got.kept is not None and want.kept is not None:
            assert got.kept.token_ids_NC.shape == want.kept.token_ids_NC.shape
            is_same = got.kept.token_ids_NC == want.kept.token_ids_NC
            assert np.abs(got.kept.logprobs_NC - want.kept.logprobs_NC)[is_same].max(initial=0) < tolerance
            num_same, num_all = num_same + is_same.sum(), num_all + is_same.size
    assert num_same >= 0.99 * num_all


def dequantized(model: PreTrainedModel, codec: Codec) -> PreTrainedModel:
    """The model with the weights that come back from a codec."""
    anatomy = Anatomy(model.config, torch.float32)
    state = dict(model.state_dict())
    for layer in range(anatomy.num_layers):
        layout = SlabLayout(anatomy.layer_specs(layer), codec)
        prefix = f"{anatomy.layers_name}.{layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        slab = layout.pack(own, device=torch.device("cpu"))
        unpacked = layout.unpack(slab, torch.empty(layout.num_coded_values))
        state |= {prefix + name: tensor.clone() for name, tensor in unpacked.items()}
    lossy = type(model)(copy.deepcopy(model.config)).eval()
    lossy.load_state_dict(state)
    return lossy
