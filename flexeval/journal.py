"""Completed requests, durable: a run that is killed goes on where it stopped.

One file per model, setting and arithmetic, one JSON object a line, appended and synced after each sweep. A line that
was cut short by a crash is dropped when the file is opened again. Knows requests and files; not who answers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexeval.request import Completion, FinishReason, Request


class Journal:
    """Answers to requests, by the hash of the request. Use it in a `with` block."""

    def __init__(self, path: Path):
        """Open or begin a journal; `path` names everything that answers depend on beside the request."""
        self._completions: dict[str, dict[str, Any]] = {}
        self.usages: list[dict[str, Any]] = []
        """What each session that wrote here has used, in order."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        self._file.truncate(self._read())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, request: Request) -> Completion | None:
        """The answer to a request, if it is there."""
        data = self._completions.get(request.content_hash())
        return None if data is None else _read_completion(data)

    def add(self, answers: Iterable[tuple[Request, Completion]]) -> None:
        """Make answers durable: they are on disk when this returns."""
        entries = {request.content_hash(): asdict(completion) for request, completion in answers}
        self._append({"key": key, "completion": data} for key, data in entries.items())
        self._completions.update(entries)

    def add_usage(self, usage: dict[str, Any]) -> None:
        """Note what a session has used."""
        self._append([{"usage": usage}])
        self.usages.append(usage)

    def _append(self, entries: Iterable[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> int:
        """Read the lines that are whole; return where they end."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            end += len(line)
            if "usage" in entry:
                self.usages.append(entry["usage"])
            else:
                self._completions[entry["key"]] = entry["completion"]
        return end


def _read_completion(data: dict[str, Any]) -> Completion:
    lists = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
    return Completion(
        **data
        | lists
        | {
            "finish_reason": FinishReason(data["finish_reason"]),
            "alternatives": tuple(map(_read_completion, data["alternatives"])),
        }
    )
