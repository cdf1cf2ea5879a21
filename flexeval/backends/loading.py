"""Opening a model: its files, parts, weights, tokenizer and types. Knows what goes together; not how to run it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from flexeval.backends.text import TextHalf
from flexeval.backends.weights import codec_of, dtype_of, open_weights
from flexeval.config import Limits, Setting, Sparsity
from flexeval.engine.checkpoint import Checkpoint
from flexeval.engine.codecs.codec import Codec
from flexeval.engine.codecs.kv_format import KVCoding
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.family import check_family
from flexeval.errors import ConfigError, ModelError
from flexeval.models import ModelSource, resolve
from flexeval.prepared import Content
from flexeval.typed import show

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_MOST = {"num_hidden_layers": 2000}
"""Each is built, weights or not; no model has a tenth as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenModel:
    """A model that is known to be right for the engine, before any weight is loaded."""

    source: ModelSource
    """Where its files lie."""
    setting: Setting
    """How it is compressed."""
    codec: Codec | None
    """What the setting does to matrices; None leaves them as they are."""
    kv_coding: KVCoding | None
    """What it does to keys and values."""
    sparsity: Sparsity | None
    """Which keys it attends to; None attends to all."""
    device: torch.device
    """Where layers are computed."""
    anatomy: Anatomy
    """Its parts."""
    checkpoint: Checkpoint
    """Its weights, packed where they have been prepared."""
    content: Content | None
    """What its layers are once they are packed; None where no codec packs them."""
    text: TextHalf
    """Its tokenizer."""

    @property
    def vocabulary_codec(self) -> Codec | None:
        """What the setting does to embedding and head; None leaves them as they are."""
        return self.codec if self.setting.codes_vocabulary else None


def open_model(model: str | ModelSource, *, setting: str | Setting, device: str, dtype: str) -> OpenModel:
    """Find a model and check that it can be answered rightly.

    Raises:
        FlexevalError: It cannot be found, read or run, or an option is unknown.
    """
    chosen = Setting.parse(setting) if isinstance(setting, str) else setting
    place = pick_device(device)
    check_dtype(dtype)
    source = resolve(model) if isinstance(model, str) else model
    config = _read_config(source)
    check_family(config)
    anatomy = Anatomy(config, _pick_dtype(dtype_of(source, chosen, dtype), config, place))
    weights = open_weights(source, anatomy, chosen)
    return OpenModel(
        source=source,
        setting=chosen,
        codec=codec_of(chosen),
        kv_coding=None if chosen.kv_bits is None else KVCoding(chosen.kv_bits, chosen.group_size),
        sparsity=chosen.sparsity,
        device=place,
        anatomy=anatomy,
        checkpoint=weights.checkpoint,
        content=weights.content,
        text=TextHalf(
            lambda: source.tokenizer_dir,  # a dummy's is fetched, if it is needed at all
            vocab_size=config.get_text_config().vocab_size,
            context_length=anatomy.context_length,
            eos_ids=_eos_ids(source, config),
        ),
    )


def read_context_length(source: ModelSource) -> int:
    """Tokens that a model's context holds, without its weights. Raises `ModelError`."""
    config = _read_config(source)
    return Anatomy(config, torch.float32).context_length


def pick_device(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` stands for here. Raises `ConfigError`."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"unknown device {name!r}", mend="Devices are: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no usable CUDA device", where="--device", mend="Use --device cpu")
    use_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    if not use_cuda:
        return torch.device("cpu")
    # Weights, caches and workspaces are of few, very different sizes: in fixed segments they leave holes of gigabytes.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # read when CUDA is first used
    # Asking for the current device would take hundreds of megabytes of it; before it is used, it is the first.
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)


def check_gpu_limit(limits: Limits, device: torch.device) -> None:
    """Raise `ConfigError` for a limit on a GPU's memory where nothing is computed on one: it would limit nothing."""
    if device.type != "cuda" and limits.gpu_bytes is not None:
        raise ConfigError(
            "layers are computed on the CPU, which has no GPU memory to limit",
            where="--gpu-memory",
            mend="Leave it out, or compute on a GPU with --device cuda",
        )


def cap_gpu_memory(limits: Limits, device: torch.device) -> None:
    """Let this process take no more of a GPU than was given: a bound, not a wish."""
    if device.type == "cuda" and limits.gpu_bytes is not None:
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limits.gpu_bytes / total_bytes), device)


def check_dtype(name: str) -> None:
    """Raise `ConfigError` unless `name` is `auto` or a type of the arithmetic."""
    if name != "auto" and name not in _DTYPES:
        raise ConfigError(f"unknown dtype {name!r}", mend=f"Types are: auto, {', '.join(_DTYPES)}")


def dtypes_of(name: str, device: torch.device) -> tuple[torch.dtype, ...]:
    """The types of arithmetic that `name` may stand for on a device; the last one where a model asks for none of them.

    Raises `ConfigError` for a name of no type.
    """
    check_dtype(name)
    if name in _DTYPES:
        return (_DTYPES[name],)
    if device.type == "cuda":
        return torch.float16, torch.bfloat16
    return (torch.bfloat16 if _multiplies_bfloat16() else torch.float32,)


def _pick_dtype(name: str, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    stored, possible = getattr(config.get_text_config(), "dtype", None), dtypes_of(name, device)
    return stored if stored in possible else possible[-1]


def _multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it; without, torch's products in bfloat16 are slower than float32.

    Read off the processor rather than timed, so that the same machine always computes in the same type.
    """
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def _read_config(source: ModelSource) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source.directory, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its checks trip over
        raise _unusable("configuration", source, error) from error
    text = config.get_text_config()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if isinstance(value := getattr(text, name, None), int) and not 0 < value <= _MOST.get(name, value):
            raise _unusable("configuration", source, f"{name}={value}")
    return config


def _eos_ids(source: ModelSource, config: PretrainedConfig) -> frozenset[int]:
    """The tokens that end a text: of the generation configuration where there is one, else of the model's."""
    value: Any = config.get_text_config().eos_token_id
    if (source.directory / "generation_config.json").is_file():
        try:
            value = GenerationConfig.from_pretrained(source.directory).eos_token_id or value
        except Exception as error:
            raise _unusable("generation configuration", source, error) from error
    found = [] if value is None else value if isinstance(value, list) else [value]
    if odd := [one for one in found if type(one) is not int]:
        raise _unusable("token that ends a text", source, f"eos_token_id is {show(odd[0])}")
    return frozenset(found)


def _unusable(what: str, source: ModelSource, why: object) -> ModelError:
    return ModelError(f"the {what} cannot be used: {why}", where=str(source.directory), mend="Fetch the model again")
