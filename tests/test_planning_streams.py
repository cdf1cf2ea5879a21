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


def test_prompts_that_are_only_scored_are_one_but_for_their_last_tokens() -> None:
    scored = [TokenRequest(prompt_ids=(1, 2, 3, last), max_tokens=0, score_prompt=True) for last in (7, 8, 7)]
    assert make_streams([*scored, GREEDY]) == [
        Stream(prompt_ids=(1, 2, 3), requests=(0, 1, 2, 3), max_tokens=5, last_ids={0: 7, 1: 8, 2: 7})
    ]
    apart = make_streams(scored, is_apart=True)
    assert [(one.prompt_ids, one.last_ids) for one in apart] == [
        ((1, 2, 3), {i: last}) for i, last in enumerate((7, 8, 7))
    ]


def test_a_prompt_that_another_computes_to_its_end_is_not_cut() -> None:
    scored = replace(GREEDY, max_tokens=0, score_prompt=True)
    assert [stream.last_ids for stream in make_streams([scored, GREEDY])] == [{}]
    assert [stream.last_ids for stream in make_streams([scored, GREEDY], is_apart=True)] == [{0: 3}, {}]


def test_a_lone_token_stays() -> None:
    (stream,) = make_streams([TokenRequest(prompt_ids=(4,), max_tokens=0, score_prompt=True)])
    assert stream == Stream(prompt_ids=(4,), requests=(0,), max_tokens=0)


def test_only_what_goes_on_after_its_first_token_needs_a_cache() -> None:
    assert [make_streams([replace(GREEDY, max_tokens=n)])[0].is_generating for n in (0, 1, 2)] == [False, False, True]
