"""HELM's requests and results against flexeval's. Knows both vocabularies; must not know who answers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any, NamedTuple

from helm.common.request import GeneratedOutput, RequestResult, Token
from helm.common.request import Request as HelmRequest

from flexeval.errors import RequestError, ResultsError
from flexeval.request import Completion, Message, Request

UNSUPPORTED_FIELDS = (
    "embedding",
    "presence_penalty",
    "frequency_penalty",
    "multimodal_prompt",
    "image_generation_parameters",
    "response_format",
)
"""Fields of HELM's request that no engine here can honour: unset (zero, empty, None) or refused."""
_SHOWN = 120
"""Characters of a value in a message."""


class Batch(NamedTuple):
    """The batch a request was answered in, for HELM's efficiency metrics."""

    size: int
    """Requests in it."""
    elapsed_s: float
    """Seconds to answer all of them."""

    @classmethod
    def of(cls, completions: Sequence[Completion]) -> Batch:
        """Return the batch that these completions came from."""
        return cls(size=len(completions), elapsed_s=sum(completion.elapsed_s for completion in completions))


def from_helm(request: HelmRequest, *, is_chat: bool = False) -> Request:
    """Translate what HELM asks for; what is answered, not scored, as a user's words if `is_chat`.

    Raises:
        RequestError: HELM asks for something that the engine cannot do, or in a conversation where no chat template is
            applied.
    """
    where = f"a request to {request.model_deployment}"
    for name in UNSUPPORTED_FIELDS:
        if value := getattr(request, name):
            what = f"HELM asks for {name}={shorten(repr(value), _SHOWN)}, which the engine does not have"
            raise RequestError(what, where=where, mend="Leave this run entry out")
    if request.messages and not is_chat:
        what = f"HELM asks in a conversation of {len(request.messages)} turns, and no chat template is applied"
        mend = "Choose a model that has one, with --chat-template, or leave this run entry out"
        raise RequestError(what, where=where, mend=mend)
    if request.messages and (request.prompt or request.echo_prompt):
        what = "HELM asks in a conversation, and for a prompt or an echo as well"
        raise RequestError(what, where=where, mend="Leave this run entry out")
    return Request(
        prompt=request.prompt,
        messages=tuple(_message(message, where) for message in request.messages or ()),
        max_tokens=request.max_tokens,
        stop=tuple(request.stop_sequences),
        # A nucleus of nothing holds the most probable token, in HELM's client too.
        temperature=request.temperature if request.top_p else 0.0,
        top_p=request.top_p or 1.0,
        num_completions=request.num_completions,
        seed=_seed(request.random),
        echo=request.echo_prompt,
        is_chat=is_chat and not request.echo_prompt,
        # HELM's 1 means the chosen token itself, which every completion reports anyway.
        top_logprobs=request.top_k_per_token if request.top_k_per_token > 1 else 0,
    )


def to_helm(request: HelmRequest, completion: Completion, *, batch: Batch, added_prefix: str = "") -> RequestResult:
    """Translate an answer: completions with true log-probabilities, and the reason each of them ended.

    HELM cuts nothing from them afterwards: `text` and `tokens` already end before the first stop sequence.

    Raises `ResultsError` for an echo that is not one.

    Args:
        request: What HELM asked.
        completion: The answer, with its alternatives.
        batch: The batch it was answered in.
        added_prefix: Text of the token that the engine puts before a prompt that does not begin with it (BOS). HELM
            counts the tokens of the prompt as it wrote it, so an echo must not hold it.
    """
    is_added = request.echo_prompt and added_prefix and not request.prompt.startswith(added_prefix)
    outputs = [
        _to_output(answer, added_prefix if is_added else "") for answer in (completion, *completion.alternatives)
    ]
    return RequestResult(
        success=True,
        embedding=[],
        completions=outputs,
        cached=False,
        request_time=completion.elapsed_s,
        request_datetime=int(time.time()),
        batch_size=batch.size,
        batch_request_time=batch.elapsed_s,
    )


def _to_output(completion: Completion, added_prefix: str) -> GeneratedOutput:
    scored = zip(completion.tokens, completion.logprobs, strict=True)
    tokens = [Token(text=text, logprob=logprob) for text, logprob in scored]
    if added_prefix:
        if not tokens or tokens[0].text != added_prefix:  # answers may come from another machine
            what = f"the echo of a prompt does not begin with {added_prefix!r}, as this model's does"
            raise ResultsError(what, mend="Execute the prompts again, with the same model")
        tokens = tokens[1:]
    return GeneratedOutput(
        text=completion.text.removeprefix(added_prefix),
        logprob=sum(token.logprob for token in tokens),
        tokens=tokens,
        finish_reason={"reason": completion.finish_reason.value},
    )


def _message(message: Mapping[str, Any], where: str) -> Message:
    """A turn of a conversation. Raises `RequestError` for what is no text."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        what = f"HELM asks in messages that are not text alone: {shorten(repr(message), _SHOWN)}"
        raise RequestError(what, where=where, mend="Leave this run entry out: only text can be asked")
    return Message(role, content)


def _seed(random: str | None) -> int:
    """Map HELM's `random`, any text, to a seed; None is 0."""
    if random is None:
        return 0
    return int.from_bytes(hashlib.sha256(random.encode()).digest()[:6], "big")
