"""Streams: requests that read and draw the same tokens are computed as one. Knows requests; not when they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexeval.request import TokenRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One prompt and one way to go on from it."""

    prompt_ids: tuple[int, ...]
    """The prompt."""
    requests: tuple[int, ...]
    """Those it answers, in order; each ends it for itself, at its own stops and its own length."""
    max_tokens: int
    """The most that any of them asks for."""

    @property
    def is_generating(self) -> bool:
        """Whether it goes on after its first forward pass: only then does it need a KV cache."""
        return self.max_tokens > 1


def make_streams(requests: Sequence[TokenRequest], *, is_apart: bool = False) -> list[Stream]:
    """All streams, in the order of their first requests; each request is one of its own if they are kept `is_apart`.

    Greedy requests of one prompt draw the same tokens, whatever their lengths, stops and scores; others do where
    temperature, nucleus and seed are equal too.
    """
    members: dict[tuple[object, ...], list[int]] = {}
    for index, request in enumerate(requests):
        if is_apart:
            members[index,] = [index]
            continue
        sampling = (request.temperature, request.top_p, request.seed) if request.temperature else ()
        members.setdefault((request.prompt_ids, *sampling), []).append(index)
    return [
        Stream(
            prompt_ids=requests[indices[0]].prompt_ids,
            requests=tuple(indices),
            max_tokens=max(requests[index].max_tokens for index in indices),
        )
        for indices in members.values()
    ]
