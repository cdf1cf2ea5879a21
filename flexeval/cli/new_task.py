"""`flexeval new-task`: options, and what is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flexeval.benchmark.new_task import Kind, write_task


def new_task(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits and _.")],
    kind: Annotated[Kind, typer.Option(help="How questions are asked.")] = Kind.MULTIPLE_CHOICE,
) -> None:
    """Begin a task of your own: a short file in tasks/ that works at once, with questions to replace."""
    console = Console()
    for path in write_task(name, kind, Path.cwd()):
        console.print(f"Wrote {path.relative_to(Path.cwd())}", soft_wrap=True, highlight=False)
    console.print(f"Try it: flexeval run --suite {name}", soft_wrap=True, highlight=False)
