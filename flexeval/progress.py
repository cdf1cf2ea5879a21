"""What is going on, for a person who waits: a bar with an ETA on a terminal, a line now and then elsewhere.

Knows rich and the clock; not what is being done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from flexeval.meter import Answering
from flexeval.ticking import ticking

Update = Callable[[int, int], None]
"""(steps done, steps in all)."""
_SECONDS_BETWEEN_LINES = 15.0
_PICTURES_PER_SECOND = 2.0


class View(NamedTuple):
    """What long work is watched by; called on other threads than the work's own."""

    read: Callable[[], Answering]
    """Where it stands."""
    picture: Callable[[Answering], RenderableType]
    """That, for a terminal."""
    line: Callable[[Answering], str]
    """That, for a log."""


class Progress(Protocol):
    """Shows one activity after another."""

    def say(self, text: str) -> None:
        """Print a line."""
        ...

    def activity(self, label: str) -> AbstractContextManager[Update]:
        """Show an activity while the `with` block runs; it yields the function to report steps with."""
        ...


class LiveProgress(Progress, Protocol):
    """Shows long work from all sides as well."""

    def watch(self, view: View) -> AbstractContextManager[None]:
        """Show where work stands while the `with` block runs, and once more at its end, however it ends."""
        ...


class TerminalProgress:
    """Bars on a terminal."""

    def __init__(self, console: Console):
        self._console = console

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False)

    @contextmanager
    def activity(self, label: str) -> Iterator[Update]:
        """A bar with steps, elapsed and remaining time."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self._console) as bars:
            task = bars.add_task(label, total=None)
            yield lambda num_done, num_steps: bars.update(task, completed=num_done, total=num_steps)

    @contextmanager
    def watch(self, view: View) -> Iterator[None]:
        """A picture that is drawn again twice a second; a line stays of it."""
        live = Live(
            console=self._console,
            get_renderable=lambda: view.picture(view.read()),
            refresh_per_second=_PICTURES_PER_SECOND,
            transient=True,
        )
        try:
            with live:
                yield
        finally:
            self.say(view.line(view.read()))


class LineProgress:
    """Plain lines, at most one every quarter of a minute: for logs."""

    def __init__(self, write: Callable[[str], None]):
        self._write = write

    def say(self, text: str) -> None:
        """Print a line."""
        self._write(text)

    @contextmanager
    def activity(self, label: str) -> Iterator[Update]:
        """A line when it begins, one now and then, one when it ends."""
        start = last = time.monotonic()
        done = 0
        self._write(f"{label} ...")

        def update(num_done: int, num_steps: int) -> None:
            nonlocal last, done
            done, now = num_done, time.monotonic()
            if now - last >= _SECONDS_BETWEEN_LINES and 0 < num_done < num_steps:
                last = now
                left = (now - start) / num_done * (num_steps - num_done)
                self._write(f"{label}: {num_done} of {num_steps}, about {left:.0f} s left")

        yield update
        self._write(f"{label}: done{f', {done}' if done else ''} in {time.monotonic() - start:.0f} s")

    @contextmanager
    def watch(self, view: View) -> Iterator[None]:
        """A line now and then, also where nothing is finished for long, and one at the end."""
        try:
            with ticking(lambda: self._write(view.line(view.read())), every_s=_SECONDS_BETWEEN_LINES):
                yield
        finally:
            self._write(view.line(view.read()))


def choose_progress(console: Console) -> LiveProgress:
    """Bars where somebody can see them, lines elsewhere."""
    if console.is_terminal:
        return TerminalProgress(console)
    return LineProgress(lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
