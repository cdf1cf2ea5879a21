"""A function in a process of its own: its result, its failures and its progress come back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flexeval.bench.child import ChildFailure, run_in_child
from flexeval.errors import ConfigError, FlexevalError
from flexeval.progress import Progress, Update


class Recorder:
    """Progress that is remembered."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def say(self, text: str) -> None:
        self.events.append(text)

    @contextmanager
    def activity(self, label: str) -> Iterator[Update]:
        self.events.append(f"begin {label}")
        yield lambda num_done, num_steps: self.events.append((num_done, num_steps))
        self.events.append(f"end {label}")


def work(job: int, progress: Progress) -> tuple[int, int]:
    with progress.activity("counting") as update:
        for step in range(job):
            update(step + 1, job)
    progress.say("counted")
    with progress.activity("resting"):
        pass
    return os.getpid(), job * job


def fail(job: str, progress: Progress) -> None:
    with progress.activity("trying"):
        if job == "mistake":
            raise ConfigError("it is wrong", where="there", mend="Mend it")
        if job == "bug":
            raise ZeroDivisionError("seven")
        os.kill(os.getpid(), signal.SIGKILL)


def wait_for_an_end(job: Path, progress: Progress) -> None:
    job.touch()
    try:
        progress.say("waiting")
        time.sleep(60)
    finally:
        job.unlink()


def test_the_result_comes_from_another_process_and_its_progress_is_shown() -> None:
    recorder = Recorder()
    pid, square = run_in_child(work, 3, recorder, what="work")
    assert square == 9
    assert pid != os.getpid()
    steps = [event for event in recorder.events if isinstance(event, tuple)]
    assert steps[-1] == (3, 3), "the last step is always shown"
    others = [event for event in recorder.events if event not in steps]
    assert others == ["begin counting", "end counting", "counted", "begin resting", "end resting"]


def test_what_goes_wrong_there_goes_wrong_here() -> None:
    with pytest.raises(ConfigError, match=r"it is wrong \(there\). Mend it"):
        run_in_child(fail, "mistake", Recorder(), what="work")
    with pytest.raises(ChildFailure, match="ZeroDivisionError: seven"):
        run_in_child(fail, "bug", Recorder(), what="work")
    with pytest.raises(FlexevalError, match=r"work was ended by the system \(exit code -9\)"):
        run_in_child(fail, "death", Recorder(), what="work")


def test_a_child_that_is_not_wanted_any_more_cleans_up(tmp_path: Path) -> None:
    class Impatient(Recorder):
        def say(self, text: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_child(wait_for_an_end, tmp_path / "file", Impatient(), what="work")
    assert list(tmp_path.iterdir()) == []
