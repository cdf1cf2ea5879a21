"""Completed requests, durable: a run that is killed goes on where it stopped.

One file per model, setting and arithmetic, one JSON object a line with a digest of its own, appended and synced after
each sweep. A line that was cut short by a crash is dropped when the file is opened again; one that cannot be read, or
was changed, is passed over. Knows requests and files; not who answers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flexeval import distributions, typed
from flexeval.errors import DiskError
from flexeval.files import parse_json, sync_folder
from flexeval.request import Completion, Request

_DIGEST = b', "digest": "'
_DIGEST_LENGTH = 16


class Journal:
    """Answers to requests, by the hash of the request. Use it in a `with` block."""

    def __init__(self, path: Path, *, fresh: bool = False):
        """Open or begin a journal.

        Args:
            path: Names everything that answers depend on beside the request. One process writes there at a time.
            fresh: Forget what is in it.
        """
        self._path = path
        self._completions: dict[str, Completion] = {}
        self.usages: list[dict[str, Any]] = []
        """What each session that wrote here has used, in order."""
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # what a link points to is nobody's journal
        self._file = os.fdopen(os.open(path, flags, 0o666), "ab+", buffering=0)
        self._end = 0 if fresh else self._read()
        """Where whole lines end."""
        self._file.truncate(self._end)
        sync_folder(path.parent)
        sync_folder(path.parent.parent)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if os.fstat(self._file.fileno()).st_size == 0:
            self._path.unlink(missing_ok=True)
        with suppress(OSError):  # what could not be written has been said
            self._file.close()

    def __contains__(self, request: Request) -> bool:
        return request.content_hash() in self._completions

    def has_answer(self, request: Request) -> bool:
        """Whether there is an entry for a request, and it can be the answer."""
        return request in self and fits(request, self[request], keep_top=request.keep_top)

    def __getitem__(self, request: Request) -> Completion:
        return self._completions[request.content_hash()]

    def rows(self, num_top: int) -> list[distributions.Rows]:
        """What answers hold probable, whoever asked for them: those with `num_top` tokens of each distribution."""
        row_type = distributions.row_type(num_top)
        answers = [one for answer in self._completions.values() for one in (answer, *answer.alternatives)]
        found = [answer.distributions for answer in answers]
        return [rows for rows in found if rows is not None and rows.dtype == row_type]

    def add(self, answers: Iterable[tuple[Request, Completion]]) -> None:
        """Make answers durable: they are on disk when this returns. Raises `DiskError`."""
        entries = {request.content_hash(): completion for request, completion in answers}
        self._append({"key": key, "completion": completion_to_json(completion)} for key, completion in entries.items())
        self._completions.update(entries)

    def add_usage(self, usage: dict[str, Any]) -> None:
        """Note what a session has used. Raises `DiskError`."""
        self._append([{"usage": usage}])
        self.usages.append(usage)

    def _append(self, entries: Iterable[dict[str, Any]]) -> None:
        data = memoryview(b"".join(map(_to_line, entries)))
        end = self._end + len(data)
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):  # the next line must not go on where this one was cut
                self._file.truncate(self._end)
            what = f"answers cannot be written: {error.strerror}"
            raise DiskError(what, where=str(self._path), mend="Make room there, then run again to go on") from error
        self._end = end

    def _read(self) -> int:
        """Read the lines that are whole; return where they end."""
        end = 0
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                with suppress(ValueError):  # then it is asked again
                    self._take(parse_json(_checked(line)))
        return end

    def _take(self, entry: object) -> None:
        match entry:
            case {"usage": dict(usage), **others} if not others:
                self.usages.append(usage)
            case {"key": str(key), "completion": dict(completion), **others} if not others:
                self._completions[key] = completion_from_json(completion)


def _to_line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry).encode()
    return text[:-1] + _DIGEST + _digest(text) + b'"}\n'


def _checked(line: bytes) -> bytes:
    """The text of an entry, which once had no digest. Raises `ValueError` for one that is not as it was written."""
    text, mark, digest = line.rpartition(_DIGEST)
    if not mark:
        return line
    text += b"}"
    if digest != _digest(text) + b'"}\n':
        raise ValueError("its digest is another one")
    return text


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:_DIGEST_LENGTH].encode()


def completion_to_json(completion: Completion) -> dict[str, Any]:
    """A completion as JSON values."""
    rows = completion.distributions
    return asdict(replace(completion, distributions=None, alternatives=())) | {
        "alternatives": [completion_to_json(alternative) for alternative in completion.alternatives],
        "distributions": None if rows is None else distributions.to_json(rows),
    }


def completion_from_json(data: dict[str, Any]) -> Completion:
    """Read what `completion_to_json` wrote. Raises `ValueError`."""
    return _completion(data, alternatives=tuple(_completion(one) for one in _listed(data.get("alternatives", []))))


def fits(request: Request, completion: Completion, *, keep_top: int) -> bool:
    """Whether a completion can be the answer to a request of which `keep_top` tokens of each distribution were kept."""
    row_type = distributions.row_type(keep_top)
    answers = (completion, *completion.alternatives)
    return len(answers) == request.num_completions and all(
        len(one.logprobs) == len(one.token_ids)
        and len(one.tokens) == (len(one.token_ids) if request.detokenize else 0)
        and (not request.echo or one.num_prompt_tokens <= len(one.token_ids))
        and (not keep_top or (one.distributions is not None and one.distributions.dtype == row_type))
        for one in answers
    )


def _completion(data: object, alternatives: tuple[Completion, ...] = ()) -> Completion:
    if not isinstance(data, dict):
        raise ValueError(f"an answer is {typed.show(data)}, not an object")
    told = {name: value for name, value in data.items() if name not in ("alternatives", "distributions")}
    rows = data.get("distributions")
    found = typed.read(
        Completion,
        told,
        alternatives=alternatives,
        distributions=None if rows is None else distributions.from_json(rows),
    )
    if not all(0 <= token < 2**31 for token in found.token_ids):
        raise ValueError("an answer holds a token that there is not")
    if not all(logprob <= distributions.ROUNDING for logprob in found.logprobs):  # what is no number is not less either
        raise ValueError("an answer holds no logarithm of a probability where one belongs")
    return found


def _listed(values: object) -> list[Any]:
    if not isinstance(values, list):
        raise ValueError(f"alternatives is {typed.show(values)}, not a list")
    return values
