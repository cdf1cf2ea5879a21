"""Every field of HELM's request, with our Client and with HELM's for models of transformers', on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helm.clients.huggingface_client import HuggingFaceClient
from helm.common.cache import BlackHoleCacheConfig
from helm.common.media_object import MediaObject, MultimediaObject
from helm.common.request import GeneratedOutput, RequestResult
from helm.common.request import Request as HelmRequest
from helm.common.response_format import ResponseFormat
from helm.proxy.retry import NonRetriableException
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from tiny_directory import write_tiny_model
from tiny_tokenizer import tokenizer_dir
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexeval.helm_plugin import FlexevalClient

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
PROMPT = "Question: Which of these?"
EOS = 0
MANY = 4000
"""Samples, for which frequencies are within 0.08 of probabilities in total variation, over some hundreds of tokens."""


class Clients(NamedTuple):
    """Both for one model."""

    name: str
    """HELM's client keeps models by it."""
    theirs: HuggingFaceClient
    ours: FlexevalClient

    def ask(self, **fields: Any) -> tuple[RequestResult, RequestResult]:
        request = self.request(**{"temperature": 0.0, **fields})
        torch.manual_seed(0)
        return self.theirs.make_request(request), self.ours.make_request(request)

    def request(self, **fields: Any) -> HelmRequest:
        base = {"model": self.name, "model_deployment": self.name, "prompt": PROMPT, "max_tokens": 8}
        return HelmRequest(**{**base, **fields})


def write_model(folder: Path, *, has_template: bool = False, adds_bos: bool = False, **sampling: float | None) -> Path:
    """A tiny model that writes printable text and draws end-of-text as well.

    Args:
        folder: Where to.
        has_template: Whether it knows conversations.
        adds_bos: Whether its tokenizer begins every text.
        sampling: What its `generation_config.json` says; by default, to sample from the whole vocabulary.
    """
    write_tiny_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    texts = [tokenizer.decode([token]) for token in range(model.config.vocab_size)]
    unprintable = [token for token, text in enumerate(texts) if not text.isprintable() or not text or "\ufffd" in text]
    with torch.no_grad():
        model.lm_head.weight[unprintable] *= 0.1  # not 0: a nucleus would end among equals
        model.lm_head.weight[EOS] = 1.2 * model.lm_head.weight[tokenizer.encode("A")[0]]
    model.save_pretrained(folder)
    path = folder / "generation_config.json"  # says nothing of top_k by default: 50 then
    path.write_text(json.dumps({**json.loads(path.read_text()), "top_k": 0, **sampling}))
    if adds_bos:
        shutil.copytree(tokenizer_dir(adds_bos=True), folder, dirs_exist_ok=True)
    if has_template:
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
    return folder


def open_clients(folder: Path, *, added_prefix: str = "") -> Clients:
    cache, path, name = BlackHoleCacheConfig(), str(folder), f"flexeval/{folder.name}"
    tokenizer = HuggingFaceTokenizer(cache, name, path)
    theirs = HuggingFaceClient(cache, tokenizer, path, "<eos>", device="cpu", torch_dtype="torch.float32")
    options = {"device": "cpu", "dtype": "float32"}
    return Clients(name, theirs, FlexevalClient(path, added_prefix=added_prefix, engine_options=options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def clients(folder: Path) -> Clients:
    return open_clients(folder)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Clients:
    return open_clients(write_model(tmp_path_factory.mktemp("chat"), has_template=True))


def shown(result: RequestResult) -> list[tuple[str, list[str]]]:
    assert result.success, result.error
    return [(output.text, [token.text for token in output.tokens]) for output in result.completions]


def logprobs(output: GeneratedOutput) -> list[float]:
    return [token.logprob for token in output.tokens]


EQUAL: dict[str, list[dict[str, Any]]] = {
    "prompt": [{"prompt": "A. one B. two"}, {"prompt": " The answer is\n"}, {"prompt": "caf\u00e9 \u2192 12"}],
    "max_tokens": [{"max_tokens": 1}, {"max_tokens": 40}],
    "temperature": [{"temperature": 0.0}, {"temperature": 1e-4}],
    "num_completions": [{"num_completions": 3}],
    "stop_sequences": [],  # of what the model says: see below
    "echo_prompt": [{"echo_prompt": True, "max_tokens": 5}],
    "top_p": [{"top_p": 0.5}, {"top_p": 1e-6, "temperature": 1.0}, {"top_p": 0, "temperature": 1.0}],
    "top_k_per_token": [{"top_k_per_token": 5}],
    "random": [{"random": "7"}],
}
"""Requests that both answer alike, by the field that they are about."""


@pytest.mark.parametrize("fields", [row for rows in EQUAL.values() for row in rows], ids=str)
def test_both_answer_alike(fields: dict[str, Any], clients: Clients) -> None:
    theirs, ours = clients.ask(**fields)
    assert shown(ours) == shown(theirs)
    assert len(ours.completions) == fields.get("num_completions", 1)
    assert ours.completions[0].text
    assert all(output.logprob == pytest.approx(sum(logprobs(output))) for output in ours.completions)


def test_prompts_differ_in_their_answers(clients: Clients) -> None:
    answers = {clients.ask(**row)[1].completions[0].text for row in EQUAL["prompt"]}
    assert len(answers) == len(EQUAL["prompt"]), "or the rows above would show nothing"


@pytest.mark.parametrize("cut", [(2, 3), (2, 4), (0, 1), (7, 8)])
@pytest.mark.parametrize("others", [(), ("zz",), ("\n", "zz")])
def test_text_ends_before_a_stop_sequence(cut: tuple[int, int], others: tuple[str, ...], clients: Clients) -> None:
    whole = [token.text for token in clients.ask()[1].completions[0].tokens]
    stop = "".join(whole[slice(*cut)])
    theirs, ours = clients.ask(stop_sequences=[*others, stop])
    assert ours.completions[0].text == theirs.completions[0].text == "".join(whole).partition(stop)[0]
    assert ours.completions[0].finish_reason == {"reason": "stop"}


def test_text_ends_before_end_of_text(clients: Clients) -> None:
    found = 0
    for number in range(6):
        theirs, ours = clients.ask(prompt=f"Target: {number}", max_tokens=30)
        assert shown(ours) == shown(theirs)
        found += ours.completions[0].finish_reason == {"reason": "endoftext"}
    assert 0 < found < 6


@pytest.mark.parametrize("prompt", [PROMPT, "A", "<s>The answer is 12."])
def test_a_scored_prompt_has_the_same_logprobs(prompt: str, clients: Clients) -> None:
    theirs, ours = clients.ask(prompt=prompt, echo_prompt=True, max_tokens=0)
    assert shown(ours) == shown(theirs) and ours.completions[0].text == prompt
    assert logprobs(ours.completions[0]) == pytest.approx(logprobs(theirs.completions[0]), abs=1e-4)
    assert logprobs(ours.completions[0])[0] == 0.0


def test_a_beginning_that_the_tokenizer_adds_is_seen_and_not_shown(tmp_path: Path) -> None:
    """HELM counts the tokens of the prompt as it wrote it; its client shows one more, and begins twice what begins."""
    clients = open_clients(write_model(tmp_path, adds_bos=True), added_prefix="<s>")
    theirs, ours = clients.ask()
    assert shown(ours) == shown(theirs)
    assert shown(ours) != shown(clients.ask(prompt=f"<s>{PROMPT}")[0]), "a second one"
    assert shown(ours) == shown(clients.ask(prompt=f"<s>{PROMPT}")[1])
    theirs, ours = clients.ask(echo_prompt=True, max_tokens=0)
    [(text, tokens)], [(their_text, their_tokens)] = shown(ours), shown(theirs)
    assert (their_text, their_tokens) == (f"<s>{text}", ["<s>", *tokens])
    their_logprobs = logprobs(theirs.completions[0])
    assert logprobs(ours.completions[0]) == pytest.approx(their_logprobs[1:], abs=1e-4)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.5, 1.0), (1.0, 0.6)])
def test_samples_of_both_come_from_the_same_distribution(
    temperature: float, top_p: float, clients: Clients, folder: Path
) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode(PROMPT)])).logits[0, -1]
    ranked = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    nucleus = ranked.values.cumsum(0) - ranked.values < top_p
    probabilities = ranked.values[nucleus] / ranked.values[nucleus].sum()
    names = ["" if token == EOS else tokenizer.decode([token]) for token in ranked.indices[nucleus].tolist()]
    expected = Counter[str]()
    for name, probability in zip(names, probabilities.tolist(), strict=True):
        expected[name] += probability
    for result in clients.ask(temperature=temperature, top_p=top_p, num_completions=MANY, max_tokens=1):
        seen = Counter(output.text for output in result.completions)
        assert seen.total() == MANY
        distance = sum(abs(seen[name] / MANY - expected[name]) for name in seen.keys() | expected.keys()) / 2
        assert distance < 0.08
        assert top_p == 1 or seen.keys() <= expected.keys()


def test_samples_are_those_of_their_random(clients: Clients) -> None:
    def sample(random: str | None) -> list[tuple[str, list[str]]]:
        request = clients.request(temperature=1.0, num_completions=2, random=random)
        return shown(clients.ours.make_request(request))

    assert sample("1") == sample("1")
    samples = [sample(random) for random in (None, "1", "2")]
    assert len({str(one) for one in samples}) == 3
    assert all(first != second for first, second in samples), "each completion has a stream of its own"


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "Which of these?"},
        {"prompt": "", "messages": said("Which of these?")},
        {"prompt": "", "messages": said("one", "two", "three")},
        {"prompt": "", "messages": said("one", "two")},
        {"prompt": "", "messages": [{"role": "system", "content": "Answer"}, *said("yes no")]},
    ],
    ids=str,
)
def test_conversations_are_answered_alike(fields: dict[str, Any], chat: Clients) -> None:
    theirs, ours = chat.ask(**fields)
    assert shown(ours) == shown(theirs)


def test_conversations_differ_from_their_last_turn(chat: Clients) -> None:
    answers = [chat.ask(prompt="", messages=said(*texts))[1].completions[0].text for texts in (("x", "y", "z"), ("z",))]
    assert answers[0] != answers[1]


PICTURE = MultimediaObject([MediaObject(content_type="image/png", location=__file__)])
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "embedding": ({"embedding": True}, "HELM asks for embedding=True, which the engine does not have"),
    "multimodal_prompt": ({"prompt": "", "multimodal_prompt": PICTURE}, "HELM asks for multimodal_prompt=Multimedia"),
    "image_generation_parameters": ({"image_generation_parameters": {"a": 1}}, "image_generation_parameters={'a': 1}"),
    "response_format": ({"response_format": ResponseFormat(json_schema={})}, "HELM asks for response_format="),
    "presence_penalty": ({"presence_penalty": 0.5}, "HELM asks for presence_penalty=0.5"),
    "frequency_penalty": ({"frequency_penalty": 0.5}, "HELM asks for frequency_penalty=0.5"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens=0 asks for nothing"),
    "prompt": ({"prompt": ""}, "the prompt has no tokens"),
    "messages": ({"prompt": "", "messages": said("x")}, "no chat template is applied"),
}
"""What ours refuses, by field."""
DROPPED = ("image_generation_parameters", "response_format", "presence_penalty", "frequency_penalty")
"""Fields that HELM's client passes over in silence."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_in_a_line(name: str, clients: Clients) -> None:
    fields, message = REFUSED[name]
    request = clients.request(**fields)
    refusal = clients.ours.make_request(request)
    assert not refusal.success and refusal.error is not None
    assert message in refusal.error and "\n" not in refusal.error and len(refusal.error) < 400
    try:
        assert clients.theirs.make_request(request).success == (name in DROPPED)
    except NonRetriableException:
        assert name == "messages"


def test_every_field_has_a_row() -> None:
    fields = {field.name for field in dataclasses.fields(HelmRequest)}
    assert fields == {*EQUAL, *REFUSED, "model", "model_deployment"}


def test_a_penalty_for_repetition_that_a_model_recommends_is_not_taken(folder: Path, tmp_path: Path) -> None:
    """HELM's client lets `generate` read it from `generation_config.json`, and its greedy answers change."""
    plain = open_clients(folder).ask(max_tokens=20)
    theirs, ours = open_clients(write_model(tmp_path, repetition_penalty=5.0)).ask(max_tokens=20)
    assert shown(ours) == shown(plain[1]) == shown(plain[0]) != shown(theirs)


def test_samples_come_from_the_whole_vocabulary(tmp_path: Path) -> None:
    """Where a model says nothing, HELM's client lets `generate` sample from the 50 most probable tokens."""
    clients = open_clients(write_model(tmp_path, top_k=None))
    theirs, ours = clients.ask(temperature=1.0, num_completions=1000, max_tokens=1)
    seen = [{output.text for output in result.completions} for result in (theirs, ours)]
    assert len(seen[0]) <= 50 < len(seen[1])
