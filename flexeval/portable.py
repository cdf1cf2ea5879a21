"""Prompts and answers as files that travel: Parquet, with a digest of all they hold. Knows their form; no benchmark.

A file is read whole or refused in one line: cut short, changed, of another kind or version. The digest finds accidents
and careless edits; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexeval import distributions, parquet, typed
from flexeval.config import Setting
from flexeval.errors import FlexevalError, ResultsError
from flexeval.files import parse_json
from flexeval.journal import completion_from_json, completion_to_json
from flexeval.request import Completion, Request
from flexeval.results import SettingResult

VERSION = 1
"""Of the form of both files."""
_KEY = b"flexeval"
_MAKER = {"prompts": "prepare", "answers": "execute"}
_AGAIN = "Copy it again, or make it anew"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsInfo:
    """What a file of prompts was made of."""

    suite: str
    """Name of the suite, or path of its file."""
    model: str
    """REF of the model whose tokenizer cut the prompts to length."""
    vocabulary: int
    """Stands for that tokenizer: `tokenizer.vocabulary_of`."""
    context_length: int
    """Tokens that its context holds."""
    max_eval_instances: int | None
    """Questions per task at most, where it was said."""
    skip_missing: bool
    """Whether tasks without data were left out."""
    is_chat: bool
    """Whether prompts that are answered stand in the model's chat template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswersInfo:
    """Who answered what, and what it cost."""

    prompts: str
    """Digest of the file of prompts."""
    setting: str
    """Name of the setting."""
    model: str
    """REF of the model, where it was answered."""
    fingerprint: str
    """Of its files."""
    keep_top: int
    """Most probable tokens kept at each position."""
    cost: SettingResult
    """What that took."""
    machine: dict[str, str]
    """Where it was."""
    versions: dict[str, str]
    """Of what answers depend on."""
    failed: dict[str, str] = field(default_factory=dict)
    """Requests without an answer, by `Request.content_hash`, and why."""
    is_deterministic: bool = False
    """Whether each request was computed apart; files of before did not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """A file of prompts."""

    info: PromptsInfo
    requests: list[Request]
    """Each once."""
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswersFile:
    """A file of answers."""

    info: AnswersInfo
    completions: dict[str, Completion]
    """By the hash of the request, as it was prepared."""


def write_prompts(path: Path, info: PromptsInfo, requests: Sequence[Request]) -> str:
    """Write a file of prompts, whole or not at all; its digest."""
    rows = [asdict(request) for request in requests]
    columns = {
        "prompt": [row.pop("prompt") for row in rows],
        "options": [json.dumps(row, sort_keys=True) for row in rows],
    }
    return _write(path, "prompts", asdict(info), columns)


def read_prompts(path: Path) -> Prompts:
    """Read what `write_prompts` wrote. Raises `ResultsError`."""
    with _reading(path):
        about, columns = _read(path, "prompts", ("prompt", "options"))
        info = typed.read(PromptsInfo, about["info"])
        _check(0 <= info.vocabulary < 2**64, f"vocabulary {info.vocabulary}")
        _check(info.context_length > 0, f"context_length {info.context_length}")
        _check(info.max_eval_instances is None or info.max_eval_instances > 0, "max_eval_instances below 1")
        requests = [
            typed.read(Request, _object(options), prompt=prompt)
            for prompt, options in zip(columns["prompt"], columns["options"], strict=True)
        ]
        _check(len({request.content_hash() for request in requests}) == len(requests), "a request that comes twice")
        return Prompts(info=info, requests=requests, digest=about["digest"])


def write_answers(path: Path, info: AnswersInfo, requests: Sequence[Request], completions: Sequence[Completion]) -> str:
    """Write a file of answers, whole or not at all; its digest."""
    columns = {
        "request": [request.content_hash() for request in requests],
        "text": [completion.text for completion in completions],
        "answer": [json.dumps(completion_to_json(completion)) for completion in completions],
    }
    return _write(path, "answers", asdict(info), columns)


def read_answers(path: Path) -> AnswersFile:
    """Read what `write_answers` wrote. Raises `ResultsError`."""
    with _reading(path):
        about, columns = _read(path, "answers", ("request", "text", "answer"))
        info = typed.read(AnswersInfo, about["info"])
        Setting.parse(info.setting)  # files are named by it
        _check(info.cost.setting == info.setting, f"the cost of {typed.show(info.cost.setting)}")
        _check(0 <= info.keep_top <= distributions.MOST_TOP, f"keep_top {info.keep_top}")
        answers = [completion_from_json(_object(answer)) for answer in columns["answer"]]
        completions = dict(zip(columns["request"], answers, strict=True))
        _check(len(completions) == len(answers), "two answers to one request")
        return AnswersFile(info=info, completions=completions)


def _write(path: Path, kind: str, info: dict[str, Any], columns: dict[str, list[str]]) -> str:
    digest = _digest(kind, info, columns)
    about = json.dumps({"kind": kind, "version": VERSION, "info": info, "digest": digest})
    parquet.save_texts(columns, path, metadata={_KEY: about})
    return digest


def _read(path: Path, kind: str, names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    if not path.is_file():
        raise ResultsError("there is no such file", where=str(path), mend=f"Name a file of {kind}")
    about = parse_json(parquet.read_metadata(path).get(_KEY, b"{}"))
    if not isinstance(about, dict) or about.get("kind") != kind:
        raise ResultsError(
            f"this is not a file of {kind}", where=str(path), mend=f"Name one that `flexeval {_MAKER[kind]}` wrote"
        )
    if about.get("version") != VERSION:
        what = f"its form has version {typed.show(about.get('version'))}, this flexeval reads {VERSION}"
        raise ResultsError(what, where=str(path), mend="Use the same flexeval for all three steps")
    columns = parquet.read_texts(path, names)
    _check(isinstance(about.get("info"), dict), "no facts on what it was made of")
    if about.get("digest") != _digest(kind, about["info"], columns):
        raise ResultsError("it was changed after it was written", where=str(path), mend=_AGAIN)
    return about, columns


def _digest(kind: str, info: dict[str, Any], columns: dict[str, list[str]]) -> str:
    digest = hashlib.sha256()
    for part in (kind, info, *columns.items()):
        digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _object(text: str) -> dict[str, Any]:
    """A JSON object whose texts can be written. Raises `ValueError`."""
    found = parse_json(text)
    if not isinstance(found, dict):
        raise ValueError(f"a cell holds {typed.show(found)}, not an object")
    json.dumps(found, ensure_ascii=False).encode()  # halves of characters are no text
    return found


def _check(is_right: bool, what: str) -> None:
    if not is_right:
        raise ValueError(f"it has {what}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say of whatever is wrong in which file it is."""
    try:
        yield
    except ResultsError:
        raise
    except (FlexevalError, ValueError, OSError, RecursionError) as error:
        what = error.what if isinstance(error, FlexevalError) else str(error)
        raise ResultsError(f"cannot be read: {what}", where=str(path), mend=_AGAIN) from error
