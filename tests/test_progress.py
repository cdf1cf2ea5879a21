"""What a person who waits gets to see: on a terminal a bar, in a log a line now and then."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from flexeval.progress import LineProgress, TerminalProgress, choose_progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set by the test."""
    now = [0.0]
    monkeypatch.setattr("flexeval.progress.time.monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then(clock: list[float]) -> None:
    lines: list[str] = []
    with LineProgress(lines.append).activity("answering") as update:
        for step in range(1, 41):
            clock[0] = float(step)
            update(step, 80)
    assert lines == [
        "answering ...",
        "answering: 15 of 80, about 65 s left",
        "answering: 30 of 80, about 50 s left",
        "answering: done, 40 in 40 s",
    ]


def test_an_activity_without_steps_says_when_it_is_done(clock: list[float]) -> None:
    lines: list[str] = []
    progress = LineProgress(lines.append)
    with progress.activity("preparing smollm2") as update:
        clock[0] = 20.0
        update(0, 5)  # nothing to tell the time left from
    progress.say("by the way")
    assert lines == ["preparing smollm2 ...", "preparing smollm2: done in 20 s", "by the way"]


def test_what_fails_is_not_done() -> None:
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt), LineProgress(lines.append).activity("answering"):
        raise KeyboardInterrupt
    assert lines == ["answering ..."]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_labels_are_shown_as_they_are(is_terminal: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, width=120, color_system=None)
    progress = choose_progress(console)
    assert isinstance(progress, TerminalProgress if is_terminal else LineProgress)
    with progress.activity("preparing ./models[/old][v2]") as update:
        update(1, 2)
        progress.say("loaded [3/4]")
    assert "preparing ./models[/old][v2]" in screen.getvalue()
    assert "loaded [3/4]" in screen.getvalue()
    if is_terminal:
        assert "1/2" in screen.getvalue()
