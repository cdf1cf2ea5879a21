"""Text to tokens and back: nothing added twice, nothing cut wrongly, no stop sequence missed."""

from __future__ import annotations

import dataclasses

import pytest
from helm_support import tokenizer_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from flexeval.backends.text import TextHalf
from flexeval.errors import RequestError
from flexeval.request import Completion, FinishReason, Request, TokenResult

EOS = 0


def half(*, adds_bos: bool = False, context_length: int = 64) -> TextHalf:
    return TextHalf(tokenizer_dir(adds_bos=adds_bos), context_length=context_length, eos_ids=frozenset({EOS}))


PLAIN = half(context_length=4096)


def ids(text: str) -> tuple[int, ...]:
    return tuple(PLAIN.tokenizer(text, add_special_tokens=False)["input_ids"])


def result(token_ids: tuple[int, ...], reason: FinishReason = FinishReason.LENGTH) -> TokenResult:
    return TokenResult(
        token_ids=token_ids,
        logprobs=tuple(-0.5 - index for index in range(len(token_ids))),
        finish_reason=reason,
        top_logprobs=tuple(((token, -0.5), (ids("A")[0], -1.0)) for token in token_ids),
    )


def complete(text: str, *, reason: FinishReason = FinishReason.LENGTH, **fields: object) -> Completion:
    """The completion of a request whose model generated `text`."""
    request = Request(prompt="Question:", max_tokens=200, **fields)  # type: ignore[arg-type]
    return PLAIN.to_completion(request, ids("Question:"), [result(ids(text), reason)])


def test_a_prompt_gets_its_special_tokens_once() -> None:
    with_bos = half(adds_bos=True)
    bos = with_bos.tokenizer.bos_token_id
    assert with_bos.encode(Request(prompt="The answer"), where="here") == (bos, *ids("The answer"))
    assert with_bos.encode(Request(prompt="<s>The answer"), where="here") == (bos, *ids("The answer"))
    assert with_bos.encode(Request(prompt=(7, 8)), where="here") == (7, 8)
    assert PLAIN.encode(Request(prompt="The answer"), where="here") == ids("The answer")


def test_a_request_that_does_not_fit_is_named_with_its_numbers() -> None:
    fits = Request(prompt=tuple(range(5, 59)), max_tokens=10)
    assert len(half().to_token_requests(fits)[0].prompt_ids) == 54
    with pytest.raises(RequestError, match=r"54 prompt tokens and max_tokens=11 are 65.*holds 64.*request 3"):
        half().to_token_requests(dataclasses.replace(fits, max_tokens=11), where="request 3")
    with pytest.raises(RequestError, match=r"no tokens.*request 4"):
        PLAIN.to_token_requests(Request(prompt=""), where="request 4")


def test_text_is_cut_before_the_first_stop_sequence_and_tokens_with_it() -> None:
    completion = complete("The answer is 12.\n\nQuestion: more", stop=("Question", "\n\n"))
    assert completion.text == "The answer is 12."
    assert PLAIN.decode(completion.token_ids) == completion.text
    assert "".join(completion.tokens) == completion.text
    assert len(completion.logprobs) == len(completion.token_ids) == len(completion.top_logprobs)
    assert completion.finish_reason is FinishReason.STOP
    assert completion.num_generated_tokens == len(ids("The answer is 12.\n\nQuestion: more"))


def test_a_stop_sequence_at_the_very_start_leaves_nothing() -> None:
    completion = complete("\nmore", stop=("\n",))
    assert (completion.text, completion.token_ids, completion.logprobs) == ("", (), ())


def test_end_of_text_is_not_part_of_the_completion() -> None:
    request = Request(prompt="Q", max_tokens=9)
    completion = PLAIN.to_completion(request, ids("Q"), [result((*ids("yes"), EOS), FinishReason.ENDOFTEXT)])
    assert completion.text == "yes" and EOS not in completion.token_ids
    assert completion.finish_reason is FinishReason.ENDOFTEXT
    assert completion.num_generated_tokens == len(ids("yes")) + 1


def test_echo_puts_the_prompt_first() -> None:
    prompt = ids("Question: one")
    scored = dataclasses.replace(
        result(ids(" two")),
        prompt_logprobs=(0.0, *(-9.0,) * (len(prompt) - 1)),
        prompt_top_logprobs=((),) * len(prompt),
    )
    request = Request(prompt="Question: one", max_tokens=5, echo=True, stop=("two",))
    completion = PLAIN.to_completion(request, prompt, [scored])
    assert completion.text == "Question: one "
    assert completion.token_ids[: len(prompt)] == prompt
    assert completion.logprobs[: len(prompt)] == scored.prompt_logprobs
    assert len(completion.logprobs) == len(completion.token_ids) == len(completion.tokens)


def test_parts_of_characters_are_written_as_bytes() -> None:
    completion = complete("東")
    assert len(completion.tokens) == 3, "the tokenizer knows bytes only"
    assert completion.tokens == ("bytes:\\xe6", "bytes:\\x9d", "bytes:\\xb1")
    assert completion.text == "東"


def test_top_logprobs_are_named_by_text() -> None:
    completion = complete("A", top_logprobs=2)
    assert completion.top_logprobs == ({"A": -0.5},), "two tokens of the same text: the more probable one"


def test_samples_have_streams_of_their_own_and_greedy_runs_once() -> None:
    hot = Request(prompt="Q", temperature=1.0, num_completions=3, seed=5)
    seeds = [request.seed for request in PLAIN.to_token_requests(hot)]
    others = [request.seed for request in PLAIN.to_token_requests(dataclasses.replace(hot, seed=6))]
    assert len(set(seeds + others)) == 6
    greedy = dataclasses.replace(hot, temperature=0.0)
    (only,) = PLAIN.to_token_requests(greedy)
    completion = PLAIN.to_completion(greedy, only.prompt_ids, [result(ids("yes"))])
    assert [alternative.text for alternative in completion.alternatives] == ["yes", "yes"]


def test_ignore_eos_asks_for_no_end() -> None:
    assert PLAIN.to_token_requests(Request(prompt="Q"))[0].eos_ids == {EOS}
    assert PLAIN.to_token_requests(Request(prompt="Q", ignore_eos=True))[0].eos_ids == frozenset()


@settings(max_examples=150, deadline=None)
@given(
    token_ids=st.lists(st.integers(2, len(PLAIN.tokenizer) - 1), min_size=1, max_size=60),
    stops=st.lists(st.sampled_from(["\n", "an", "Answer", " 1", "é", "( [", "wer: A. o"]), min_size=1, max_size=3),
)
def test_generation_stops_with_the_token_that_completes_a_stop_sequence(token_ids: list[int], stops: list[str]) -> None:
    (request,) = PLAIN.to_token_requests(Request(prompt="Q", stop=tuple(stops)))
    assert request.is_stopped is not None
    for end in range(1, len(token_ids) + 1):
        has_stopped = any(stop in PLAIN.decode(token_ids[:end]) for stop in stops)
        assert request.is_stopped(token_ids[:end]) == has_stopped, token_ids[:end]
        if has_stopped:
            break
