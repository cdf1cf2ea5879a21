"""Requests as nobody should ask them are answered like all others, or refused in one line before any is computed."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_directory import write_tiny_model
from tiny_models import tiny_config

from flexeval.backends.native import Engine
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.executor import Executor
from flexeval.engine.random_checkpoint import RandomCheckpoint
from flexeval.errors import RequestError
from flexeval.journal import Journal
from flexeval.policy.policy import Policy
from flexeval.request import Message, Request, TokenRequest

CATEGORIES = {unicodedata.category(c): c for c in map(chr, range(0x20000)) if not "\ud800" <= c <= "\udfff"}
ODDITIES = {
    "nul": "a\0b",
    "controls": "".join(map(chr, range(32))) + "\x7f\x85\u2028\u2029",
    "byte order mark": "\ufeffa",
    "right to left": "\u202eabc\u202c \u05d0\u05d1",
    "zero width": "a\u200b\u200c\u200d\u2060b",
    "combining": "e" + "\u0301" * 300,
    "joined emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "beyond the first plane": "\U0001d4d0\U00020000\U0010ffff",
    "no characters": "\ufffe\uffff\ufdd0\U0001ffff",
    "private use": "\ue000\U000f0000",
    "replacement": "\ufffd\ufffd",
    "not normalized": "\u212b\u00c5A\u030a \ufb01",
    "tags": "a\U000e0061\U000e007f",
    "spaces": "\u00a0\u2003\u3000\t\r\n\v\f",
    "hangul and thai": "\u1100\u1161\u11a8 \u0e33\u0e33",
    "one of each kind": "".join(
        {unicodedata.category(chr(c)): chr(c) for c in range(0x20000) if c // 0x800 != 27}.values()
    ),
    "special tokens": "<|endoftext|><s></s>",
    "long word": "a" * 1500,
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = write_tiny_model(tmp_path_factory.mktemp("odd") / "model")
    with Engine.load(
        str(model), dtype="float32", policy="row_tokens=512,sweep_tokens=2048,group_sequences=8"
    ) as loaded:
        yield loaded


def test_every_oddity_of_unicode_is_asked_and_answered(engine: Engine, tmp_path: Path) -> None:
    """In prompts, in stop sequences and scored; and comes back from the journal."""
    texts = list(ODDITIES.values())
    requests = [
        *(Request(prompt=text, max_tokens=2, stop=(text[:3],)) for text in texts),
        *(Request(prompt=text, max_tokens=0, echo=True, top_logprobs=2) for text in texts),
    ]
    answers = engine.generate(requests)
    with Journal(tmp_path / "journal") as journal:
        journal.add(zip(requests, answers, strict=True))
    with Journal(tmp_path / "journal") as journal:
        for request, answer in zip(requests, answers, strict=True):
            assert journal[request] == answer and len(answer.tokens) == len(answer.logprobs)
    for text, answer in zip(texts, answers[len(texts) :], strict=True):
        assert answer.text == engine.text.decode(engine.text.encode(Request(prompt=text), where="")), text


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udcff"])
def test_half_a_character_is_refused(text: str, engine: Engine) -> None:
    """A surrogate alone has no UTF-8: no tokenizer takes it."""
    for request in (
        Request(prompt=text),
        Request(prompt=f"fine {text}", max_tokens=0, echo=True),
    ):
        with pytest.raises(RequestError, match=r"surrogate.*request 1"):
            engine.generate([Request(prompt="fine"), request])


@pytest.mark.parametrize("prompt", ["", ()])
def test_an_empty_prompt_is_refused(prompt: str | tuple[int, ...], engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"the prompt has no tokens \(request 2\)"):
        engine.generate([Request(prompt="fine"), Request(prompt="too"), Request(prompt=prompt)])


def test_no_requests_have_no_answers(engine: Engine) -> None:
    assert engine.generate([]) == []


def test_a_conversation_of_nothing_is_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        engine.generate([Request(prompt="", messages=(Message("user", ""),), is_chat=True)])


@pytest.mark.parametrize("num_tokens", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_one_long_request(num_tokens: int) -> None:
    """Scored and continued; its last tokens see its first ones, whatever it was cut into."""
    anatomy = Anatomy(tiny_config("llama", max_position_embeddings=2**17), torch.float32)
    ids = tuple(1 + (i * i) % 199 for i in range(num_tokens))
    requests = [TokenRequest(prompt_ids=ids, max_tokens=3, score_prompt=True)]
    found = []
    for policy in (Policy(row_tokens=2048, sweep_tokens=4096), Policy(row_tokens=1500, sweep_tokens=1500)):
        with Executor(
            anatomy, RandomCheckpoint(anatomy), policy, codec=None, device=torch.device("cpu"), disk_tier=None
        ) as executor:
            found += executor.execute(requests)
    first, second = found
    assert first.token_ids == second.token_ids and len(first.prompt_logprobs) == num_tokens
    assert max(abs(a - b) for a, b in zip(first.prompt_logprobs, second.prompt_logprobs, strict=True)) < 1e-3


@pytest.mark.parametrize("num_requests", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_short_requests(num_requests: int) -> None:
    """One token each, drawn one each; equal prompts are computed once and answered alike."""
    anatomy = Anatomy(tiny_config("llama"), torch.float32)
    requests = [TokenRequest(prompt_ids=(i % 150,), max_tokens=1 + i % 2) for i in range(num_requests)]
    with Executor(
        anatomy,
        RandomCheckpoint(anatomy),
        Policy(row_tokens=2048, group_sequences=64, num_groups=2),
        codec=None,
        device=torch.device("cpu"),
        disk_tier=None,
    ) as executor:
        results = executor.execute(requests)
    assert len(results) == num_requests
    by_request: dict[TokenRequest, set[tuple[int, ...]]] = {}
    for request, result in zip(requests, results, strict=True):
        by_request.setdefault(request, set()).add(result.token_ids)
    assert all(len(ids) == 1 for ids in by_request.values()) and len(by_request) == 150
