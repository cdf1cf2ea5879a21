"""`flexeval status`: options, and what is printed. Nothing is imported before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_SECONDS_BETWEEN_LOOKS = 1.0


def status(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `flexeval run` writes to.")],
    watch: Annotated[bool, typer.Option("--watch", help="Look again every second until the run has ended.")] = False,
) -> None:
    """Say how a run stands that goes on in another shell: who runs it, what is done, how fast, until when."""
    import time
    from contextlib import suppress
    from datetime import UTC, datetime

    from rich.console import Console, RenderableType
    from rich.live import Live

    from flexeval.live import standing
    from flexeval.status import Life, RunStatus, State

    def look() -> tuple[RenderableType, bool]:
        found = RunStatus.load(directory)
        life = found.life()
        has_ended = found.state is not State.RUNNING or life is Life.GONE
        return standing(found, life, datetime.now(UTC)), has_ended

    console = Console()
    picture, has_ended = look()
    if not watch or has_ended:
        console.print(picture)
        return
    with suppress(KeyboardInterrupt), Live(picture, console=console, auto_refresh=False) as live:
        while not has_ended:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            picture, has_ended = look()
            live.update(picture, refresh=True)
