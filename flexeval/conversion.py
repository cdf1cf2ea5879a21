"""A GGUF file made into a Hugging Face directory with 16-bit weights. Knows the format's traps; not who asks, or why.

torch, transformers and gguf are imported when a conversion starts, which happens once per model and machine.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flexeval.config import format_size
from flexeval.errors import CapacityError, DiskError, ModelError
from flexeval.gguf_header import check_header

_MEND = "Use the model's own directory with safetensors weights instead"
_UNMARKED_SPLITS = frozenset({"", "default"})
_GPT2_SPLITS = frozenset({"gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion"})
_DIGIT_SPLITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Values of `tokenizer.ggml.pre` that stand for GPT-2's split after every digit was set apart (llama-vocab.cpp)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    quantization: str
    """The type that most of its weights have: `Q4_1`."""
    num_elements: int
    """Weights in all tensors."""
    vocab_size: int
    """Tokens of its tokenizer."""
    tokenizer_model: str
    """Kind of tokenizer: `gpt2` (byte-level BPE), `llama` (sentencepiece), ..."""
    tokenizer_split: str
    """How text is split before the tokenizer's merges; empty when the file does not say."""


def read_header(gguf: Path) -> GgufHeader:
    """Read a GGUF file's header. Raises `ModelError` for a file that is truncated, corrupt or one of several."""
    try:
        check_header(gguf)
        return _read_header(gguf)
    except ModelError:
        raise
    except Exception as error:  # the reader trusts its input: a damaged file raises whatever the damage leads to
        raise ModelError(
            f"not a GGUF file, truncated or corrupt: {error}", where=str(gguf), mend="Fetch the file again"
        ) from error


def _read_header(gguf: Path) -> GgufHeader:
    from gguf import GGUFReader

    reader = GGUFReader(gguf)

    def value(key: str, default: Any) -> Any:
        found = reader.get_field(key)
        contents = default if found is None else found.contents()
        if type(contents) is not type(default):
            raise ValueError(f"its {key} is of a strange type")
        return contents

    if (num_files := value("split.count", 1)) > 1:
        raise ModelError(
            f"one of {num_files} files of a split GGUF",
            where=str(gguf),
            mend="Join them with `llama-gguf-split --merge`",
        )
    tokens = reader.get_field("tokenizer.ggml.tokens")
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    if not sizes or tokens is None:
        raise ModelError("a GGUF file without weights or tokenizer", where=str(gguf), mend=_MEND)
    return GgufHeader(
        quantization=sizes.most_common(1)[0][0],
        num_elements=sizes.total(),
        vocab_size=len(tokens.data),
        tokenizer_model=value("tokenizer.ggml.model", ""),
        tokenizer_split=value("tokenizer.ggml.pre", ""),
    )


def convert(gguf: Path, directory: Path) -> str:
    """Write `gguf` into `directory`: config, fp16 safetensors, tokenizer with chat template, generation config.

    Returns:
        What a reader of results should know about the weights.

    Raises:
        ModelError: The file is damaged, or holds something that transformers cannot read.
        CapacityError: The unpacked weights do not fit in memory.
        DiskError: They do not fit on the disk, or the file cannot be read.
    """
    file_bytes = gguf.stat().st_size
    header = read_header(gguf)
    num_bytes = 2 * header.num_elements
    if num_bytes > (free_bytes := psutil.virtual_memory().available):
        raise CapacityError(
            f"unpacking needs {format_size(num_bytes)} of memory, {format_size(free_bytes)} are free",
            where=str(gguf),
            mend=_MEND,
        )
    print(f"Converting {gguf.name} to fp16, once: {format_size(num_bytes)}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        copy = Path(folder) / gguf.name
        _copy(gguf, copy, file_bytes)
        try:
            split_note = convert_tokenizer(copy, directory, header)
            _convert_weights(copy, directory)
        except ModelError as error:
            raise ModelError(error.what, where=str(gguf), mend=error.mend) from error
    return f"dequantized from {header.quantization}{split_note}"


def _copy(gguf: Path, copy: Path, file_bytes: int) -> None:
    """Copy the file to where nobody changes it: readers map it, and what is cut short under them kills the process."""
    try:
        shutil.copyfile(gguf, copy)
    except OSError as error:
        what = f"it cannot be copied before it is converted: {error.strerror}"
        mend = "Check the disks, make room there, or name another folder in FLEXEVAL_CACHE"
        raise DiskError(what, where=f"{gguf} to {copy.parent}", mend=mend) from error
    if copy.stat().st_size != file_bytes:
        raise ModelError("it was changed while it was read", where=str(gguf), mend="Wait until it is whole")


def convert_tokenizer(gguf: Path, directory: Path, header: GgufHeader) -> str:
    """Write the tokenizer of `gguf` into `directory`; returns a remark on it, or nothing. Raises `ModelError`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # see read_header
        raise ModelError(f"transformers cannot read its tokenizer: {error}", where=str(gguf), mend=_MEND) from error
    note = _mend_split(tokenizer, gguf, header)
    tokenizer.save_pretrained(directory)
    return note


def _mend_split(tokenizer: Any, gguf: Path, header: GgufHeader) -> str:
    """Make the tokenizer split text as the file says: transformers takes GPT-2's way for names it does not know."""
    from tokenizers import pre_tokenizers

    split = header.tokenizer_split
    backend = tokenizer.backend_tokenizer
    if header.tokenizer_model != "gpt2" or not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return ""
    if split in _DIGIT_SPLITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
        return ""
    if split in _UNMARKED_SPLITS:
        return "; its tokenizer names no way to split text, so GPT-2's is used"
    if split not in _GPT2_SPLITS:
        raise ModelError(f"its tokenizer splits text in an unknown way, {split!r}", where=str(gguf), mend=_MEND)
    return ""


def _convert_weights(gguf: Path, directory: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        with redirect_stderr(io.StringIO()):  # three bars, among which ours would be lost
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float16,
                output_loading_info=True,
            )
    except Exception as error:  # see read_header
        raise ModelError(f"transformers cannot read this GGUF: {error}", where=str(gguf), mend=_MEND) from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(f"{len(missing)} weights are missing, the first is {missing[0]}", where=str(gguf), mend=_MEND)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ModelError(f"{name} holds values that are not fp16 numbers", where=str(gguf), mend=_MEND)
    try:
        with redirect_stderr(io.StringIO()):
            model.save_pretrained(directory)
    except SafetensorError as error:  # which it makes of a disk's errors, too
        mend = "Make room there, or name another folder in FLEXEVAL_CACHE"
        raise DiskError(f"weights cannot be written: {error}", where=str(directory), mend=mend) from error
