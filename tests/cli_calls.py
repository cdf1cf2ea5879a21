"""Calling the command line as a shell would."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flexeval.cli import main


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line as the shell would; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["flexeval", *map(str, arguments)])
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def assert_mistake(
    code: int, capsys: pytest.CaptureFixture[str], *words: str, out: Path | None = None, lines: int = 1
) -> None:
    errors = capsys.readouterr().err.splitlines()
    assert code == 2, errors
    assert len(errors) == lines and errors[0].startswith("flexeval: error["), errors
    assert all(word.lower() in errors[0].lower() for word in words), errors
    assert out is None or not out.exists()
