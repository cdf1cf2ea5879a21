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


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer knows how a conversation is written: that of an instruction-following model."""
    return bool(tokenizer.chat_template)


def chat_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Tokens of a conversation in which the user has said `text` and the answer is to follow."""
    asked = [{"role": "user", "content": text}]
    written = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"])


def num_chat_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the template adds to a text, at most: those of the text may join with them."""
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    return len(chat_ids(tokenizer, "a")) - len(plain) + 2


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """A number that stands for a tokenizer: equal for equal vocabularies."""
    tokens = sorted(tokenizer.get_vocab().items())
    return int.from_bytes(hashlib.sha256(json.dumps(tokens).encode()).digest()[:8])
