"""Task files: found, imported under a stable name, and refused by name when they are wrong."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flexeval
from flexeval.benchmark.resources import TASKS_PACKAGE, import_tasks, resource_folders
from flexeval.errors import ConfigError


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A `tasks` folder in the working directory; what is imported from it is forgotten afterwards."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def test_own_tasks_are_imported_beside_the_projects(own_tasks: Path) -> None:
    (own_tasks / "mine.py").write_text("VALUE = __name__\n")
    (own_tasks / "_helper.py").write_text("raise RuntimeError('not a task')\n")
    names = [module.__name__ for module in import_tasks()]
    assert names == [
        f"{TASKS_PACKAGE}.{stem}"
        for stem in (
            "gsm8k_packaged",
            "hellaswag_packaged",
            "humaneval_packaged",
            "lm_eval",
            "perplexity",
            "truthfulqa_packaged",
            "mine",
        )
    ]
    assert vars(sys.modules[f"{TASKS_PACKAGE}.mine"])["VALUE"] == names[-1]


def test_a_task_is_imported_once(own_tasks: Path) -> None:
    (own_tasks / "counting.py").write_text("from pathlib import Path\nPath('count').open('a').write('x')\n")
    first, second = import_tasks(), import_tasks()
    assert first == second
    assert Path("count").read_text() == "x"


@pytest.mark.parametrize("line", ["import no_such_package", "exit('no_such_package')"])
def test_a_broken_task_is_named(line: str, own_tasks: Path) -> None:
    (own_tasks / "broken.py").write_text(line + "\n")
    with pytest.raises(ConfigError, match="no_such_package") as caught:
        import_tasks()
    assert caught.value.where == str(own_tasks / "broken.py")
    assert f"{TASKS_PACKAGE}.broken" not in sys.modules


def test_two_tasks_of_one_name_are_refused(own_tasks: Path) -> None:
    (own_tasks / "gsm8k_packaged.py").write_text("")
    with pytest.raises(ConfigError, match=r"two task files are called gsm8k_packaged\.py"):
        import_tasks()


def test_the_checkout_counts_once_when_it_is_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert resource_folders("tasks") == [Path(__file__).resolve().parent.parent / "tasks"]


def test_an_installed_package_carries_its_own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages/flexeval"
    (package / "run_specs").mkdir(parents=True)
    (package.parent / "run_specs").mkdir()  # another package's, beside ours
    monkeypatch.setattr(flexeval, "__file__", str(package / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert resource_folders("run_specs") == [package / "run_specs"]
