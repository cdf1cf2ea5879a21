"""Opening a tokenizer, and the one line where it cannot be read. Knows transformers' loader; not what is encoded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flexeval.errors import ModelError, RequestError
from flexeval.request import Message

_SURROGATE = re.compile("[\ud800-\udfff]")


def open_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer whose files lie in a directory. Raises `ModelError`."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
        tokenizer.decode(tokenizer("a", verbose=False)["input_ids"])  # what is wrong may show no earlier
    except BaseException as error:  # the tokenizers package raises bare ones
        if not _is_failure(error):
            raise
        raise ModelError(
            f"the tokenizer cannot be used: {error}", where=str(directory), mend="Fetch the model again"
        ) from error
    return tokenizer


def _is_failure(error: BaseException) -> bool:
    """Whether code has failed; that of tokenizers in Rust, where it gives up, raises what is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer knows how a conversation is written: that of an instruction-following model."""
    return bool(tokenizer.chat_template)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, where: str | None = None) -> tuple[int, ...]:
    """Tokens of a text with the tokenizer's special ones, unless it begins with the beginning-of-text token already.

    Raises `RequestError` for half a character, which no tokenizer takes, and `ModelError` for a tokenizer that fails.
    """
    if half := _SURROGATE.search(text):
        what = f"half of a character, the surrogate U+{ord(half[0]):04X}, stands at {half.start()} of the prompt"
        raise RequestError(what, where=where, mend="Write the whole character, or leave it out")
    bos = tokenizer.bos_token
    has_bos = bool(bos) and text.startswith(str(bos))
    try:
        return tuple(tokenizer(text, add_special_tokens=not has_bos, verbose=False)["input_ids"])
    except BaseException as error:
        if not _is_failure(error):
            raise
        what = f"the model's tokenizer cannot encode this text: {error}"
        raise ModelError(what, where=where, mend="Fetch the model again") from error


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, where: str | None = None
) -> tuple[int, ...]:
    """Tokens of a conversation, after which the answer is to follow.

    Raises:
        RequestError: The template does not allow for it: many want user and assistant to take turns.
    """
    said = list(map(asdict, messages))
    try:
        written = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like, in a language of their own
        roles = ", ".join(message.role for message in messages)
        raise RequestError(
            f"the model's chat template does not take a conversation of {roles}: {error}",
            where=where,
            mend="Leave this run entry out, or choose a model whose template takes it",
        ) from error
    return encode(tokenizer, str(written), where=where)


def num_chat_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the template adds to a text, at most: those of the text may join with them."""
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    return len(chat_ids(tokenizer, [Message("user", "a")])) - len(plain) + 2


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """A number that stands for a tokenizer: equal for equal vocabularies."""
    tokens = sorted(tokenizer.get_vocab().items())
    return int.from_bytes(hashlib.sha256(json.dumps(tokens).encode()).digest()[:8])
