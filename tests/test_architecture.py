"""The arrows of docs/architecture.md, read from the imports of every file: none up, none in a circle."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import flexeval

ROOT = Path(__file__).parent.parent
PACKAGE = "flexeval"
DOOR = "flexeval/__init__.py"


class Ban(NamedTuple):
    """Modules that some files may not import."""

    files: str
    """Pattern over paths from the root of the repository; `*` crosses folders."""
    modules: tuple[str, ...]
    unless: tuple[str, ...] = ()
    """Patterns of files that may."""


BANS = (
    Ban("flexeval/*", ("helm",), unless=("flexeval/benchmark/helm/*", "flexeval/helm_plugin.py")),
    Ban("flexeval/benchmark/*", ("torch", "flexeval.engine", "flexeval.backends")),
    Ban("flexeval/report/*", ("torch", "transformers", "flexeval.engine", "flexeval.backends")),
    Ban("flexeval/planning/*", ("torch", "transformers")),
    Ban(
        "flexeval/policy/*",
        ("torch", "transformers"),
        unless=("flexeval/policy/hardware.py", "flexeval/policy/rates/*"),
    ),
    Ban("flexeval/engine/*", ("tokenizers", "flexeval.benchmark", "flexeval.report", "flexeval.models")),
    Ban("flexeval/engine/compute/*", ("flexeval.engine.memory",)),
    Ban("tasks/*", ("torch", "flexeval.engine", "flexeval.backends")),
)


class Arrow(NamedTuple):
    """One file imports a module."""

    file: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def module_names(root: Path) -> set[str]:
    paths = (path.relative_to(root).with_suffix("") for path in (root / PACKAGE).rglob("*.py"))
    return {".".join(path.parts).removesuffix(".__init__") for path in paths}


def arrows(root: Path) -> Iterator[Arrow]:
    """Every import in the package and in tasks/, function-level ones included; our own by the file they mean."""
    modules = module_names(root)
    for folder in (PACKAGE, "tasks"):
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{name}:{node.lineno} is a relative import"
                    found = [meant(str(node.module), alias.name, modules) for alias in node.names]
                else:
                    continue
                yield from (Arrow(name, node.lineno, module) for module in found)


def meant(module: str, name: str, modules: set[str]) -> str:
    """The file that `from module import name` reaches; names of the package itself are taken home."""
    if module == PACKAGE and name in flexeval._HOME:
        return flexeval._HOME[name]
    inner = f"{module}.{name}"
    return inner if inner in modules else module


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module: str) -> str:
    """`flexeval.engine.memory.tier` lies in `engine`."""
    return module.split(".")[1]


def floors(root: Path) -> dict[str, int]:
    """Room to floor, counted from the top, as docs/architecture.md says."""
    text = (root / "docs/architecture.md").read_text()
    block = text.split("```floors\n")[1].split("```")[0]
    return {room: floor for floor, line in enumerate(block.splitlines()) for room in line.split()}


def inner_arrows(root: Path) -> list[Arrow]:
    """Arrows between our own modules; the package's own `__init__` is the door to all of them."""
    return [
        arrow
        for arrow in arrows(root)
        if arrow.module.startswith(f"{PACKAGE}.") and arrow.file.startswith(f"{PACKAGE}/") and arrow.file != DOOR
    ]


def arrows_up(root: Path) -> list[str]:
    floor_of = floors(root)
    return [
        str(arrow)
        for arrow in inner_arrows(root)
        if (here := room_of(module_of(arrow.file))) != (there := room_of(arrow.module))
        and floor_of[here] >= floor_of[there]
    ]


def circle(root: Path) -> list[str]:
    """Files that import each other, directly or through others; a package's `__init__` counts as a file."""
    graph: dict[str, set[str]] = {}
    for arrow in inner_arrows(root):
        graph.setdefault(module_of(arrow.file), set()).add(arrow.module)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def banned(root: Path) -> list[str]:
    return [
        str(arrow)
        for arrow in arrows(root)
        for ban in BANS
        if fnmatch(arrow.file, ban.files)
        and not any(fnmatch(arrow.file, pattern) for pattern in ban.unless)
        and any(arrow.module == module or arrow.module.startswith(f"{module}.") for module in ban.modules)
    ]


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(module) for module in module_names(ROOT) if module != PACKAGE}
    assert rooms - floors(ROOT).keys() == set()


def test_no_arrow_runs_up() -> None:
    assert arrows_up(ROOT) == []


def test_no_files_import_each_other() -> None:
    assert circle(ROOT) == []


def test_nobody_imports_what_it_must_not_know() -> None:
    assert banned(ROOT) == []


@pytest.mark.parametrize("module", ["flexeval", "flexeval.cli"])
def test_the_command_line_starts_without_the_heavy_libraries(module: str) -> None:
    heavy = {"torch", "transformers", "helm", "datasets", "pandas", "scipy", "plotly"}
    program = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == []


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """A repository of four floors, from `pipeline` down to `errors`."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/architecture.md").write_text("```floors\npipeline\nbackends\nreport planning\nerrors\n```\n")
    for name in ("__init__", "pipeline", "errors", "report/__init__", "report/page", "planning/__init__"):
        path = tmp_path / PACKAGE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "source", "finds"),
    [
        ("pipeline", "from flexeval.errors import FlexevalError", []),
        ("errors", "from flexeval import pipeline", ["flexeval/errors.py:1 imports flexeval.pipeline"]),
        ("report/page", "from flexeval import Engine", ["flexeval/report/page.py:1 imports flexeval.backends.native"]),
        ("errors", "def f():\n    import flexeval.pipeline", ["flexeval/errors.py:2 imports flexeval.pipeline"]),
        ("report/page", "from flexeval.report import other", []),
        ("report/page", "from flexeval.planning import x", ["flexeval/report/page.py:1 imports flexeval.planning"]),
    ],
)
def test_an_arrow_up_is_found(small_tree: Path, file: str, source: str, finds: list[str]) -> None:
    (small_tree / PACKAGE / f"{file}.py").write_text(source)
    assert arrows_up(small_tree) == finds


def test_a_circle_is_found(small_tree: Path) -> None:
    (small_tree / PACKAGE / "report/page.py").write_text("from flexeval.report import __init__")
    (small_tree / PACKAGE / "report/__init__.py").write_text("from flexeval.report.page import show")
    assert set(circle(small_tree)) == {"flexeval.report", "flexeval.report.page"}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("flexeval/report/page.py", "import torch.nn"),
        ("flexeval/pipeline.py", "from helm.common import request"),
        ("flexeval/planning/__init__.py", "def f():\n    from torch import Tensor"),
    ],
)
def test_a_banned_import_is_found(small_tree: Path, file: str, source: str) -> None:
    assert banned(small_tree) == []
    (small_tree / file).write_text(source)
    assert len(banned(small_tree)) == 1
