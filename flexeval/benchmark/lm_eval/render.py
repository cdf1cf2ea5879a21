"""Templates of Jinja filled in, in a process of their own: a stranger's template may neither reach anything nor hang.

The other end, `_render_child.py`, is a sandboxed environment under limits of processor time and memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexeval.errors import ConfigError

_CHILD = Path(__file__).parent / "_render_child.py"
MAX_SECONDS = 60
"""Processor time for all rows of a task."""


def render(
    templates: Sequence[str], rows: Sequence[Mapping[str, Any]], *, where: str, max_seconds: int = MAX_SECONDS
) -> list[list[str]]:
    """Return, for each template, its text for each row.

    Raises:
        ConfigError: A template is wrong, wants a column that is not there, or takes too much time or memory; or a row
            holds what is neither text nor number.
    """
    if not templates or not rows:
        return [[] for _ in templates]
    try:
        work = json.dumps({"templates": list(templates), "rows": list(rows), "max_seconds": max_seconds})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"a row is not plain data: {error}", where=where, mend="Use a dataset of texts and numbers"
        ) from error
    mend = "Correct the template"
    command = [sys.executable, "-P", "-X", "utf8", str(_CHILD)]
    try:
        done = subprocess.run(
            command, input=work.encode(), capture_output=True, timeout=2 * max_seconds + 10, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"a template takes more than {max_seconds} s", where=where, mend=mend) from error
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        reason = "too much memory" if "MemoryError" in last[0] else f"more than {max_seconds} s, or fails: {last[0]}"
        raise ConfigError(f"a template takes {reason}", where=where, mend=mend)
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ConfigError(answer["error"], where=where, mend=mend)
    texts: list[list[str]] = answer["texts"]
    return texts
