"""Prompts and answers as files that travel: Parquet, with a digest of all they hold. Knows their form; no benchmark.

A file is read whole or refused in one line: cut short, changed, of another kind or version. The digest finds accidents
and careless edits; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flexeval.errors import ResultsError
from flexeval.files import replacing
from flexeval.journal import completion_from_json, completion_to_json
from flexeval.request import Completion, Request

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
    cost: dict[str, Any]
    """A `results.SettingResult`."""
    machine: dict[str, str]
    """Where it was."""
    versions: dict[str, str]
    """Of what answers depend on."""


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
    info, columns, digest = _read(path, "prompts", ("prompt", "options"))
    try:
        requests = [
            Request(**_tuples(json.loads(options)), prompt=prompt)
            for prompt, options in zip(columns["prompt"], columns["options"], strict=True)
        ]
        return Prompts(info=PromptsInfo(**info), requests=requests, digest=digest)
    except (TypeError, ValueError) as error:
        raise _unreadable(path, error) from error


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
    info, columns, _ = _read(path, "answers", ("request", "text", "answer"))
    try:
        answers = [completion_from_json(json.loads(answer)) for answer in columns["answer"]]
        completions = dict(zip(columns["request"], answers, strict=True))
        return AnswersFile(info=AnswersInfo(**info), completions=completions)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _unreadable(path, error) from error


def _write(path: Path, kind: str, info: dict[str, Any], columns: dict[str, list[str]]) -> str:
    import pyarrow
    from pyarrow import parquet

    digest = _digest(kind, info, columns)
    about = json.dumps({"kind": kind, "version": VERSION, "info": info, "digest": digest})
    table = pyarrow.table({name: pyarrow.array(values, pyarrow.string()) for name, values in columns.items()})
    with replacing(path) as temporary:
        parquet.write_table(table.replace_schema_metadata({_KEY: about}), temporary, compression="zstd")
    return digest


def _read(path: Path, kind: str, names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, list[str]], str]:
    import pyarrow
    from pyarrow import parquet

    if not path.is_file():
        raise ResultsError("there is no such file", where=str(path), mend=f"Name a file of {kind}")
    try:
        table = parquet.read_table(path)
        about = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(about, dict) or about.get("kind") != kind:
        raise ResultsError(
            f"this is not a file of {kind}", where=str(path), mend=f"Name one that `flexeval {_MAKER[kind]}` wrote"
        )
    if about.get("version") != VERSION:
        what = f"its form has version {about.get('version')}, this flexeval reads {VERSION}"
        raise ResultsError(what, where=str(path), mend="Use the same flexeval for all three steps")
    try:
        columns = {name: table.column(name).to_pylist() for name in names}
        is_whole = about["digest"] == _digest(kind, about["info"], columns)
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not is_whole:
        raise ResultsError(
            "it was changed after it was written", where=str(path), mend="Copy it again, or make it anew"
        )
    return about["info"], columns, about["digest"]


def _digest(kind: str, info: dict[str, Any], columns: dict[str, list[str]]) -> str:
    digest = hashlib.sha256()
    for part in (kind, info, *columns.items()):
        digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    known = {field.name for field in fields(Request)}
    if not options.keys() <= known:
        raise ValueError(f"unknown options {sorted(options.keys() - known)}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _unreadable(path: Path, error: Exception) -> ResultsError:
    lines = str(error).splitlines() or [type(error).__name__]
    return ResultsError(f"cannot be read: {lines[0]}", where=str(path), mend=_AGAIN)
