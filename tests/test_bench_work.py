"""What a benchmark asks: exact lengths, real prefixes, no padding token."""

from __future__ import annotations

import pytest

from flexeval.bench.work import SyntheticWork, check_peer_gen_len, choose_work, parse_scale, pick_evenly
from flexeval.errors import ConfigError


def test_synthetic_requests_have_exact_lengths_and_share_what_they_should() -> None:
    work = SyntheticWork(prompt_len=20, gen_len=3, shared_prefix=15)
    requests = work.requests(50, vocab_size=7)
    assert {len(request.prompt) for request in requests} == {20}
    assert len({request.prompt[:15] for request in requests}) == 1
    assert len({request.prompt[15:] for request in requests}) > 40
    assert {token for request in requests for token in request.prompt} == {1, 2, 3, 4, 5, 6}, "never 0"
    assert all(request.ignore_eos and request.max_tokens == 3 and not request.echo for request in requests)
    assert work.requests(10, vocab_size=7) == requests[:10], "more work is the same work and more"
    assert SyntheticWork(prompt_len=20, gen_len=3, seed=1).requests(1, vocab_size=7) != requests[:1]


def test_ragged_requests_have_all_lengths_up_to_the_longest() -> None:
    work = SyntheticWork(prompt_len=100, gen_len=32, shared_prefix=20, is_ragged=True)
    requests = work.requests(600, vocab_size=50)
    assert len({request.prompt[:20] for request in requests}) == 1
    lengths = sorted(len(request.prompt) - 20 for request in requests)
    assert 5 <= lengths[0] < 7 and 75 < lengths[-1] <= 80
    assert 16 < lengths[300] < 24, "half of them below the geometric mean of 5 and 80"
    assert {request.max_tokens for request in requests} >= set(range(3, 25))
    assert work.requests(10, vocab_size=50) == requests[:10], "more work is the same work and more"
    assert work.describe(600).count("up to") == 2


def test_what_is_scored_generates_nothing() -> None:
    (request,) = SyntheticWork(prompt_len=4, gen_len=32, is_scoring=True).requests(1, vocab_size=9)
    assert (request.max_tokens, request.echo) == (0, True)


def options(**changes: object) -> dict[str, object]:
    names = ("suite", "prompt_len", "gen_len", "shared_prefix", "seed")
    return dict.fromkeys(names) | {"is_scoring": False, "is_ragged": False} | changes


def test_what_is_not_named_has_the_paper_s_lengths() -> None:
    assert choose_work(**options()) == SyntheticWork(prompt_len=512, gen_len=32)  # FlexGen, section 6
    assert choose_work(**options(suite="demo")) == "demo"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"suite": "demo", "gen_len": 4}, "--gen-len"),
        ({"suite": "demo", "is_scoring": True}, "--score"),
        ({"suite": "demo", "is_ragged": True}, "--ragged"),
        ({"is_scoring": True, "gen_len": 4}, "--gen-len"),
        ({"only_of_suites": (3, False)}, "--suite"),
        ({"prompt_len": 8, "shared_prefix": 8}, "--prompt-len"),
    ],
)
def test_options_that_contradict_each_other_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_work(**options(**changes))


def test_multiples_are_read() -> None:
    assert parse_scale("1,4,16") == (1, 4, 16)


@pytest.mark.parametrize("text", ["", "1", "0,4", "four", "4,"])
def test_multiples_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--scale 1,4,16"):
        parse_scale(text)


def test_a_part_is_spread_over_the_whole() -> None:
    assert list(pick_evenly(10, 3)) == [0, 3, 6]
    assert list(pick_evenly(3, 3)) == list(pick_evenly(3, None)) == list(pick_evenly(3, 9)) == [0, 1, 2]
    assert len(set(pick_evenly(199, 40))) == 40


def test_peers_may_generate_a_part_of_each_answer() -> None:
    work = SyntheticWork(prompt_len=8, gen_len=4)
    for gen_len in (None, 2, 4):
        check_peer_gen_len(work, gen_len)
    ragged = SyntheticWork(prompt_len=8, gen_len=4, is_ragged=True)
    for other in ("demo", SyntheticWork(prompt_len=8, gen_len=4, is_scoring=True), ragged):
        with pytest.raises(ConfigError, match=r"random tokens.*--peer-gen-len"):
            check_peer_gen_len(other, 2)
    with pytest.raises(ConfigError, match=r"5 of 4 tokens \(--peer-gen-len\). Choose one from 2 to 4"):
        check_peer_gen_len(work, 5)
    with pytest.raises(ConfigError, match=r"2 of 1 tokens .*Leave it out"):
        check_peer_gen_len(SyntheticWork(prompt_len=8, gen_len=1), 2)
