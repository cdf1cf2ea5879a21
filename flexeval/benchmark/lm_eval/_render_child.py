"""A program that `render.py` starts: fills templates in under limits, and imports nothing of flexeval.

Reads a JSON object from standard input (templates, rows, max_seconds), writes one to standard output (texts, or error).
"""

import json
import re
import sys

from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import SandboxedEnvironment

_MAX_MEMORY = 3 << 30
_MAX_CHARACTERS = 1 << 20
"""Of one text."""
_MAX_ALL = 1 << 28
"""Of all of them."""


def _limit(max_seconds: int) -> None:
    try:
        import resource
    except ImportError:  # not Unix: the other end's timeout is left
        return
    for what, most in (
        (resource.RLIMIT_CPU, max_seconds),
        (resource.RLIMIT_AS, _MAX_MEMORY),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        try:
            resource.setrlimit(what, (most, most))
        except (ValueError, OSError):
            continue  # a lower one is set already


def _regex_replace(text: str, pattern: str, repl: str, count: int = 0) -> str:
    """The one filter that lm-evaluation-harness adds to Jinja's."""
    return re.sub(pattern, repl, text, count=count)


def main() -> None:
    """Fill in every template for every row."""
    work = json.load(sys.stdin)
    _limit(work["max_seconds"])
    environment = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = _regex_replace
    texts, num_all = [], 0
    for source in work["templates"]:
        try:
            template = environment.from_string(source)
            column = []
            for row in work["rows"]:
                text = template.render(**row)
                num_all += len(text)
                if len(text) > _MAX_CHARACTERS or num_all > _MAX_ALL:
                    raise ValueError(f"more than {_MAX_CHARACTERS} characters, or {_MAX_ALL} in all")
                column.append(text)
        except MemoryError:
            raise
        except Exception as error:  # whatever a template makes of its row
            shown = source if len(source) <= 60 else source[:57] + "..."
            answer = {"error": f"the template {shown!r} fails: {type(error).__name__}: {str(error)[:200]}"}
            json.dump(answer, sys.stdout)
            return
        texts.append(column)
    json.dump({"texts": texts}, sys.stdout)


if __name__ == "__main__":
    main()
