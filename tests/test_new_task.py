"""A task that was begun for somebody: it is asked at once, and never takes the place of another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helm_support import build_card, run_suite

from flexeval.benchmark import new_task
from flexeval.benchmark.new_task import Kind, write_task
from flexeval.benchmark.suites import load_suite
from flexeval.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "metric", "max_tokens"),
    [(Kind.MULTIPLE_CHOICE, "exact_match", 1), (Kind.GENERATION, "quasi_exact_match", 20)],
)
def test_it_is_asked_at_once(
    kind: Kind, metric: str, max_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"begun_{kind.name.lower()}"
    written = write_task(name, kind, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        f"tasks/{name}.py",
        f"tasks/{name}.jsonl",
        f"run_specs/{name}.conf",
    ]
    requests, _, scored = run_suite(load_suite(name), tmp_path / "out", build_card())
    (info,) = scored.tasks
    assert (info.metric, info.split) == (metric, "test")
    assert len(requests) == len(scored.instances) == 4
    for request in requests:
        assert request.max_tokens == max_tokens
        assert request.prompt.count("Question: ") == 3 and request.prompt.endswith("\nAnswer:"), (
            "two examples before it"
        )


@pytest.mark.parametrize("kind", Kind)
def test_it_is_in_good_style(kind: Kind, tmp_path: Path) -> None:
    task, *_ = write_task("an_example", kind, tmp_path)
    root = Path(new_task.__file__).parents[2]
    ruff = [sys.executable, "-m", "ruff", "--config", str(root / "pyproject.toml")]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([ruff[0], *ruff[1:3], *command, *ruff[3:], str(task)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["", "Cities", "2cities", "my-task", "my task", "../evil", "class", "a" * 70])
def test_names_that_will_not_do_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be a task's name"):
        write_task(name, Kind.GENERATION, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("taken", ["tasks/mine.py", "tasks/mine.jsonl", "run_specs/mine.conf"])
def test_nothing_is_written_over(taken: str, tmp_path: Path) -> None:
    path = tmp_path / taken
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(ConfigError, match="such a file already") as caught:
        write_task("mine", Kind.GENERATION, tmp_path)
    assert str(path) in str(caught.value)
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["mine"]
