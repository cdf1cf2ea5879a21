"""Dimensions of published models, as the keyword arguments of their Hugging Face configuration. Data, and nothing else.

Sources: the `config.json` of each model; a test compares the number of parameters with the published one.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]
"""What a `config.json` holds."""


def _opt(num_layers: int, hidden_size: int, num_heads: int) -> Config:
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": 50272,
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "word_embed_proj_dim": hidden_size,
        "num_attention_heads": num_heads,
        "ffn_dim": 4 * hidden_size,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "float16",
    }


def _llama_2(num_layers: int, hidden_size: int, num_heads: int, num_kv_heads: int, intermediate_size: int) -> Config:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "dtype": "float16",
    }


def _llama_3(num_layers: int, hidden_size: int, num_heads: int, num_kv_heads: int, intermediate_size: int) -> Config:
    return _llama_2(num_layers, hidden_size, num_heads, num_kv_heads, intermediate_size) | {
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "dtype": "bfloat16",
    }


def _qwen_2_5(
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    *,
    vocab_size: int = 152064,
    tied: bool = False,
) -> Config:
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": vocab_size,
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }


def _qwen_3(
    num_layers: int, hidden_size: int, num_heads: int, num_kv_heads: int, intermediate_size: int, *, tied: bool = False
) -> Config:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": 128,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }


PRESETS: dict[str, Config] = {
    "opt-125m": _opt(12, 768, 12),
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-2.7b": _opt(32, 2560, 32),
    "opt-6.7b": _opt(32, 4096, 32),
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
    "opt-175b": _opt(96, 12288, 96),
    "llama-2-7b": _llama_2(32, 4096, 32, 32, 11008),
    "llama-2-13b": _llama_2(40, 5120, 40, 40, 13824),
    "llama-2-70b": _llama_2(80, 8192, 64, 8, 28672),
    "llama-3-8b": _llama_3(32, 4096, 32, 8, 14336),
    "llama-3-70b": _llama_3(80, 8192, 64, 8, 28672),
    "qwen2.5-0.5b": _qwen_2_5(24, 896, 14, 2, 4864, vocab_size=151936, tied=True),
    "qwen2.5-1.5b": _qwen_2_5(28, 1536, 12, 2, 8960, vocab_size=151936, tied=True),
    "qwen2.5-3b": _qwen_2_5(36, 2048, 16, 2, 11008, vocab_size=151936, tied=True),
    "qwen2.5-7b": _qwen_2_5(28, 3584, 28, 4, 18944),
    "qwen2.5-14b": _qwen_2_5(48, 5120, 40, 8, 13824),
    "qwen2.5-32b": _qwen_2_5(64, 5120, 40, 8, 27648),
    "qwen2.5-72b": _qwen_2_5(80, 8192, 64, 8, 29568),
    "qwen3-0.6b": _qwen_3(28, 1024, 16, 8, 3072, tied=True),
    "qwen3-1.7b": _qwen_3(28, 2048, 16, 8, 6144, tied=True),
    "qwen3-4b": _qwen_3(36, 2560, 32, 8, 9728, tied=True),
    "qwen3-8b": _qwen_3(36, 4096, 32, 8, 12288),
    "qwen3-14b": _qwen_3(40, 5120, 40, 8, 17408),
    "qwen3-32b": _qwen_3(64, 5120, 64, 8, 25600),
    "qwen3-30b-a3b": _qwen_3(48, 2048, 32, 4, 6144)
    | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
}
"""By the name that follows `dummy:`."""
