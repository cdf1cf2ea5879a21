"""A tiny random Llama on disk, as a user would have a model: config, safetensors, tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tiny_models import tiny_config
from tiny_tokenizer import tokenizer_dir
from transformers import AutoModelForCausalLM

CONTEXT = 2048


def write_tiny_model(directory: Path, *, seed: int = 0, adds_bos: bool = False, **sizes: int) -> Path:
    """Write the model, with further `sizes` in its configuration; the same weights every time."""
    torch.manual_seed(seed)
    fixed = {"vocab_size": 640, "max_position_embeddings": CONTEXT, "eos_token_id": 0, "bos_token_id": 1}
    config = tiny_config("llama", **fixed, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    shutil.copytree(tokenizer_dir(adds_bos=adds_bos), directory, dirs_exist_ok=True)
    return directory
