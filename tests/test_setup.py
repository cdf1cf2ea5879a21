"""What a newcomer meets first: the Makefile, the README's commands, the dependencies."""

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from test_architecture import arrows

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.strip() for line in README.splitlines() if line.startswith("    ")]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    wide = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(command, cwd=ROOT, env=wide, capture_output=True, text=True, check=False)


def test_make_alone_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert re.findall(r"make (\w+)", run("make").stdout) == phony[1].split()


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_make_commands_of_the_readme_exist(command: str) -> None:
    result = run(*shlex.split(command), "--dry-run")
    assert result.returncode == 0, result.stderr


@cache
def options_of(*words: str) -> set[str]:
    """What the help of a command names."""
    result = run(sys.executable, "-c", "from flexeval.cli import main; main()", *words, "--help")
    assert result.returncode == 0, result.stderr
    return set(re.findall(r"--[a-z-]+", result.stdout))


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("flexeval ")])
def test_options_of_the_readme_exist(command: str) -> None:
    _, *arguments = shlex.split(command, comments=True)
    words = arguments[: 2 if arguments[0] == "data" else 1]
    assert {argument for argument in arguments if argument.startswith("--")} <= options_of(*words)


def test_an_old_python_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "python-of-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = run("make", "setup", f"PYTHON={old}", "STAMP=.venv/.never")
    assert result.returncode != 0
    assert "PYTHON=python3.11" in result.stderr


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for group, names in project["optional-dependencies"].items() if group != "dev" for name in names]
    dependencies = [*project["dependencies"], *extras, "triton"]  # which torch's CUDA builds bring
    declared = {re.split(r"[^\w.-]", dependency)[0].lower().replace("_", "-") for dependency in dependencies}
    homes = importlib.metadata.packages_distributions()
    undeclared = [
        str(arrow)
        for arrow in arrows(ROOT)
        if (root := arrow.module.split(".")[0]) not in sys.stdlib_module_names | {"flexeval", "tasks"}
        and not declared & {name.lower().replace("_", "-") for name in homes.get(root, [root])}
    ]
    assert undeclared == []
