"""Opening a tokenizer, and the one line where it cannot be read. Knows transformers' loader; not what is encoded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flexeval.errors import ModelError


def open_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer whose files lie in a directory. Raises `ModelError`."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers package raises bare ones
        raise ModelError(
            f"the tokenizer cannot be read: {error}", where=str(directory), mend="Fetch the model again"
        ) from error
    return tokenizer


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """A number that stands for a tokenizer: equal for equal vocabularies."""
    tokens = sorted(tokenizer.get_vocab().items())
    return int.from_bytes(hashlib.sha256(json.dumps(tokens).encode()).digest()[:8])
