"""Streams: requests that read and draw the same tokens are computed as one. Knows requests; not when they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flexeval.request import TokenRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One prompt and one way to go on from it."""

    prompt_ids: tuple[int, ...]
    """What is computed of the prompt: all of it, but for a last token that is only scored."""
    requests: tuple[int, ...]
    """Those it answers, in order; each ends it for itself, at its own stops and its own length."""
    max_tokens: int
    """The most that any of them asks for."""
    last_ids: Mapping[int, int] = field(default_factory=dict)
    """By request, the last token of a prompt that is only scored. Nothing follows it, so it is not computed: choices of
    one token are read off the same logits."""

    @property
    def is_generating(self) -> bool:
        """Whether it goes on after its first forward pass: only then does it need a KV cache."""
        return self.max_tokens > 1


def make_streams(requests: Sequence[TokenRequest], *, is_apart: bool = False) -> list[Stream]:
    """All streams, in the order of their first requests; each request is one of its own if they are kept `is_apart`.

    Greedy requests of one prompt draw the same tokens, whatever their lengths, stops and scores; others do where
    temperature, nucleus and seed are equal too. Prompts that are only scored are one where all but their last tokens
    are equal, unless others are computed to their ends.
    """
    lengths = computed_lengths(requests)
    prompts = [
        request.prompt_ids[: _computed_length(request) if is_apart else lengths[request.prompt_ids]]
        for request in requests
    ]
    members: dict[tuple[object, ...], list[int]] = {}
    for index, request in enumerate(requests):
        if is_apart:
            members[index,] = [index]
            continue
        sampling = (request.temperature, request.top_p, request.seed) if request.temperature else ()
        members.setdefault((prompts[index], *sampling), []).append(index)
    return [
        Stream(
            prompt_ids=prompts[indices[0]],
            requests=tuple(indices),
            max_tokens=max(requests[index].max_tokens for index in indices),
            last_ids={
                index: requests[index].prompt_ids[-1]
                for index in indices
                if len(prompts[index]) < len(requests[index].prompt_ids)
            },
        )
        for indices in members.values()
    ]


def computed_lengths(requests: Sequence[TokenRequest]) -> dict[tuple[int, ...], int]:
    """Of each prompt that is asked, how many of its tokens have to be computed."""
    lengths: dict[tuple[int, ...], int] = {}
    for request in requests:
        lengths[request.prompt_ids] = max(lengths.get(request.prompt_ids, 0), _computed_length(request))
    return lengths


def _computed_length(request: TokenRequest) -> int:
    """All of its prompt, but for a last token that is only scored."""
    num_tokens = len(request.prompt_ids)
    return num_tokens - 1 if request.max_tokens == 0 and request.score_prompt and num_tokens > 1 else num_tokens
