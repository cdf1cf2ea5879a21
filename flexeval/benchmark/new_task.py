"""A task of a user's own, to begin with: a task file that works, questions to replace, a suite that asks them."""

from __future__ import annotations

import json
import keyword
import re
from enum import StrEnum
from pathlib import Path
from string import Template
from typing import Any

from flexeval.errors import ConfigError
from flexeval.files import write_text

_TEMPLATES = Path(__file__).parent / "templates"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class Kind(StrEnum):
    """How a task is asked."""

    MULTIPLE_CHOICE = "multiple-choice"
    GENERATION = "generation"


_CITIES = {"France": "Paris", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo", "Cuba": "Havana"}


def write_task(name: str, kind: Kind, folder: Path) -> list[Path]:
    """Write `tasks/NAME.py`, `tasks/NAME.jsonl` and `run_specs/NAME.conf` below `folder`.

    Raises:
        ConfigError: The name will not do, or one of the files is there already; nothing is written then.
    """
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        mend = "Begin with a letter; lower-case letters, digits and _ may follow: capital_cities"
        raise ConfigError(f"{name!r} cannot be a task's name", mend=mend)
    words = {
        "name": name,
        "title": name.replace("_", " ").capitalize(),
        "class_name": "".join(part.capitalize() for part in name.split("_")),
    }
    template = Template((_TEMPLATES / f"{kind.replace('-', '_')}.py.txt").read_text(encoding="utf-8"))
    lines = [json.dumps(row) for row in _questions(kind)]
    texts = {
        folder / "tasks" / f"{name}.py": template.safe_substitute(words),
        folder / "tasks" / f"{name}.jsonl": "\n".join(lines) + "\n",
        folder / "run_specs" / f"{name}.conf": (
            f'description: "{words["title"]}"\n\nentries: [\n  {{description: "{name}:model=text", priority: 1}}\n]\n'
        ),
    }
    for path in texts:
        if path.exists():
            raise ConfigError("there is such a file already", where=str(path), mend="Choose another name")
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def _questions(kind: Kind) -> list[dict[str, Any]]:
    cities = list(_CITIES.values())
    rows: list[dict[str, Any]] = []
    for index, (country, city) in enumerate(_CITIES.items()):
        question = f"What is the capital of {country}?"
        if kind is Kind.GENERATION:
            rows.append({"question": question, "answers": [city]})
        else:
            choices = sorted([city, *(cities[(index + shift) % len(cities)] for shift in (1, 2, 3))])
            rows.append({"question": question, "choices": choices, "answer": choices.index(city)})
    return rows
