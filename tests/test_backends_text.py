"""The text half: prompts into tokens, tokens into completions that are cut alike in text, tokens and figures."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import sentencepiece_dir, tokenizer_dir

from flexeval.backends.batch import Batch
from flexeval.backends.text import TextHalf
from flexeval.errors import ModelError, RequestError
from flexeval.request import Completion, FinishReason, Kept, Request, TokenResult
from flexeval.tokenizer import num_chat_tokens

EOS, BOS = 0, 1
VOCAB_SIZE = 640
CONTEXT = 64


def text_half(folder: Path) -> TextHalf:
    return TextHalf(lambda: folder, vocab_size=VOCAB_SIZE, context_length=CONTEXT, eos_ids=frozenset({EOS}))


BYTES = text_half(tokenizer_dir())
PIECES = text_half(sentencepiece_dir())
HALVES = pytest.mark.parametrize("half", [BYTES, PIECES], ids=["byte-level", "sentencepiece"])


def encode(text: str, half: TextHalf = BYTES) -> list[int]:
    return half.tokenizer.encode(text, add_special_tokens=False)


def result(ids: list[int], reason: FinishReason = FinishReason.LENGTH, **fields: object) -> TokenResult:
    """What an engine would say: the log-probability of token number i is -i."""
    return TokenResult(
        token_ids=tuple(ids), logprobs=tuple(-float(i) for i in range(len(ids))), finish_reason=reason, **fields
    )


def complete(ids: list[int], *, half: TextHalf = BYTES, reason: FinishReason = FinishReason.LENGTH, **asked: object):
    request = Request(prompt="Q", **asked)
    return half.to_completion(request, encode("Q", half), [result(ids, reason)])


# -- prompts ------------------------------------------------------------------------------------------------------


def test_a_beginning_of_text_is_added_once() -> None:
    half = text_half(tokenizer_dir(adds_bos=True))
    plain = half.encode(Request(prompt="The answer"), where="here")
    assert plain[0] == BOS and plain.count(BOS) == 1
    assert half.encode(Request(prompt="<s>The answer"), where="here") == plain
    assert BYTES.encode(Request(prompt="The answer"), where="here") == plain[1:], "where the tokenizer adds none"


TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}it:"


def test_a_chat_template_is_put_around_the_prompt() -> None:
    half = text_half(tokenizer_dir(adds_bos=True))
    half.tokenizer.chat_template = TEMPLATE
    asked = half.encode(Request(prompt="The answer", is_chat=True), where="here")
    assert half.decode(list(asked)) == "<s>user: The answer\nit:"
    assert asked.count(BOS) == 1, "the template's own"
    num_plain = len(encode("The answer", half))
    assert len(asked) <= num_plain + num_chat_tokens(half.tokenizer) <= len(asked) + 4


def test_a_conversation_of_several_turns_is_written_as_the_template_writes_it() -> None:
    half = text_half(tokenizer_dir(adds_bos=True))
    half.tokenizer.chat_template = TEMPLATE
    said = (("system", "Be brief."), ("user", "One?"), ("assistant", "Two."), ("user", "Three?"))
    asked = half.encode(Request(prompt="", messages=said, is_chat=True, max_tokens=1), where="here")
    assert half.decode(list(asked)) == "<s>system: Be brief.\n<s>user: One?\n<s>assistant: Two.\n<s>user: Three?\nit:"
    alone = half.encode(Request(prompt="", messages=said[1:2], is_chat=True), where="here")
    assert alone == half.encode(Request(prompt="One?", is_chat=True), where="here")


def test_a_template_without_beginning_of_text_gets_the_tokenizers() -> None:
    """As HELM's client has it; many templates write their own."""
    half = text_half(tokenizer_dir(adds_bos=True))
    half.tokenizer.chat_template = TEMPLATE.replace("<s>", "")
    asked = half.encode(Request(prompt="The answer", is_chat=True), where="here")
    assert half.decode(list(asked)) == "<s>user: The answer\nit:"
    assert len(asked) <= len(encode("The answer", half)) + num_chat_tokens(half.tokenizer)


def test_a_conversation_that_the_template_does_not_take_is_refused() -> None:
    half = text_half(tokenizer_dir())
    half.tokenizer.chat_template = "{{ raise_exception('only users speak') }}"
    with pytest.raises(RequestError, match=r"conversation of system, user: only users speak \(request 3\)\. Leave"):
        half.encode(Request(prompt="", messages=(("system", "a"), ("user", "b")), is_chat=True), where="request 3")


def test_without_a_chat_template_nobody_can_be_asked_in_one() -> None:
    with pytest.raises(RequestError, match=r"no chat template \(here\)"):
        BYTES.encode(Request(prompt="The answer", is_chat=True), where="here")


def test_token_ids_are_taken_as_they_are() -> None:
    half = text_half(tokenizer_dir(adds_bos=True))
    assert half.encode(Request(prompt=(7, BOS, VOCAB_SIZE - 1)), where="here") == (7, BOS, VOCAB_SIZE - 1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt has no tokens"),
        ((), "the prompt has no tokens"),
        ((5, VOCAB_SIZE, 6), "token 640, the model has 640.*own tokenizer"),
        ((5, -1), "token -1, the model has 640"),
        ((5,) * 60, r"60 prompt tokens and max_tokens=5 are 65, the model's context holds 64 \(request 3\)\. Shorten"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(prompt: str | tuple[int, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        BYTES.to_token_requests(Request(prompt=prompt, max_tokens=5), where="request 3")


def test_a_prompt_may_fill_the_context() -> None:
    (asked,) = BYTES.to_token_requests(Request(prompt=(5,) * 59, max_tokens=5))
    assert len(asked.prompt_ids) == 59


def test_what_is_asked_reaches_the_engine() -> None:
    asked = BYTES.to_token_requests(
        Request(prompt="Q", max_tokens=4, temperature=0.5, top_p=0.9, num_completions=3, echo=True, top_logprobs=2)
    )
    assert len({one.seed for one in asked}) == len(asked) == 3
    assert {(o.max_tokens, o.temperature, o.top_p, o.score_prompt, o.num_top_logprobs, o.eos_ids) for o in asked} == {
        (4, 0.5, 0.9, True, 2, frozenset({EOS}))
    }
    assert all(one.is_stopped is None for one in asked)


def test_streams_differ_by_seed_and_completion_alone() -> None:
    def seeds(seed: int) -> list[int]:
        request = Request(prompt="Q", temperature=1.0, num_completions=4, seed=seed)
        return [one.seed for one in BYTES.to_token_requests(request)]

    assert seeds(1) == seeds(1)
    assert not set(seeds(1)) & set(seeds(2)), "a seed is not its neighbour's next stream"


def test_greedy_completions_are_computed_once() -> None:
    request = Request(prompt="Q", num_completions=3)
    assert len(BYTES.to_token_requests(request)) == 1
    answer = BYTES.to_completion(request, encode("Q"), [result(encode("A"), elapsed_s=2.0)])
    assert [one.text for one in (answer, *answer.alternatives)] == ["A"] * 3
    assert answer.elapsed_s == 2.0


def test_sampled_completions_stand_side_by_side() -> None:
    request = Request(prompt="Q", num_completions=2, temperature=1.0)
    parts = [result(encode("A"), elapsed_s=2.0), result(encode("B"), elapsed_s=3.0)]
    answer = BYTES.to_completion(request, encode("Q"), parts)
    assert [one.text for one in (answer, *answer.alternatives)] == ["A", "B"]
    assert answer.elapsed_s == 5.0, "the request's share is that of all its completions"


def test_equal_requests_share_one_answer_and_its_time() -> None:
    once, twice = Request(prompt="Q"), Request(prompt="R", temperature=1.0, num_completions=2)
    batch = Batch(BYTES, [twice, once, twice])
    assert len(batch.token_requests) == 3
    told = batch.collect([(0, result(encode("A"), elapsed_s=4.0)), (2, result(encode("C"), elapsed_s=1.0))])
    assert [index for index, _ in told] == [1], "a request is answered when all its completions are there"
    told = batch.collect([(1, result(encode("B"), elapsed_s=2.0))])
    assert [index for index, _ in told] == [0, 2]
    assert [one.text for one in batch.completions()] == ["A", "C", "A"]
    assert [one.elapsed_s for one in batch.completions()] == [3.0, 1.0, 3.0]


def test_end_of_text_can_be_ignored() -> None:
    (asked,) = BYTES.to_token_requests(Request(prompt="Q", ignore_eos=True))
    assert asked.eos_ids == frozenset()


# -- stop sequences -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generated", "stop", "text"),
    [
        ("The answer is 12.\nQuestion:", ("\n",), "The answer is 12."),
        ("one Question two", ("Question", "two"), "one "),
        ("one two Question", ("Question", "two"), "one "),
        ("\n\n", ("\n",), ""),
        ("naïve → 東京。それ", ("。",), "naïve → 東京"),
        ("éè", ("è",), "é"),
        ("no stop here", ("###",), "no stop here"),
        ("}}} }", ("} }",), "}}"),
    ],
)
@HALVES
def test_a_completion_ends_before_its_stop_sequence(
    generated: str, stop: tuple[str, ...], text: str, half: TextHalf
) -> None:
    ids = encode(generated, half)
    answer = complete(ids, stop=stop, half=half)
    assert answer.text == text
    assert answer.finish_reason is (FinishReason.LENGTH if text == generated else FinishReason.STOP)
    assert answer.num_generated_tokens == len(ids)
    assert_consistent(answer, half)


def assert_consistent(answer: Completion, half: TextHalf) -> None:
    """Every figure belongs to a token, and the tokens are the fewest that make up the text."""
    assert len(answer.token_ids) == len(answer.tokens) == len(answer.logprobs)
    assert half.decode(answer.token_ids).startswith(answer.text)
    assert not answer.text or not half.decode(answer.token_ids[:-1]).startswith(answer.text)
    assert bool(answer.text) == bool(answer.token_ids)


def test_a_token_that_holds_text_and_stop_is_kept() -> None:
    ids = encode("yes. no")
    merged = next(token for token in range(VOCAB_SIZE) if len(BYTES.decode([token])) > 2)
    word = BYTES.decode([merged])
    answer = complete([*ids, merged, *ids], stop=(word[1:],))
    assert (answer.text, answer.token_ids) == ("yes. no" + word[0], (*ids, merged))


def test_broken_bytes_before_a_stop_do_not_take_it_in() -> None:
    (byte,) = (token for token in range(VOCAB_SIZE) if BYTES.tokenizer.convert_ids_to_tokens(token) == "ÿ")
    answer = complete([byte, *encode("\n")], stop=("\n",))
    assert (answer.text, answer.token_ids, answer.tokens) == ("\ufffd", (byte,), (r"bytes:\xff",))


@st.composite
def stories(draw: st.DrawFn) -> tuple[TextHalf, list[int], tuple[str, ...]]:
    """A tokenizer, tokens that often split characters, and stop sequences, one of which may be how the text ends."""
    half = draw(st.sampled_from([BYTES, PIECES]))
    words = st.sampled_from(["東", "京", "。", "é", " a", "a", "b", " ", "\n", "Question", "} }"])
    known = words.map(lambda word: encode(word, half))
    stray = st.integers(0, 270).map(lambda token: [token])
    ids = list(chain(*draw(st.lists(known | known | known | stray, min_size=1, max_size=30))))
    ending = half.decode(ids)[-draw(st.integers(1, 6)) :]
    assume(ending)  # some tokens have no text
    return half, ids, draw(st.sampled_from([(ending,), ("\n\n", ending), ("\n", "} }")]))


@settings(deadline=None, max_examples=500)
@given(stories())
def test_looking_at_the_tail_finds_what_a_full_decode_finds(story: tuple[TextHalf, list[int], tuple[str, ...]]) -> None:
    half, ids, stops = story
    (asked,) = half.to_token_requests(Request(prompt=(5,), stop=stops))
    assert asked.is_stopped is not None
    for length in range(1, len(ids) + 1):
        appears = any(stop in half.decode(ids[:length]) for stop in stops)
        assert asked.is_stopped(ids[:length]) == appears
        if appears:
            answer = complete(ids[:length], stop=stops, half=half)
            assert answer.finish_reason is FinishReason.STOP
            assert not any(stop in answer.text for stop in stops)
            assert len(answer.token_ids) == len(answer.logprobs) <= length
            assert half.decode(answer.token_ids).startswith(answer.text)
            break


@pytest.mark.parametrize(
    ("text", "stop", "is_stopped"),
    [
        (
            "東京東京東京東京。",
            "。",
            True,
        ),  # the tail begins within a character, and a broken run of bytes is all broken
        ("東" * 20, "東" * 12, True),  # a character is several tokens
        ("東京東京東京東京", "。", False),
    ],
)
def test_characters_of_several_tokens(text: str, stop: str, is_stopped: bool) -> None:
    (asked,) = PIECES.to_token_requests(Request(prompt=(5,), stop=(stop,)))
    assert asked.is_stopped is not None
    for cut in range(3):
        assert asked.is_stopped([7] * cut + encode(text, PIECES)) == is_stopped
    broken = [PIECES.tokenizer.convert_tokens_to_ids("<0xFF>"), *encode(text, PIECES)[1:]]
    assert not asked.is_stopped(broken), "its text is replacement characters alone"


# -- completions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", list(FinishReason))
def test_end_of_text_is_no_part_of_the_answer(reason: FinishReason) -> None:
    ids = encode("yes")
    ends = reason is FinishReason.ENDOFTEXT
    answer = complete([*ids, EOS] if ends else ids, reason=reason)
    assert (answer.text, list(answer.token_ids), answer.finish_reason) == ("yes", ids, reason)
    assert answer.num_generated_tokens == len(ids) + ends
    assert len(answer.logprobs) == len(ids)


@HALVES
def test_parts_of_a_character_are_written_as_bytes(half: TextHalf) -> None:
    answer = complete(encode("東", half)[-3:], half=half)
    assert answer.tokens == (r"bytes:\xe6", r"bytes:\x9d", r"bytes:\xb1")
    assert answer.text == "東"


def test_top_logprobs_are_named_and_cut_like_the_tokens() -> None:
    ids = encode("A\n")
    tops = (((ids[0], -0.1), (ids[1], -2.0)), ((ids[1], -0.2), (ids[0], -3.0)))
    request = Request(prompt="Q", stop=("\n",), top_logprobs=2)
    answer = BYTES.to_completion(request, encode("Q"), [result(ids, top_logprobs=tops)])
    assert answer.top_logprobs == ({"A": -0.1, "\n": -2.0},)


def test_of_two_tokens_with_one_text_the_more_probable_is_named() -> None:
    twins = [token for token in range(270) if PIECES.token_text(token) == "a"]
    assert len(twins) > 1, "a letter and its byte"
    tops = (tuple((token, -float(rank)) for rank, token in enumerate(twins)),)
    answer = PIECES.to_completion(Request(prompt="a", top_logprobs=2), [5], [result([twins[0]], top_logprobs=tops)])
    assert answer.top_logprobs == ({"a": 0.0},)


@HALVES
def test_an_echo_begins_with_the_prompt(half: TextHalf) -> None:
    request = Request(prompt="a", echo=True, stop=("\n",), top_logprobs=1)
    prompt = half.encode(request, where="here")
    generated = encode("abc\n", half)
    scored = {
        "top_logprobs": tuple(((token, -0.5),) for token in generated),
        "prompt_logprobs": (0.0, *(-7.0 for _ in prompt[1:])),
        "prompt_top_logprobs": ((), *(((5, -1.0),) for _ in prompt[1:])),
    }
    answer = half.to_completion(request, prompt, [result(generated, **scored)])
    assert answer.text == half.decode([*prompt, *generated]).removesuffix("\n"), "spaces between them included"
    assert answer.token_ids == (*prompt, *generated[:-1])
    assert answer.logprobs[: len(prompt)] == scored["prompt_logprobs"]
    assert answer.logprobs[len(prompt) :] == tuple(-float(i) for i in range(len(generated) - 1))
    assert len(answer.top_logprobs) == len(answer.tokens) == len(answer.token_ids)
    assert answer.top_logprobs[0] == {}
    assert (answer.num_prompt_tokens, answer.num_generated_tokens) == (len(prompt), len(generated))


def kept(*tokens: int, num_top: int = 2) -> Kept:
    """Columns whose first token is given."""
    ids = np.array(tokens)[:, None] + np.arange(2 * num_top + 1)
    return Kept(ids.astype(np.int32), -ids.astype(np.float32))


def test_distributions_are_kept_by_token_ids_and_not_named() -> None:
    ids = encode("A\n")
    request = Request(prompt="Q", stop=("\n",), keep_top=2)
    assert {(one.keep_top, one.num_top_logprobs) for one in BYTES.to_token_requests(request)} == {(2, 0)}
    both = Request(prompt="Q", top_logprobs=3, keep_top=2)
    assert {(one.keep_top, one.num_top_logprobs) for one in BYTES.to_token_requests(both)} == {(2, 3)}
    answer = BYTES.to_completion(request, encode("Q"), [result(ids, kept=kept(50, 60))])
    assert answer.top_logprobs == () and answer.token_ids == (ids[0],)
    assert answer.distributions is not None
    assert answer.distributions["token"].tolist() == ids, "the stop was drawn as well"
    assert answer.distributions["top_tokens"].tolist() == [[50, 51], [60, 61]]
    assert BYTES.to_completion(Request(prompt="Q"), encode("Q"), [result(ids)]).distributions is None


def test_in_a_batch_what_prompts_share_is_kept_once() -> None:
    requests = [Request(prompt=(5, 6, last), max_tokens=0, echo=True, keep_top=2) for last in (7, 8)]
    batch = Batch(BYTES, requests)
    scored = result([], prompt_logprobs=(0.0, -1.0, -1.0), kept=kept(6, 7))
    first, second = (answer.distributions for _, answer in batch.collect([(0, scored), (1, scored)]))
    assert first is not None and first["token"].tolist() == [6, 7]
    assert second is not None and second["token"].tolist() == [8]
    assert BYTES.vocabulary != PIECES.vocabulary
    assert BYTES.vocabulary == text_half(tokenizer_dir()).vocabulary


def test_scoring_alone_gives_the_prompt_back() -> None:
    request = Request(prompt="The answer", max_tokens=0, echo=True)
    prompt = BYTES.encode(request, where="here")
    answer = BYTES.to_completion(request, prompt, [result([], prompt_logprobs=(0.0, *(-1.0 for _ in prompt[1:])))])
    assert (answer.text, answer.token_ids, answer.num_generated_tokens) == ("The answer", prompt, 0)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}', None])
def test_a_tokenizer_that_cannot_be_read_is_named(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    half = text_half(tmp_path)
    with pytest.raises(ModelError, match=f"the tokenizer cannot be used.*{tmp_path}"):
        half.encode(Request(prompt="text"), where="here")


@pytest.mark.parametrize("echo", [False, True])
def test_token_ids_alone_need_no_tokenizer(echo: bool, tmp_path: Path) -> None:
    half = text_half(tmp_path / "nowhere")
    request = Request(prompt=(5, 6), detokenize=False, echo=echo)
    (asked,) = half.to_token_requests(request)
    told = result([7, 8, EOS], FinishReason.ENDOFTEXT, prompt_logprobs=(0.0, -1.0) if echo else ())
    answer = half.to_completion(request, asked.prompt_ids, [told])
    assert (answer.text, answer.tokens) == ("", ())
    assert answer.token_ids == ((5, 6, 7, 8) if echo else (7, 8))
    assert len(answer.logprobs) == len(answer.token_ids)
    assert (answer.num_prompt_tokens, answer.num_generated_tokens) == (2, 3)
