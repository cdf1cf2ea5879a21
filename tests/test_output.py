"""A run's directory is one run's at a time, and goes again where nothing came of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexeval.errors import ConfigError
from flexeval.output import output_directory


def test_two_runs_do_not_write_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_directory(out, kept="*"):
        with (
            pytest.raises(ConfigError, match=rf"another run writes here: process {os.getpid()} on .+, since 20"),
            output_directory(out, kept="*"),
        ):
            raise AssertionError
        assert out.is_dir(), "the second run takes nothing away from the first"
    with output_directory(out, kept="*"):
        pass


def test_who_holds_it_is_not_written_through_a_link(tmp_path: Path) -> None:
    victim, out = tmp_path / "victim", tmp_path / "out"
    out.mkdir()
    victim.write_text("precious")
    (out / ".holder").symlink_to(victim)
    with output_directory(out, kept="*"):
        assert (out / ".holder").read_text().startswith(f"process {os.getpid()}")
    assert victim.read_text() == "precious" and not (out / ".holder").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_came_to_nothing_is_taken_away_with_the_parents_made_for_it(
    error: type[BaseException], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "deep" / "out"
    with pytest.raises(error), output_directory(out, kept="answers/*"):
        (out / "log").write_text("begun")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_is_worth_keeping_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError), output_directory(out, kept="answers/*"):
        (out / "answers").mkdir()
        (out / "answers" / "one").write_text("42")
        raise ValueError
    assert (out / "answers" / "one").read_text() == "42"


def test_a_directory_that_was_there_stays(tmp_path: Path) -> None:
    with pytest.raises(ValueError), output_directory(tmp_path, kept="*.jsonl"):
        raise ValueError
    assert tmp_path.is_dir()


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=f"cannot write.*{out}.*--out"), output_directory(out, kept="*"):
            raise AssertionError
    monkeypatch.setattr("os.access", lambda *_: False)  # as for anybody but the superuser
    with pytest.raises(ConfigError, match="Permission denied"), output_directory(tmp_path, kept="*"):
        raise AssertionError
