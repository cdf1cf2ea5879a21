"""Wrong answers are refused, not discovered: before a model runs, a tiny one of its kind is held against transformers.

Knows how to shrink a model's configuration without losing what makes its family special; not how to run the real one.
"""

from __future__ import annotations

import copy
import hashlib
import json
from math import inf, isfinite
from typing import NamedTuple

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import flexeval
from flexeval.cache import cached_directory
from flexeval.engine.checkpoint import StateDictCheckpoint
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.building import OTHER_FAMILY
from flexeval.engine.executor import Executor
from flexeval.errors import UnsupportedModelError
from flexeval.policy.policy import Policy
from flexeval.request import TokenRequest

TOLERANCE = 1e-4
"""Largest difference of a log-probability in float32."""
_MAX_LAYERS = 6
_LIMITS = {
    "vocab_size": 160,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "sliding_window": 8,
    "floor_scale": 8,  # as a window: positions from which on scores are scaled (Llama 4)
    "attn_logit_softcapping": 0.25,  # low enough that a tiny model's scores feel it
    "initializer_range": 0.05,
    "init_std": 0.05,
}


def check_family(config: PretrainedConfig) -> None:
    """Refuse a model whose family the engine would answer wrongly; a family found right is not checked again.

    Raises:
        UnsupportedModelError: With the difference that was measured.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _refusal(config, "transformers has no decoder-only language model of it")
    try:
        tiny = shrink(config)
    except UnsupportedModelError:
        raise
    except Exception as error:  # sizes of its own kind
        why = str(error).partition(". ")[0]
        raise _refusal(config, f"its configuration cannot be made small to be checked: {why}") from error
    versions = (flexeval.__version__, torch.__version__, transformers.__version__)
    key = hashlib.sha256(json.dumps([versions, tiny.to_dict()], sort_keys=True, default=str).encode()).hexdigest()
    cached_directory("families", f"{config.model_type}-{key[:24]}", lambda _: _compare(tiny))


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a tiny model of the same class and flags: fewer, smaller layers of every kind it has.

    Raises:
        UnsupportedModelError: Its layers have no attention heads.
    """
    if not hasattr(config.get_text_config(), "num_attention_heads"):
        raise _refusal(config, "it is not built of attention layers")
    tiny = first_layers(config, layers_of_every_kind(config))
    text = tiny.get_text_config()
    for name, limit in _LIMITS.items():
        value = getattr(text, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            setattr(text, name, limit if isinstance(limit, float) else min(value, limit))
    _shrink_heads(text)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(token := getattr(text, name, None), int):
            setattr(text, name, token % text.vocab_size)
        elif isinstance(token, list):
            setattr(text, name, [one % text.vocab_size for one in token])
    if not getattr(text, "rope_parameters", None):  # learned positions: a table of them
        text.max_position_embeddings = min(getattr(text, "max_position_embeddings", 256), 256)
    return tiny


def first_layers(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The configuration of a model of just the first layers of another."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == text.num_hidden_layers:
            setattr(text, name, type(value)(value[:num_layers]))
    text.num_hidden_layers = num_layers
    return short


def layers_of_every_kind(config: PretrainedConfig) -> int:
    """How many leading layers hold every kind of layer that a model names, three at least."""
    text = config.get_text_config()
    keep = max(3, min(getattr(text, "first_k_dense_replace", None) or 0, 1) + 1)
    for value in vars(text).values():
        if isinstance(value, list | tuple) and len(value) == text.num_hidden_layers:
            kinds = [str(kind) for kind in value]
            keep = max([keep, *(kinds.index(kind) + 1 for kind in set(kinds))])
    return min(keep, _MAX_LAYERS, int(text.num_hidden_layers))


def _shrink_heads(text: PretrainedConfig) -> None:
    """Four query heads at most, as many to a KV head as in the model, each of its own size."""
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None)
    hidden_size = text.hidden_size
    head_size = getattr(text, "head_dim", None) or hidden_size // heads
    new_heads = min(heads, 4)
    if isinstance(kv_heads, int):
        new_kv_heads = max(1, new_heads * kv_heads // heads)
        text.num_key_value_heads = new_kv_heads
        new_heads = new_kv_heads * max(1, new_heads // new_kv_heads)
    text.num_attention_heads = new_heads
    text.hidden_size = new_heads * head_size
    if isinstance(projection := getattr(text, "word_embed_proj_dim", None), int):
        text.word_embed_proj_dim = text.hidden_size if projection == hidden_size else text.hidden_size // 2


class _Answers(NamedTuple):
    """Log-probabilities of a tiny model's tokens."""

    measured: list[float]
    """By the engine."""
    expected: list[float]
    """By transformers."""

    @property
    def difference(self) -> float:
        """The largest; infinite where a number is none."""
        pairs = zip(self.measured, self.expected, strict=True)
        return max(abs(a - b) if isfinite(a - b) else inf for a, b in pairs)


def _compare(config: PretrainedConfig) -> None:
    """Hold the tiny model's answers against each other, twice where they differ. Raises `UnsupportedModelError`."""
    found = _answer_both_ways(config)
    if found.difference <= TOLERANCE:
        return
    by = f"log-probabilities differ from transformers' by {found.difference:.2g} (at most {TOLERANCE:g} is right)"
    again = _answer_both_ways(config)
    if again.difference > TOLERANCE:
        raise UnsupportedModelError(
            f"the {config.model_type} family would be answered wrongly: {by}", mend=OTHER_FAMILY
        )
    whose = "transformers'" if again.measured == found.measured else "the engine's"
    raise UnsupportedModelError(
        f"this machine does not compute the same twice: of a tiny model of the {config.model_type} family {by}, "
        f"and by {again.difference:.2g} when they are computed again; {whose} have changed",
        mend="Run the same command again, and report this line",
    )


def _answer_both_ways(config: PretrainedConfig) -> _Answers:
    """Run the tiny model. Raises `UnsupportedModelError`."""
    rng_state = torch.get_rng_state()
    answers = _Answers([], [])
    try:
        torch.manual_seed(0)
        oracle = _oracle(config)
        requests = _requests(config.get_text_config().vocab_size)
        anatomy = Anatomy(config, torch.float32)
        for policy in (Policy(), Policy(row_tokens=24, sweep_tokens=64, group_sequences=2, num_groups=2)):
            checkpoint = StateDictCheckpoint(anatomy, oracle.state_dict())
            with Executor(
                anatomy, checkpoint, policy, codec=None, device=torch.device("cpu"), disk_tier=None
            ) as executor:
                results = executor.execute(requests)
            for request, result in zip(requests, results, strict=True):
                answers.measured.extend([*result.prompt_logprobs[1:], *result.logprobs])
                answers.expected.extend(_oracle_logprobs(oracle, [*request.prompt_ids, *result.token_ids]))
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a family trips over, it cannot be trusted
        raise _refusal(config, f"a tiny model of it ends in {type(error).__name__}: {error}") from error
    finally:
        torch.set_rng_state(rng_state)
    return answers


def _oracle(config: PretrainedConfig) -> PreTrainedModel:
    try:
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager"
        )
    except Exception as error:
        why = f"transformers makes no model of this configuration: {type(error).__name__}: {error}"
        raise _refusal(config, why) from error
    return model.eval()  # type: ignore[no-any-return]


def _refusal(config: PretrainedConfig, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the {config.model_type} family cannot run here: {why}", mend=OTHER_FAMILY)


def _requests(vocab_size: int) -> list[TokenRequest]:
    """Ragged prompts, some with a shared header, that score and generate past a window of attention."""
    tokens = torch.randint(3, vocab_size, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    header = tokens[:40]
    prompts = [header + tokens[40:47], header + tokens[50:63], tokens[70:73], tokens[80:115], header + tokens[120:121]]
    return [
        TokenRequest(prompt_ids=tuple(prompt), max_tokens=3 + index, score_prompt=True)
        for index, prompt in enumerate(prompts)
    ]


@torch.inference_mode()
def _oracle_logprobs(model: PreTrainedModel, token_ids: list[int]) -> list[float]:
    """Log-probability of each token but the first, given those before it."""
    logits_TV = model(torch.tensor([token_ids])).logits[0].float()
    logprobs_TV = logits_TV[:-1].log_softmax(-1)
    return logprobs_TV[torch.arange(len(token_ids) - 1), torch.tensor(token_ids[1:])].tolist()  # type: ignore[no-any-return]
