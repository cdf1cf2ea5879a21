"""What a run says of itself in a small file, for whoever asks from outside: `flexeval status`.

Knows the file, and whether the process that wrote it still lives; not what a run does. The file is replaced as a whole
every few seconds, and is no part of the results.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType

import psutil

from flexeval import typed
from flexeval.errors import ResultsError
from flexeval.files import read_json, write_json
from flexeval.meter import Answering
from flexeval.progress import LiveProgress, Update, View
from flexeval.ticking import ticking

STATUS_FILE = "status.json"
_SECONDS_BETWEEN_WRITES = 2.0
_SAME_START_S = 1.0
"""Two readings of when a process began may differ by so much."""


class State(StrEnum):
    """What became of a run."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


class Life(StrEnum):
    """Whether the process that wrote a status is still there."""

    ALIVE = "alive"
    GONE = "gone"
    UNKNOWN = "unknown"
    """It is another machine's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """Where a run stands."""

    host: str
    """Name of the machine it runs on."""
    pid: int
    """Its process there."""
    process_began: float
    """When that began, in seconds since 1970: numbers of processes are used again."""
    began: str
    """When the run began, ISO 8601, UTC."""
    updated: str
    """When this was written, ISO 8601, UTC."""
    state: State
    """What became of it."""
    settings: Sequence[str]
    """What it compares."""
    num_settings_done: int
    """Those that are answered and scored."""
    activity: str
    """What is being done."""
    num_steps_done: int = 0
    """Steps of it that are done."""
    num_steps: int = 0
    """Its steps; 0 where they are not counted."""
    answering: Answering | None = None
    """Where answering stands, or stood last."""
    problem: str = ""
    """Why it failed."""

    @classmethod
    def load(cls, directory: Path) -> RunStatus:
        """Read the status of a run's directory. Raises `ResultsError`."""
        path = directory / STATUS_FILE
        try:
            return typed.read(cls, read_json(path))
        except (OSError, ValueError) as error:
            what = error.strerror if isinstance(error, OSError) else str(error)
            mend = "Name a directory that `flexeval run` writes to"
            raise ResultsError(f"cannot tell how a run stands: {what}", where=str(path), mend=mend) from error

    def life(self) -> Life:
        """Whether the process that wrote this still lives, as far as this machine can tell."""
        if self.host != socket.gethostname():
            return Life.UNKNOWN
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.process_began) <= _SAME_START_S
            return Life.ALIVE if is_same and process.status() != psutil.STATUS_ZOMBIE else Life.GONE
        except (psutil.NoSuchProcess, ValueError, OverflowError):
            return Life.GONE
        except psutil.AccessDenied:
            return Life.UNKNOWN


class Reporter:
    """Progress that is shown as ever, and told to the status file of a run's directory. Use it in a `with` block."""

    def __init__(self, shown: LiveProgress, directory: Path, settings: Sequence[str]):
        self._shown = shown
        self._directory = directory
        self._settings = tuple(settings)
        self._began = _now()
        self._process_began = psutil.Process().create_time()
        self._state = State.RUNNING
        self._num_settings_done = 0
        self._activity, self._steps, self._problem = "beginning", (0, 0), ""
        self._view: View | None = None
        self._last: Answering | None = None
        self._lock = threading.Lock()
        self._ticking = ticking(self.write, every_s=_SECONDS_BETWEEN_WRITES)

    def __enter__(self) -> Reporter:
        self.write()
        self._ticking.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ticking.__exit__(None, None, None)
        if error is None:
            self._state, self._activity, self._steps = State.DONE, "", (0, 0)
        elif isinstance(error, Exception):
            self._state, self._problem = State.FAILED, str(error) or type(error).__name__
        else:
            self._state = State.INTERRUPTED
        self.write()

    def say(self, text: str) -> None:
        """Print a line."""
        self._shown.say(text)

    @contextmanager
    def activity(self, label: str) -> Iterator[Update]:
        """Show an activity, and note it."""
        self._activity, self._steps = label, (0, 0)
        with self._shown.activity(label) as update:

            def note(num_done: int, num_steps: int) -> None:
                self._steps = num_done, num_steps
                update(num_done, num_steps)

            yield note

    @contextmanager
    def watch(self, view: View) -> Iterator[None]:
        """Show where work stands, and note it."""
        self._view = view
        self._activity, self._steps = f"{view.read().setting}: answering", (0, 0)
        try:
            with self._shown.watch(view):
                yield
        finally:
            self._last, self._view = view.read(), None

    def end_setting(self) -> None:
        """Note that one more setting is answered and scored."""
        self._num_settings_done += 1

    def status(self) -> RunStatus:
        """Where the run stands now."""
        view = self._view
        return RunStatus(
            host=socket.gethostname(),
            pid=os.getpid(),
            process_began=self._process_began,
            began=self._began,
            updated=_now(),
            state=self._state,
            settings=self._settings,
            num_settings_done=self._num_settings_done,
            activity=self._activity,
            num_steps_done=self._steps[0],
            num_steps=self._steps[1],
            answering=self._last if view is None else view.read(),
            problem=self._problem,
        )

    def write(self) -> None:
        """Replace the file. Where that cannot be done the run goes on: answers are what matters."""
        with self._lock, suppress(OSError):
            write_json(self._directory / STATUS_FILE, asdict(self.status()))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
