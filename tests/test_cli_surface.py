"""The command line: its commands, their options and the kinds of its errors stay what they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from cli_calls import call

from flexeval.cli import app
from flexeval.errors import FlexevalError


def test_commands_about_data_stay_what_they_are() -> None:
    group = typer.main.get_group(app).commands["data"]
    options = {
        name: sorted(option for parameter in command.params for option in parameter.opts)
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert options == {
        "check": ["--json", "--sizes", "--suite", "--verify"],
        "fetch": ["--suite"],
        "export": ["--out", "--suite", "-o"],
        "import": ["source"],
    }


def test_options_stay_what_they_are() -> None:
    options = {
        name: sorted(option for parameter in command.params for option in parameter.opts)
        for name, command in typer.main.get_group(app).commands.items()
    }
    assert options == {
        "run": [
            "--chat-template",
            "--cpu-memory",
            "--deterministic",
            "--device",
            "--disk",
            "--dry-run",
            "--dtype",
            "--fresh",
            "--gpu-memory",
            "--keep-top",
            "--max-eval-instances",
            "--model",
            "--out",
            "--policy",
            "--setting",
            "--skip-missing",
            "--suite",
        ],
        "bench": [
            "--cpu-memory",
            "--device",
            "--disk",
            "--dtype",
            "--gen-len",
            "--gpu-memory",
            "--max-eval-instances",
            "--model",
            "--num-requests",
            "--out",
            "--peer",
            "--peer-batch-size",
            "--peer-gen-len",
            "--peer-requests",
            "--policy",
            "--prompt-len",
            "--ragged",
            "--repeat",
            "--scale",
            "--score",
            "--seed",
            "--setting",
            "--shared-prefix",
            "--skip-missing",
            "--suite",
            "--warm-up",
        ],
        "plan": [
            "--chat-template",
            "--cpu-memory",
            "--deterministic",
            "--device",
            "--disk",
            "--dtype",
            "--gpu-memory",
            "--max-eval-instances",
            "--model",
            "--out",
            "--policy",
            "--setting",
            "--skip-missing",
            "--suite",
        ],
        "resume": ["directory"],
        "status": ["--watch", "directory"],
        "profile": ["--device", "--disk", "--dtype", "--repeat"],
        "check": [
            "--any-machine",
            "--any-model",
            "--baseline",
            "--bench",
            "--junit",
            "--markdown",
            "--setting",
            "--shared-only",
            "--speed-tolerance",
            "--strict",
            "--tolerance",
            "--update",
            "directories",
        ],
        "compare": [
            "--max-eval-instances",
            "--model",
            "--models",
            "--out",
            "--settings",
            "--shared-only",
            "--suite",
            "directories",
        ],
        "data": [],
        "prepare": ["--chat-template", "--max-eval-instances", "--model", "--out", "--skip-missing", "--suite", "-o"],
        "execute": [
            "--cpu-memory",
            "--deterministic",
            "--device",
            "--disk",
            "--dtype",
            "--fresh",
            "--gpu-memory",
            "--keep-top",
            "--model",
            "--out",
            "--policy",
            "--setting",
            "-o",
            "prompts",
        ],
        "new-task": ["--kind", "name"],
        "score": ["--out", "-o", "answers", "prompts"],
        "prepare-model": ["--device", "--dtype", "--model", "--out", "--setting"],
        "report": ["directory"],
        "schema": ["file"],
    }


def test_help_goes_to_the_screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert (call(monkeypatch, "--help"), call(monkeypatch, "--version"), call(monkeypatch)) == (0, 0, 2)
    assert capsys.readouterr().err == ""


def test_every_kind_of_error_is_documented() -> None:
    def kinds(base: type[FlexevalError]) -> Iterator[type[FlexevalError]]:
        for kind in base.__subclasses__():
            if kind.__module__ == "flexeval.errors":
                yield kind
            yield from kinds(kind)

    page = (Path(__file__).parents[1] / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted({(kind.code, kind.__name__) for kind in kinds(FlexevalError)})
    assert len({code for code, _ in rows}) == len(rows) == 9
