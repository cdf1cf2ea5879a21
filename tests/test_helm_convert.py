"""Requests and results across the border, and HELM's own view of what arrives."""

from dataclasses import replace

import pytest
from helm.benchmark.metrics.basic_metrics import convert_tokens_to_text, get_num_bytes
from helm.clients.client import truncate_sequence
from helm.common.request import Request as HelmRequest
from helm.common.request import Token

from flexeval.benchmark.helm.convert import UNSUPPORTED_FIELDS, Batch, from_helm, to_helm
from flexeval.errors import RequestError
from flexeval.request import Completion, FinishReason, Message, Request

BATCH = Batch(size=4, elapsed_s=2.0)


def helm_request(**fields: object) -> HelmRequest:
    return HelmRequest(
        model_deployment="flexeval/tiny",
        model="flexeval/tiny",
        **{"prompt": "1 + 1 =", "temperature": 0.0, "max_tokens": 5, **fields},
    )


def completion(*tokens: str, **fields: object) -> Completion:
    base = Completion(
        text="".join(tokens),
        token_ids=tuple(range(len(tokens))),
        tokens=tokens,
        logprobs=tuple(-0.5 * place for place in range(1, len(tokens) + 1)),
        finish_reason=FinishReason.STOP,
        num_prompt_tokens=4,
        num_generated_tokens=len(tokens),
        elapsed_s=0.5,
    )
    return replace(base, **fields)


def test_every_field_of_a_request_arrives() -> None:
    request = from_helm(
        helm_request(
            temperature=0.7, top_p=0.9, num_completions=3, top_k_per_token=5, stop_sequences=["\n", "Q:"], random="3"
        )
    )
    assert request == Request(
        prompt="1 + 1 =",
        max_tokens=5,
        stop=("\n", "Q:"),
        temperature=0.7,
        top_p=0.9,
        num_completions=3,
        seed=request.seed,
        top_logprobs=5,
    )
    assert request.seed > 0


def test_scoring_a_prompt_arrives_as_echo_without_tokens() -> None:
    request = from_helm(helm_request(max_tokens=0, echo_prompt=True))
    assert (request.max_tokens, request.echo, request.top_logprobs) == (0, True, 0)


def test_random_is_a_seed_that_depends_on_nothing_else() -> None:
    seeds = [from_helm(helm_request(random=random)).seed for random in (None, "1", "2", "1", "any text")]
    assert seeds[0] == 0
    assert seeds[1] == seeds[3]
    assert len(set(seeds)) == 4
    assert seeds[1] == 0x6B86B273FF34, "seeds outlive a process: they are part of the journal's keys"


@pytest.mark.parametrize("name", UNSUPPORTED_FIELDS)
def test_what_no_engine_can_honour_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"HELM asks for {name}=0.5, .*flexeval/tiny.*Leave this run entry out"):
        from_helm(helm_request(**{name: 0.5}))


CONVERSATION = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "+ 1?"},
]


def test_a_conversation_arrives_turn_by_turn() -> None:
    request = from_helm(helm_request(prompt="", messages=CONVERSATION), is_chat=True)
    assert (request.prompt, request.is_chat) == ("", True)
    assert request.messages == (Message("user", "1 + 1?"), Message("assistant", "2"), Message("user", "+ 1?"))


IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": "data:" + "x" * 10_000}]}


@pytest.mark.parametrize(
    ("values", "is_chat", "message"),
    [
        (
            {"messages": CONVERSATION},
            False,
            "a conversation of 3 turns, and no chat template is applied.*--chat-template",
        ),
        ({"messages": CONVERSATION, "echo_prompt": True}, True, "a prompt or an echo as well"),
        ({"messages": CONVERSATION, "prompt": "1"}, True, "a prompt or an echo as well"),
        ({"messages": [IMAGE]}, True, "not text alone.*only text can be asked"),
        ({"messages": [{"content": "1 + 1?"}]}, True, "not text alone"),
    ],
)
def test_a_conversation_that_cannot_be_held_is_refused(values: dict[str, object], is_chat: bool, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        from_helm(helm_request(**{"prompt": "", **values}), is_chat=is_chat)
    assert len(str(caught.value)) < 400


def test_an_empty_stop_sequence_is_refused() -> None:
    with pytest.raises(RequestError, match="non-empty"):
        from_helm(helm_request(stop_sequences=[""]))


def test_a_completion_arrives_with_true_logprobs_and_its_reason() -> None:
    result = to_helm(helm_request(), completion(" 2", " ."), batch=BATCH)
    assert result.success and not result.cached
    (output,) = result.completions
    assert (output.text, output.logprob) == (" 2 .", -1.5)
    assert output.tokens == [Token(text=" 2", logprob=-0.5), Token(text=" .", logprob=-1.0)]
    assert output.finish_reason == {"reason": "stop"}
    assert (result.request_time, result.batch_size, result.batch_request_time) == (0.5, 4, 2.0)


@pytest.mark.parametrize("reason", list(FinishReason))
def test_every_reason_is_one_of_helms(reason: FinishReason) -> None:
    (output,) = to_helm(helm_request(), completion(" 2", finish_reason=reason), batch=BATCH).completions
    assert output.finish_reason == {"reason": reason.value}
    assert reason.value in ("stop", "length", "endoftext")


def test_alternatives_become_completions() -> None:
    answer = completion(" 2", alternatives=(completion(" 3"), completion(" 4")))
    result = to_helm(helm_request(num_completions=3), answer, batch=BATCH)
    assert [output.text for output in result.completions] == [" 2", " 3", " 4"]


@pytest.mark.parametrize("stops", [[], ["\n"], ["\n", "Q:"]])
def test_helm_has_nothing_left_to_cut(stops: list[str]) -> None:
    request = helm_request(stop_sequences=stops, max_tokens=3)
    (output,) = to_helm(request, completion(" 2", " is", " it"), batch=BATCH).completions
    cut = truncate_sequence(output, request, end_of_text_token="<eos>", print_warning=False)
    assert (cut.text, cut.tokens, cut.logprob) == (output.text, output.tokens, output.logprob)


def test_pieces_of_characters_count_as_the_bytes_they_are() -> None:
    answer = completion(" caf", r"bytes:\xc3", r"bytes:\xa9", text=" café")
    (output,) = to_helm(helm_request(), answer, batch=BATCH).completions
    assert get_num_bytes(output.tokens) == len(" café".encode())
    assert "".join(group["text"] for group in convert_tokens_to_text(output.tokens)) == " café"


def test_an_echo_begins_with_the_prompt_as_helm_wrote_it() -> None:
    request = helm_request(prompt="a b", max_tokens=0, echo_prompt=True)
    answer = completion("<s>", "a", " b", logprobs=(0.0, -2.0, -1.0))
    (output,) = to_helm(request, answer, batch=BATCH, added_prefix="<s>").completions
    assert output.text == "a b"
    assert [token.text for token in output.tokens] == ["a", " b"]
    assert output.logprob == -3.0


def test_an_echo_keeps_the_prefix_that_helm_wrote_itself() -> None:
    request = helm_request(prompt="<s>a b", max_tokens=0, echo_prompt=True)
    answer = completion("<s>", "a", " b", logprobs=(0.0, -2.0, -1.0))
    (output,) = to_helm(request, answer, batch=BATCH, added_prefix="<s>").completions
    assert output.text == "<s>a b"
    assert [token.text for token in output.tokens] == ["<s>", "a", " b"]


def test_a_prefix_is_not_looked_for_in_what_was_generated() -> None:
    (output,) = to_helm(helm_request(), completion(" 2"), batch=BATCH, added_prefix="<s>").completions
    assert output.text == " 2"


def test_the_batch_is_all_there_was() -> None:
    assert Batch.of([completion("a"), completion("b"), completion("c")]) == Batch(size=3, elapsed_s=1.5)
