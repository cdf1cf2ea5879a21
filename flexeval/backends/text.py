"""Between text and tokens: the half of every backend that knows a tokenizer. Knows no tensor and no model.

Prompts are encoded with the tokenizer's special tokens, as HELM's HuggingFaceClient does, unless they begin with the
beginning-of-text token already; token ids are taken as they are. The tokenizer is opened when it is first needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from flexeval.distributions import read_off
from flexeval.errors import RequestError
from flexeval.request import Completion, FinishReason, Message, Request, TokenRequest, TokenResult, TopLogprobs
from flexeval.tokenizer import chat_ids, encode, has_chat_template, open_tokenizer, vocabulary_of

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MARGIN_TOKENS = 8
"""Tokens decoded beyond a stop sequence's length, for characters that span tokens and spaces that tokenizers strip."""
_MAX_CHARACTER_TOKENS = 4
"""A character is at most so many bytes in UTF-8, each of which may be a token."""


class TextHalf:
    """Turns requests into token requests, and token results into completions.

    Args:
        find_tokenizer: Where the tokenizer's files lie; called once, if text is to be read or written.
        vocab_size: Tokens that the model knows.
        context_length: Tokens of prompt and completion that the model can hold.
        eos_ids: Tokens that end a text.
    """

    def __init__(
        self,
        find_tokenizer: Callable[[], Path],
        *,
        vocab_size: int,
        context_length: int,
        eos_ids: frozenset[int],
    ):
        self._find_tokenizer = find_tokenizer
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._eos_ids = eos_ids
        self._byte_of_char = {char: byte for byte, char in enumerate(_byte_level_alphabet())}
        self.token_text: Callable[[int], str] = cache(self._token_text)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises `FlexevalError` where it cannot be had."""
        return open_tokenizer(self._find_tokenizer())

    @cached_property
    def vocabulary(self) -> int:
        """A number that stands for the tokenizer: see `vocabulary_of`."""
        return vocabulary_of(self.tokenizer)

    def encode(self, request: Request, *, where: str) -> tuple[int, ...]:
        """The prompt's tokens as the model shall see them.

        Raises:
            RequestError: The prompt is empty, holds a token the model does not have, or leaves no room in the context,
                or the model's chat template does not take what is said.
        """
        if request.is_chat and not has_chat_template(self.tokenizer):
            mend = "Ask without it, or choose a model that follows instructions"
            raise RequestError("the model's tokenizer has no chat template", where=where, mend=mend)
        if request.is_chat:
            said = request.messages or [Message("user", str(request.prompt))]
            ids = chat_ids(self.tokenizer, said, where=where)
        elif isinstance(request.prompt, str):
            ids = encode(self.tokenizer, request.prompt, where=where)
        else:
            ids = request.prompt
        if not ids:
            raise RequestError("the prompt has no tokens", where=where, mend="Give it some text")
        stray = max(ids) if min(ids) >= 0 else min(ids)
        if not 0 <= stray < self._vocab_size:
            raise RequestError(
                f"the prompt holds token {stray}, the model has {self._vocab_size}",
                where=where,
                mend="Use the model's own tokenizer",
            )
        num_needed = len(ids) + request.max_tokens
        if num_needed > self._context_length:
            raise RequestError(
                f"{len(ids)} prompt tokens and max_tokens={request.max_tokens} are {num_needed}, "
                f"the model's context holds {self._context_length}",
                where=where,
                mend="Shorten the prompt or lower max_tokens",
            )
        return ids

    def to_token_requests(self, request: Request, *, where: str = "request") -> list[TokenRequest]:
        """One token request for each completion that can differ. Raises `RequestError`."""
        prompt_ids = self.encode(request, where=where)
        num_different = 1 if request.temperature == 0 else request.num_completions
        return [
            TokenRequest(
                prompt_ids=prompt_ids,
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=_stream(request.seed, index),
                score_prompt=request.echo,
                num_top_logprobs=request.top_logprobs,
                keep_top=request.keep_top,
                eos_ids=frozenset() if request.ignore_eos else self._eos_ids,
                is_stopped=self._stop_check(request.stop) if request.stop else None,
            )
            for index in range(num_different)
        ]

    def to_completion(self, request: Request, prompt_ids: Sequence[int], results: Sequence[TokenResult]) -> Completion:
        """The completion of a request from the results of its token requests."""
        first, *others = [self._completion(request, prompt_ids, result) for result in results]
        missing = request.num_completions - 1 - len(others)
        alternatives = (*others, *[first] * missing)
        return replace(first, alternatives=alternatives, elapsed_s=sum(result.elapsed_s for result in results))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special ones included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _completion(self, request: Request, prompt_ids: Sequence[int], result: TokenResult) -> Completion:
        generated = list(result.token_ids)
        if result.finish_reason is FinishReason.ENDOFTEXT:
            generated.pop()
        whole = self.decode(generated) if request.detokenize else ""
        cuts = [place for stop in request.stop if (place := whole.find(stop)) >= 0]
        num_cut = len(whole) - min(cuts, default=len(whole))
        shown = self.decode([*prompt_ids, *generated]) if request.echo and request.detokenize else whole
        text = shown[: len(shown) - num_cut]
        if cuts:
            generated = generated[: self._num_tokens_of(generated, whole[: min(cuts)])]
        logprobs = list(result.logprobs[: len(generated)])
        tops = list(result.top_logprobs[: len(generated)])
        ids = generated
        if request.echo:
            ids = [*prompt_ids, *generated]
            logprobs = [*result.prompt_logprobs, *logprobs]
            tops = [*result.prompt_top_logprobs, *tops]
        return Completion(
            text=text,
            token_ids=tuple(ids),
            tokens=tuple(map(self.token_text, ids)) if request.detokenize else (),
            logprobs=tuple(logprobs),
            finish_reason=FinishReason.STOP if cuts else result.finish_reason,
            num_prompt_tokens=len(prompt_ids),
            num_generated_tokens=len(result.token_ids),
            top_logprobs=tuple(map(self._named, tops)),
            elapsed_s=result.elapsed_s,
            distributions=read_off(prompt_ids, result, request.keep_top, vocabulary=self.vocabulary)
            if request.keep_top
            else None,
        )

    def _named(self, top: TopLogprobs) -> dict[str, float]:
        """The most probable tokens by their text; where two have the same, the more probable one."""
        named: dict[str, float] = {}
        for token, logprob in top:
            named.setdefault(self.token_text(token), logprob)
        return named

    def _num_tokens_of(self, ids: Sequence[int], text: str) -> int:
        """How many leading tokens make up `text`, with which they begin: the fewest that decode to all of it."""
        count = len(ids)
        while count and self.decode(ids[: count - 1]).startswith(text):
            count -= 1
        return count

    def _stop_check(self, stops: Sequence[str]) -> Callable[[Sequence[int]], bool]:
        """Whether a stop sequence appears, given that it did not one token ago: only the tail can hold it."""
        num_tail = max(len(stop.encode()) for stop in stops) + _MARGIN_TOKENS

        def appears(text: str) -> bool:
            return any(stop in text for stop in stops)

        def is_stopped(ids: Sequence[int]) -> bool:
            start = max(0, len(ids) - num_tail)
            tail = self.decode(ids[start:])
            for earlier in range(start - 1, max(0, start - _MAX_CHARACTER_TOKENS) - 1, -1):
                if not tail.startswith(_REPLACEMENT):
                    break
                tail = self.decode(ids[earlier:])  # the cut may lie in a character
            return appears(tail) and appears(self.decode(ids))

        return is_stopped

    def _token_text(self, token_id: int) -> str:
        r"""A token's text; the bytes of a part of a character as `bytes:\xNN`, HELM's way of writing them."""
        text = self.decode([token_id])
        if _REPLACEMENT not in text:
            return text
        piece = str(self.tokenizer.convert_ids_to_tokens(token_id))
        if piece.startswith("<0x") and piece.endswith(">"):
            data = bytes([int(piece[3:-1], 16)])
        elif all(char in self._byte_of_char for char in piece):
            data = bytes(self._byte_of_char[char] for char in piece)
        else:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _stream(seed: int, index: int) -> int:
    """The seed of completion `index`; streams of one request, and of neighbouring seeds, are unrelated."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:7])


def _byte_level_alphabet() -> list[str]:
    """The character that byte-level BPE writes for each byte (GPT-2, Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [alphabet[byte] for byte in range(256)]
