"""The vocabulary between the text half and the tensor half. Knows no tokenizer, no tensor, no benchmark.

`Request` and `Completion` are what users and benchmarks speak. `TokenRequest` and `TokenResult` are the same thing
after tokenization: what the engine speaks. Only `backends/text.py` translates between the two.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple

from flexeval.errors import RequestError

if TYPE_CHECKING:  # this vocabulary is imported where numpy is not wanted yet
    import numpy as np
    import numpy.typing as npt

_SHORT_HASH_DIGITS = 16
_YOUNGER_FIELDS = ("is_chat", "messages")
"""Fields that requests did not always have: at their defaults they are no part of the hash, so that answers which were
journalled before are found."""


class FinishReason(StrEnum):
    """Why a completion ended, in HELM's words."""

    STOP = "stop"
    """A stop sequence appeared in the text."""
    LENGTH = "length"
    """`max_tokens` were generated."""
    ENDOFTEXT = "endoftext"
    """The model generated its end-of-text token."""


@dataclass(frozen=True, slots=True)
class Message:
    """A turn of a conversation."""

    role: str
    """Who says it, as the model's chat template names them: `system`, `user`, `assistant`."""
    content: str
    """What is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and what to do with it. Raises `RequestError` for values nobody could serve."""

    prompt: str | tuple[int, ...]
    """The text, or the token ids exactly as the model shall see them (no special tokens are added)."""
    max_tokens: int = 16
    """Tokens to generate at most; 0 scores the prompt only."""
    stop: tuple[str, ...] = ()
    """Generation ends where one of these texts appears; it is not part of the completion."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus: sample from the smallest set of tokens that holds this probability, in (0, 1]."""
    num_completions: int = 1
    """Independent completions of the same prompt."""
    seed: int = 0
    """Seed of this request's samples; completion i uses its own stream."""
    echo: bool = False
    """Put the prompt's tokens, with their log-probabilities, before the generated ones."""
    top_logprobs: int = 0
    """How many of the most probable tokens to report at each position."""
    keep_top: int = 0
    """How many of them, and of the others, to keep by their ids, for comparing settings: see `distributions`."""
    is_chat: bool = False
    """Whether the prompt is what a user says: the model's chat template is put around it, and asks for the answer."""
    messages: tuple[Message, ...] = ()
    """With `is_chat` and an empty prompt: a conversation of several turns, which the answer continues."""
    ignore_eos: bool = False
    """Generate on past end-of-text (benchmarks of speed)."""
    detokenize: bool = True
    """Write the completion as text; without, it has token ids alone, and token ids need no tokenizer."""

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            try:
                given = None if isinstance(self.prompt, bytes) else self.prompt  # whose items would pass for ids
                object.__setattr__(self, "prompt", tuple(map(operator.index, given)))
            except TypeError as error:
                what = f"prompt={self.prompt!r} is neither a text nor token ids"
                raise RequestError(what, mend="Write one Request for each text") from error
        stop = tuple(self.stop) if isinstance(self.stop, Iterable) and not isinstance(self.stop, str) else (None,)
        if not all(isinstance(text, str) and text for text in stop):
            raise RequestError(f"stop={self.stop!r} is not a sequence of non-empty texts", mend="Pass a tuple of texts")
        object.__setattr__(self, "stop", stop)
        for name, low, high in (
            ("max_tokens", 0, math.inf),
            ("temperature", 0, math.inf),
            ("num_completions", 1, math.inf),
            ("top_logprobs", 0, math.inf),
            ("keep_top", 0, math.inf),
        ):
            value = getattr(self, name)
            if not isinstance(getattr(self, name), Real):
                raise RequestError(f"{name}={value!r} is not a number", mend=f"Write {name} as a number")
            if not low <= value < high:
                raise RequestError(f"{name}={value} is out of range", mend=f"{name} is finite and at least {low}")
            if name != "temperature" and not isinstance(value, int):
                raise RequestError(f"{name}={value} is not a whole number", mend=f"Round {name}")
        if not isinstance(self.top_p, Real) or not 0 < self.top_p <= 1:
            raise RequestError(f"top_p={self.top_p!r} is out of range", mend="top_p lies in (0, 1]")
        if not isinstance(self.seed, int):
            raise RequestError(f"seed={self.seed!r} is not a whole number", mend="Write seed as a whole number")
        if not self.detokenize and (self.stop or self.top_logprobs):
            what = "detokenize=False leaves no text to find stop sequences in, or to name top_logprobs by"
            raise RequestError(what, mend="Leave out stop and top_logprobs, or let it be text")
        self._check_messages()
        if self.is_chat and (self.echo or not isinstance(self.prompt, str)):
            what = "is_chat puts a template around a text that is answered, not around token ids or what is scored"
            raise RequestError(what, mend="Pass a text, without echo")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens=0 asks for nothing", mend="Set echo=True to score the prompt")

    def _check_messages(self) -> None:
        try:
            messages = tuple(one if isinstance(one, Message) else Message(*one) for one in self.messages)
            is_text = all(isinstance(text, str) for one in messages for text in (one.role, one.content))
        except TypeError:
            is_text = False
        if not is_text:
            what = f"messages={self.messages!r} are not pairs of a role and a text"
            raise RequestError(what, mend="Pass (role, text) for each turn; only text can be asked")
        if messages and (self.prompt or not self.is_chat):
            what = "messages are all that is said, and need a chat template"
            raise RequestError(what, mend='Pass them with prompt="" and is_chat=True')
        object.__setattr__(self, "messages", messages)

    def content_hash(self) -> str:
        """Sha256 over every field that says something: equal hashes may share an answer."""
        values = asdict(self)
        for name in _YOUNGER_FIELDS:
            if not values[name]:
                del values[name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def short_hash(self) -> str:
        """The beginning of `content_hash`, which tells the requests of a run apart."""
        return self.content_hash()[:_SHORT_HASH_DIGITS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to a request. With `echo`, the token fields begin with the prompt's tokens."""

    text: str
    """The text of `token_ids`, cut before the first stop sequence; empty without `detokenize`."""
    token_ids: tuple[int, ...]
    """The tokens that make up `text`; end-of-text is never among the generated ones."""
    tokens: tuple[str, ...]
    """Text of each token, where it is wanted; part of a character is `bytes:\\xNN`, as HELM writes it."""
    logprobs: tuple[float, ...]
    """Natural-log probability of each token at temperature 1; 0.0 for the very first prompt token."""
    finish_reason: FinishReason
    """Why generation ended."""
    num_prompt_tokens: int
    """Length of the prompt as the model saw it, special tokens included."""
    num_generated_tokens: int
    """Tokens the model generated for this completion, before anything was cut."""
    top_logprobs: tuple[Mapping[str, float], ...] = ()
    """For each token, the most probable tokens there; empty unless asked for."""
    elapsed_s: float = 0.0
    """This request's share of the engine's time; over a batch they add up to the batch's time."""
    alternatives: tuple[Completion, ...] = ()
    """The second and further completions, where `num_completions` > 1."""
    distributions: npt.NDArray[np.void] | None = field(default=None, compare=False, repr=False)
    """Rows of `distributions.row_type`, one per position scored or drawn, perhaps without those that another completion
    of the batch has; None unless `keep_top` asked for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """A request as the engine sees it: one sequence to score or to continue."""

    prompt_ids: tuple[int, ...]
    """At least one token."""
    max_tokens: int
    """Tokens to generate at most; 0 scores the prompt only."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]."""
    seed: int = 0
    """Seed of this sequence's own random stream."""
    score_prompt: bool = False
    """Whether the log-probability of every prompt token is wanted."""
    num_top_logprobs: int = 0
    """Most probable tokens to report at each scored or generated position."""
    keep_top: int = 0
    """K of `Kept`; all requests of a batch that keep anything keep equally many."""
    eos_ids: frozenset[int] = frozenset()
    """Generation ends after one of these."""
    is_stopped: Callable[[Sequence[int]], bool] | None = None
    """Asked with the tokens generated so far whether a stop sequence has appeared."""


TopLogprobs = tuple[tuple[int, float], ...]
"""(token id, log-probability), most probable first."""


class Kept(NamedTuple):
    """What is kept of the distributions at N positions: the scored tokens of a prompt but the first, then those drawn.

    C = 2 K + 1 columns: the K most probable tokens, best first; K sampled from the others, each with the probability
    min(1, exp(log-probability - t)); in the last column no token, and the threshold t. Where the vocabulary has fewer
    tokens, -1 and minus infinity.
    """

    token_ids_NC: npt.NDArray[np.integer]
    """The tokens."""
    logprobs_NC: npt.NDArray[np.float32]
    """Their natural log-probabilities at temperature 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenResult:
    """The engine's answer to one `TokenRequest`."""

    token_ids: tuple[int, ...]
    """Generated tokens, end-of-text and the tokens of a stop sequence included."""
    logprobs: tuple[float, ...]
    """Natural-log probability of each generated token at temperature 1."""
    finish_reason: FinishReason
    """Why generation ended."""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    """Per generated token; empty unless asked for."""
    prompt_logprobs: tuple[float, ...] = ()
    """Per prompt token, the first 0.0; empty unless asked for."""
    prompt_top_logprobs: tuple[TopLogprobs, ...] = ()
    """Per prompt token, the first empty; empty unless asked for."""
    kept: Kept | None = field(default=None, compare=False, repr=False)
    """None unless `keep_top` asked for it."""
    elapsed_s: float = 0.0
    """This sequence's share of the time of the sweeps it took part in."""
