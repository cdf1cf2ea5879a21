"""Streams: what draws the same tokens is one, what does not is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexeval.planning.streams import Stream, make_streams
from flexeval.request import TokenRequest

GREEDY = TokenRequest(prompt_ids=(1, 2, 3), max_tokens=5)
SAMPLED = replace(GREEDY, temperature=0.7, top_p=0.9, seed=3)


@pytest.mark.parametrize(
    "other",
    [
        replace(GREEDY, max_tokens=9),
        replace(GREEDY, max_tokens=0, score_prompt=True),
        replace(GREEDY, eos_ids=frozenset({7})),
        replace(GREEDY, is_stopped=lambda ids: True),
        replace(GREEDY, num_top_logprobs=4),
        replace(GREEDY, seed=5, top_p=0.5),
    ],
)
def test_greedy_requests_of_one_prompt_are_one_stream(other: TokenRequest) -> None:
    (stream,) = make_streams([GREEDY, other])
    assert stream == Stream(prompt_ids=(1, 2, 3), requests=(0, 1), max_tokens=max(5, other.max_tokens))


@pytest.mark.parametrize(
    "changes", [{"prompt_ids": (1, 2)}, {"temperature": 0.8}, {"top_p": 0.8}, {"seed": 4}, {"temperature": 0.0}]
)
def test_whatever_changes_the_draw_makes_another_stream(changes: dict[str, object]) -> None:
    streams = make_streams([SAMPLED, replace(SAMPLED, **changes), SAMPLED])
    assert [stream.requests for stream in streams] == [(0, 2), (1,)]


def test_only_what_goes_on_after_its_first_token_needs_a_cache() -> None:
    assert [make_streams([replace(GREEDY, max_tokens=n)])[0].is_generating for n in (0, 1, 2)] == [False, False, True]
