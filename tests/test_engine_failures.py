"""Numbers that are none cost the requests that met them, and no other; they are named with the layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from torch import Tensor

from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.executor import Executor
from flexeval.engine.failures import MOST_WITHOUT_ANSWER
from flexeval.engine.random_checkpoint import RandomCheckpoint
from flexeval.errors import FailedRequestsError
from flexeval.policy.policy import Policy, Split
from flexeval.request import TokenRequest, TokenResult

CPU = torch.device("cpu")
CURSED = 7
"""A token whose hidden state the tests can tell from all others."""
MARK = 1e4
POLICY = Policy(row_tokens=64, sweep_tokens=96, group_sequences=2, num_groups=2, weights=Split(cpu=1), kv=Split(cpu=1))


def make(kind: str, index: int, *, has_cursed: bool) -> TokenRequest:
    ids = (*range(20, 60), 100 + index, CURSED if has_cursed else 8, 9)
    scored = {"prompt": (0, True), "draws": (5, False), "first": (1, False), "both": (4, True)}
    max_tokens, score_prompt = scored[kind]
    return TokenRequest(prompt_ids=ids, max_tokens=max_tokens, score_prompt=score_prompt, keep_top=2)


def executor(policy: Policy = POLICY) -> Executor:
    anatomy = Anatomy(tiny_config("llama"), torch.float32)
    return Executor(anatomy, RandomCheckpoint(anatomy), policy, codec=None, device=CPU, disk_tier=None)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the cursed token's hidden state be none from a layer on; -1 is the embedding."""
    embed, run_layer = Anatomy.embed, Anatomy.run_layer

    def from_layer(broken: int) -> None:
        def embed_marked(self: Anatomy, ids_1T: Tensor, positions_1T: Tensor) -> Any:
            found = embed(self, ids_1T, positions_1T)
            hidden_1TD = found.hidden_1TD.clone()
            hidden_1TD[..., 0][ids_1T == CURSED] = torch.nan if broken == -1 else MARK
            return found._replace(hidden_1TD=hidden_1TD)

        def run_marked(self: Anatomy, layer: int, hidden_1TD: Tensor, *args: Any) -> Tensor:
            out_1TD = run_layer(self, layer, hidden_1TD, *args)
            is_marked_1T = out_1TD[..., 0].abs() > MARK / 2
            return out_1TD.masked_fill(is_marked_1T[..., None] & (layer == broken), torch.inf)

        monkeypatch.setattr(Anatomy, "embed", embed_marked)
        monkeypatch.setattr(Anatomy, "run_layer", run_marked)

    return from_layer


@pytest.mark.parametrize(("broken", "place"), [(-1, "the embedding makes"), (0, "layer 0 makes"), (1, "layer 1 makes")])
def test_requests_that_fail_are_named_and_all_others_answered(
    broken: int, place: str, poison: Callable[[int], None]
) -> None:
    kinds = ("prompt", "draws", "first", "both")
    requests = [make(kinds[i % 4], i, has_cursed=i in (3, 5, 6, 8)) for i in range(12)]
    healthy = [i for i in range(12) if i not in (3, 5, 6, 8)]
    with executor() as engine:
        expected = engine.execute([requests[i] for i in healthy])
    poison(broken)
    told: dict[int, TokenResult] = {}
    with executor() as engine:
        with pytest.raises(
            FailedRequestsError, match=rf"logits are not finite: {place}.*4 requests failed.*request 3"
        ) as found:
            engine.execute(requests, on_results=told.update)
        assert sorted(told) == healthy
        for mine, theirs in zip((told[i] for i in healthy), expected, strict=True):
            assert mine.token_ids == theirs.token_ids
            for name in ("logprobs", "prompt_logprobs"):
                assert getattr(mine, name) == pytest.approx(getattr(theirs, name), abs=1e-5)
        assert sorted(found.value.reasons) == [3, 5, 6, 8]
        assert all(place in reason for reason in found.value.reasons.values())
        again = engine.execute([requests[0]])
        assert again[0].prompt_logprobs == pytest.approx(expected[0].prompt_logprobs, abs=1e-5), "it can go on"


def test_a_request_that_shares_what_is_broken_but_does_not_ask_for_it_is_answered(
    poison: Callable[[int], None],
) -> None:
    """Two requests of one prompt: its last token's probability is none, but one of them only goes on from before it."""
    poison(1)
    whole = make("prompt", 0, has_cursed=True)
    begin = dataclasses.replace(whole, prompt_ids=whole.prompt_ids[:-2], max_tokens=2, score_prompt=False)
    told: dict[int, TokenResult] = {}
    with executor() as engine, pytest.raises(FailedRequestsError) as found:
        engine.execute([whole, begin], on_results=told.update)
    assert list(told) == [1] and list(found.value.reasons) == [0]


def test_a_sequence_that_breaks_while_it_decodes_fails(poison: Callable[[int], None]) -> None:
    """It is explained by what it has drawn as well."""
    with executor() as engine:
        request = TokenRequest(prompt_ids=(30, 31, 32), max_tokens=6)
        drawn = engine.execute([request])[0].token_ids
    global CURSED
    before, CURSED = CURSED, drawn[3]
    try:
        poison(0)
        with executor() as engine, pytest.raises(FailedRequestsError, match="layer 0 makes"):
            engine.execute([request])
    finally:
        CURSED = before


def test_sampling_from_what_is_no_distribution_fails_like_the_rest(poison: Callable[[int], None]) -> None:
    poison(0)
    requests = [
        TokenRequest(prompt_ids=(30, token), max_tokens=3, temperature=1.0, top_p=0.9, seed=1) for token in (CURSED, 9)
    ]
    told: dict[int, TokenResult] = {}
    with executor() as engine, pytest.raises(FailedRequestsError):
        engine.execute(requests, on_results=told.update)
    assert list(told) == [1]


def test_a_model_that_answers_nothing_is_given_up(poison: Callable[[int], None]) -> None:
    poison(0)
    requests = [TokenRequest(prompt_ids=(CURSED, 10 + i), max_tokens=1) for i in range(4 * MOST_WITHOUT_ANSWER)]
    policy = dataclasses.replace(POLICY, row_tokens=16, sweep_tokens=32)
    with executor(policy) as engine, pytest.raises(FailedRequestsError) as found:
        engine.execute(requests)
    assert MOST_WITHOUT_ANSWER < len(found.value.reasons) < 2 * MOST_WITHOUT_ANSWER
