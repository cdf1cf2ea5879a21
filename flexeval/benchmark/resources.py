"""Where `run_specs/` and `tasks/` lie, and how task files become modules. Knows folders; must not know HELM.

The project's own folders come first: inside the package when it was installed from a wheel, beside it in a checkout.
The working directory's folders of the same name come second, so that a user adds a suite or a task without a fork.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import flexeval
from flexeval.errors import ConfigError

TASKS_PACKAGE = "flexeval_tasks"
"""Task files are imported as `flexeval_tasks.<file name>`: the name that HELM's `class_name` strings use."""


def resource_folders(name: str) -> list[Path]:
    """Return the folders called `name` that exist, the project's own first."""
    package = Path(flexeval.__file__).resolve().parent
    installed = package / name
    own = installed if installed.is_dir() else package.parent / name
    folders = dict.fromkeys([own, (Path.cwd() / name).resolve()])
    return [folder for folder in folders if folder.is_dir()]


def import_tasks() -> list[ModuleType]:
    """Import every task file, which registers its run specs with HELM. Files already imported are left as they are.

    Raises:
        ConfigError: A task file cannot be imported, or two files have the same name.
    """
    _ensure_package()
    paths = [path for folder in resource_folders("tasks") for path in sorted(folder.glob("*.py"))]
    return [_import_task(path) for path in paths if not path.name.startswith("_")]


def _ensure_package() -> None:
    if TASKS_PACKAGE not in sys.modules:
        package = ModuleType(TASKS_PACKAGE)
        package.__path__ = []  # makes it a package that has no folder of its own
        sys.modules[TASKS_PACKAGE] = package


def _import_task(path: Path) -> ModuleType:
    name = f"{TASKS_PACKAGE}.{path.stem}"
    if known := sys.modules.get(name):
        if known.__file__ != str(path):
            raise ConfigError(
                f"two task files are called {path.name}", where=f"{known.__file__}, {path}", mend="Rename one of them"
            )
        return known
    return import_file(path, name)


def import_file(path: Path, name: str) -> ModuleType:
    """Import a Python file as the module `name`. Raises `ConfigError` for whatever it fails with."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, f"{path} is not a Python file"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        what = f"cannot import a task's file: {type(error).__name__}: {error}"
        mend = "Correct the file, or install what it imports"
        raise ConfigError(what, where=str(path), mend=mend) from error
    return module
