"""Requests refuse what nobody could serve, and equal requests have equal hashes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from flexeval.errors import RequestError
from flexeval.request import Request


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": -1}, "max_tokens=-1 is out of range"),
        ({"max_tokens": 2.5}, "max_tokens=2.5 is not a whole number"),
        ({"max_tokens": float("inf")}, "max_tokens=inf is out of range"),
        ({"max_tokens": 0}, "asks for nothing.*echo"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"num_completions": 0}, "num_completions"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"stop": "\n"}, "stop"),
        ({"stop": ("\n", "")}, "stop"),
        ({"stop": (5,)}, "stop"),
        ({"stop": 5}, "stop"),
        ({"max_tokens": "3"}, "max_tokens='3' is not a number"),
        ({"temperature": None}, "temperature=None is not a number"),
        ({"top_p": "1"}, "top_p='1' is out of range"),
        ({"seed": 1.5}, "seed=1.5 is not a whole number"),
        ({"prompt": b"text"}, "neither a text nor token ids"),
        ({"prompt": ("one text", "another")}, "neither a text nor token ids.*one Request for each"),
        ({"prompt": None}, "neither a text nor token ids"),
        ({"prompt": (1.5,)}, "neither a text nor token ids"),
        ({"is_chat": True, "echo": True}, "not around token ids or what is scored"),
        ({"is_chat": True, "prompt": (1, 2)}, "not around token ids or what is scored"),
        ({"prompt": "", "messages": (("user", "Q"),)}, "need a chat template"),
        ({"is_chat": True, "messages": (("user", "Q"),)}, "all that is said"),
        ({"prompt": "", "is_chat": True, "messages": ("user",)}, "not pairs of a role and a text"),
        ({"prompt": "", "is_chat": True, "messages": (("user", ["Q"]),)}, "only text can be asked"),
        ({"detokenize": False, "stop": ("a",)}, "no text to find stop sequences in"),
        ({"detokenize": False, "top_logprobs": 1}, "name top_logprobs by"),
    ],
)
def test_values_that_nobody_could_serve_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Request(**({"prompt": "Q"} | values))


def test_any_sequence_of_numbers_is_token_ids() -> None:
    requests = [Request(prompt=ids, stop=["a"]) for ids in ([1, 2], (1, 2), np.array([1, 2]))]
    assert len(set(requests)) == 1
    assert {request.content_hash() for request in requests} == {Request(prompt=(1, 2), stop=("a",)).content_hash()}


CONVERSATIONS: list[Any] = [
    [("user", "12")],
    [("system", "12")],
    [("user", "12"), ("assistant", "13")],
    [("user", "1"), ("user", "2")],
]


def test_requests_without_a_younger_field_keep_the_hash_they_had() -> None:
    """Written down when there was no `is_chat`: journals of that time are found."""
    plain = Request(prompt="12")
    assert plain.content_hash() == "53e8a79993df120db6c12e7c1a597ad30fecf3829e3eb158db6f4d3177a4f58b"
    full = Request(prompt="The capital of France is", max_tokens=8, stop=("\n",), temperature=0.5, seed=3, keep_top=32)
    assert full.content_hash() == "79577e64f7b1e5c3dd85d5214ad9dda68c7e4a49dd25b7a6a21dd4c88888c194"


def test_every_field_is_part_of_the_hash() -> None:
    plain = Request(prompt="12")
    changes = {
        "prompt": (12,),
        "max_tokens": 17,
        "stop": ("a",),
        "temperature": 0.5,
        "top_p": 0.5,
        "num_completions": 2,
        "seed": 1,
        "echo": True,
        "top_logprobs": 1,
        "keep_top": 1,
        "is_chat": True,
        "ignore_eos": True,
        "detokenize": False,
    }
    assert {*changes, "messages"} == {field.name for field in dataclasses.fields(Request)}
    changed = [dataclasses.replace(plain, **{name: value}) for name, value in changes.items()]
    changed += [Request(prompt="", is_chat=True, messages=said) for said in CONVERSATIONS]
    others = [dataclasses.replace(plain, stop=stop) for stop in [("a", "b"), ("ab",), ("b", "a"), ("\ud800",)]]
    assert (
        len({request.content_hash() for request in [plain, *changed, *others]})
        == 1 + len(changes) + len(CONVERSATIONS) + 4
    )
