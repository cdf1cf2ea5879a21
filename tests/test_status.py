"""What a run says of itself in its directory, and how that is shown."""

import io
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from rich.console import Console, RenderableType

from flexeval.errors import ResultsError
from flexeval.files import read_json, write_json
from flexeval.live import line, picture, standing
from flexeval.meter import Answering, TaskCount
from flexeval.progress import LineProgress, Update, View, choose_progress
from flexeval.status import STATUS_FILE, Life, Reporter, RunStatus, State

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ANSWERING = Answering(
    setting="w4",
    num_requests=400,
    num_done=100,
    num_resumed=20,
    tasks=tuple(TaskCount(name=f"task {number}", num_requests=20, num_done=number) for number in range(21)),
    elapsed_s=75.0,
    num_sweeps=3,
    sweep_share=0.25,
    num_planned_sweeps=12,
    tokens_per_s=1500.0,
    planned_tokens_per_s=2000.0,
    left_s=120.0,
    used_bytes={"gpu": 2**30, "cpu": 2**20},
    planned_bytes={"gpu": 2**31},
)


def shown(renderable: RenderableType) -> str:
    screen = io.StringIO()
    Console(file=screen, width=110, color_system=None).print(renderable)
    return screen.getvalue()


def status(**changes: object) -> RunStatus:
    whole = RunStatus(
        host=socket.gethostname(),
        pid=os.getpid(),
        process_began=psutil.Process().create_time(),
        began="2026-01-02T03:00:00+00:00",
        updated="2026-01-02T03:04:03+00:00",
        state=State.RUNNING,
        settings=["none", "w4"],
        num_settings_done=1,
        activity="w4: answering",
        answering=ANSWERING,
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


class Silence:
    def say(self, text: str) -> None:
        pass

    @contextmanager
    def activity(self, label: str) -> Iterator[Update]:
        yield lambda num_done, num_steps: None

    @contextmanager
    def watch(self, view: View) -> Iterator[None]:
        yield


def test_a_line_says_what_is_done_how_fast_and_how_long_still() -> None:
    assert line(ANSWERING) == (
        "w4: 100 of 400 requests, 3 sweeps done of 12 planned, 25% of the next, "
        "1,500 tokens/s, 0.75\N{MULTIPLICATION SIGN} of the plan's 2,000, about 2 min 00 s left"
    )
    end = replace(ANSWERING, num_done=400, left_s=0.0, sweep_share=0.0, planned_tokens_per_s=None)
    assert line(end) == "w4: 400 of 400 requests in 1 min 15 s, 3 sweeps done of 12 planned, 1,500 tokens/s"


def test_a_picture_lists_tasks_under_way_first_and_counts_the_others() -> None:
    text = shown(picture(ANSWERING))
    for part in ("100 of 400 requests, 25%", "1.0 GiB in use of 2.0 GiB planned", "1.0 MiB in use "):
        assert part in text
    assert "task 1 " in text and "task 20" not in text and "task 0 " not in text
    assert "1 of 21 tasks done; 8 more wait" in text
    assert "399 of 400 requests, 99%" in shown(picture(replace(ANSWERING, num_done=399))), "100 % is when all are done"


def test_names_cannot_act_on_a_terminal() -> None:
    hostile = replace(
        ANSWERING, setting="[red]\x1b[2J", tasks=(TaskCount(name="\x1b]0;x", num_requests=2, num_done=1),)
    )
    text = shown(picture(hostile)) + line(hostile)
    assert "\x1b" not in text and "[red]\\u001b[2J" in text


@pytest.mark.parametrize(
    ("changes", "life", "words"),
    [
        (
            {},
            Life.ALIVE,
            ["Running: process", "since 2026-01-02 03:00:00 UTC", "none, w4; 1 of 2 done", "w4: answering"],
        ),
        ({}, Life.GONE, ["Stopped without a word", "is gone, last heard of 2 s ago", "flexeval resume"]),
        ({}, Life.UNKNOWN, ["Running, as far as it said", "cannot be seen"]),
        ({"updated": "2026-01-02T03:00:00+00:00"}, Life.ALIVE, ["last heard of 4 min 05 s ago"]),
        ({"updated": "yesterday"}, Life.ALIVE, ["Running: process"]),
        ({"state": State.DONE}, Life.GONE, ["Done: process", "until 2026-01-02 03:04:03 UTC"]),
        ({"state": State.FAILED, "problem": "disk full"}, Life.GONE, ["Failed: disk full", "flexeval resume"]),
        ({"state": State.INTERRUPTED}, Life.GONE, ["Interrupted", "flexeval resume"]),
        ({"activity": "w4: scoring", "num_steps": 9, "num_steps_done": 4}, Life.ALIVE, ["w4: scoring, 4 of 9"]),
    ],
)
def test_a_run_is_told_from_outside(changes: dict[str, object], life: Life, words: list[str]) -> None:
    text = " ".join(shown(standing(status(**changes), life, NOW)).split())
    for word in words:
        assert word in text


def test_a_process_lives_is_gone_or_cannot_be_seen() -> None:
    assert status().life() is Life.ALIVE
    assert status(process_began=psutil.Process().create_time() - 60).life() is Life.GONE, "its number was used again"
    assert status(host="elsewhere").life() is Life.UNKNOWN
    child = subprocess.Popen([sys.executable, "-c", ""])
    began = psutil.Process(child.pid).create_time()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert status(pid=child.pid, process_began=began).life() is Life.GONE, "it has ended and was not waited for"
    child.wait()
    assert status(pid=child.pid, process_began=began).life() is Life.GONE


def test_a_reporter_writes_what_goes_on(tmp_path: Path) -> None:
    view = View(lambda: ANSWERING, picture, line)
    with Reporter(Silence(), tmp_path, ["none", "w4"]) as reporter:
        assert RunStatus.load(tmp_path).activity == "beginning"
        with reporter.activity("none: scoring") as update:
            update(2, 9)
            reporter.write()
        found = RunStatus.load(tmp_path)
        assert (found.activity, found.num_steps_done, found.num_steps) == ("none: scoring", 2, 9)
        assert found.life() is Life.ALIVE and found.pid == os.getpid()
        reporter.end_setting()
        with reporter.watch(view):
            reporter.write()
            found = RunStatus.load(tmp_path)
            assert found.answering == ANSWERING and found.activity == "w4: answering"
            assert found.num_settings_done == 1
    assert RunStatus.load(tmp_path).state is State.DONE
    assert abs(datetime.fromisoformat(RunStatus.load(tmp_path).updated) - datetime.now(UTC)) < timedelta(minutes=5)
    assert [path.name for path in tmp_path.iterdir()] == [STATUS_FILE]


@pytest.mark.parametrize(
    ("error", "state", "problem"),
    [(ValueError("no room"), State.FAILED, "no room"), (KeyboardInterrupt(), State.INTERRUPTED, "")],
)
def test_a_run_that_ends_badly_says_so(tmp_path: Path, error: BaseException, state: State, problem: str) -> None:
    with pytest.raises(type(error)), Reporter(Silence(), tmp_path, ["none"]):
        raise error
    found = RunStatus.load(tmp_path)
    assert (found.state, found.problem) == (state, problem)


def test_a_status_that_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    (tmp_path / STATUS_FILE).mkdir()
    with Reporter(Silence(), tmp_path, ["none"]):
        pass


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"cannot tell how a run stands.*status.json.*flexeval run"):
        RunStatus.load(tmp_path)
    write_json(tmp_path / STATUS_FILE, asdict(status()) | {"pid": "1"})
    with pytest.raises(ResultsError, match="pid is '1', not a whole number"):
        RunStatus.load(tmp_path)
    write_json(tmp_path / STATUS_FILE, asdict(status()))
    assert RunStatus.load(tmp_path).life() is Life.ALIVE
    assert read_json(tmp_path / STATUS_FILE)["state"] == "running"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_long_work_leaves_a_line(is_terminal: bool) -> None:
    screen = io.StringIO()
    progress = choose_progress(Console(file=screen, force_terminal=is_terminal, width=200, color_system=None))
    with pytest.raises(KeyboardInterrupt), progress.watch(View(lambda: ANSWERING, picture, line)):
        raise KeyboardInterrupt
    assert screen.getvalue().endswith(f"{line(ANSWERING)}\n")
    assert ("100 of 400 requests, 25%" in screen.getvalue()) == is_terminal


def test_a_log_hears_of_work_that_finishes_nothing_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("flexeval.progress._SECONDS_BETWEEN_LINES", 0.0)
    with LineProgress(lines.append).watch(View(lambda: ANSWERING, picture, line)):
        while len(lines) < 3:  # no end, no test: another thread writes them
            pass
    assert set(lines) == {line(ANSWERING)}
