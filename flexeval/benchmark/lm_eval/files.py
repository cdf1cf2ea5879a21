"""The YAML files of a folder of tasks, includes merged. Knows files; must not know what their keys mean.

The files may be a stranger's: nothing in them is run (`!function` becomes a name), an include stays in the folder, and
size, number and nesting are bounded.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from flexeval.errors import ConfigError

PREFIX = "lm-eval:"
"""What a `--suite` of these tasks begins with."""
_MAX_FILES = 20_000
_MAX_BYTES = 1 << 20
_MAX_VALUES = 100_000
_MAX_INCLUDES = 20


class Function(NamedTuple):
    """What a `!function` tag names: Python beside the file, which is not run here."""

    name: str
    """`utils.process_docs`."""
    folder: Path
    """Where the file lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What `lm-eval:PATH[,task=a+b][,num_fewshot=K][,limit=N]` asks for."""

    path: Path
    """A folder of tasks, or one task's file."""
    tasks: tuple[str, ...]
    """Names of the tasks, in the order given; all of the folder, by name, where none is given."""
    options: Mapping[str, int]
    """`num_fewshot` and `limit`, where they are given."""


def read_reference(text: str) -> Reference:
    """Read what stands in `--suite`.

    Raises:
        ConfigError: It is not of that form, or there are no such tasks.
    """
    head, *arguments = text.removeprefix(PREFIX).split(",")
    form = f"Write {PREFIX}PATH[,task=NAME+NAME][,num_fewshot=K][,limit=N]; PATH holds neither comma nor equals sign"
    options: dict[str, int] = {}
    wanted: tuple[str, ...] = ()
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "task" and value:
            wanted = tuple(dict.fromkeys(value.split("+")))
        elif key in ("num_fewshot", "limit") and value.isascii() and value.isdigit() and (key, value) != ("limit", "0"):
            options[key] = int(value)
        else:
            raise ConfigError(f"{argument!r} cannot be read", where=text, mend=form)
    path = Path(os.path.expanduser(head))
    if not head or "=" in head or not path.exists():
        raise ConfigError(f"there is no folder or file {head!r}", where=text, mend=form)
    path = path.resolve()
    if set(",=") & set(str(path)):
        raise ConfigError(f"the path {path} holds a comma or an equals sign", mend="Rename it")
    known = find_tasks(path)
    if unknown := [name for name in wanted if name not in known]:
        names = ", ".join(list(known)[:20]) + (", ..." if len(known) > 20 else "")
        raise ConfigError(f"there is no task {unknown[0]!r}", where=str(path), mend=f"Tasks are: {names}")
    return Reference(path=path, tasks=wanted or tuple(known), options=options)


@cache
def find_tasks(path: Path) -> Mapping[str, Path]:
    """Return the file of each task below a folder, or of the task that is the file `path`, by the task's name.

    Groups of tasks, and files that others include, are passed over.

    Raises:
        ConfigError: There is none, two have one name, or a file cannot be read.
    """
    files = sorted(file for file in path.rglob("*.y*ml") if file.is_file()) if path.is_dir() else [path]
    if len(files) > _MAX_FILES:
        raise ConfigError(f"more than {_MAX_FILES} files", where=str(path), mend="Name a folder further down")
    found: dict[str, Path] = {}
    for file in files:
        name = _read(file).get("task")
        if not isinstance(name, str):
            continue
        if set(name) & set(",=+:/\n") or not name.isprintable():
            raise ConfigError(f"{name!r} cannot be a task's name", where=str(file), mend="Rename it")
        if name in found:
            raise ConfigError(f"two tasks are called {name!r}", where=f"{found[name]}, {file}", mend="Rename one")
        found[name] = file
    if not found:
        raise ConfigError(
            "there is no task file", where=str(path), mend="Name a folder whose YAML files hold task: NAME"
        )
    return dict(sorted(found.items()))


def load(root: Path, name: str) -> dict[str, Any]:
    """Return the keys of a task below `root` (or of the file `root`), those of its includes beneath its own.

    Raises:
        ConfigError: There is no such task, or one of its files cannot be read or lies outside `root`.
    """
    folder = root if root.is_dir() else root.parent
    tasks = find_tasks(root)
    if name not in tasks:
        raise ConfigError(f"there is no task {name!r}", where=str(root), mend="Correct its name")
    return _merge(tasks[name], folder, [])


def _merge(file: Path, folder: Path, above: list[Path]) -> dict[str, Any]:
    if not file.resolve().is_relative_to(folder.resolve()):
        mend = f"Copy it below {folder}, or name a folder that holds both"
        raise ConfigError(f"{file} lies outside the folder", where=str(above[-1] if above else folder), mend=mend)
    if file in above or len(above) >= _MAX_INCLUDES:
        raise ConfigError("files include one another without end", where=str(file), mend="Remove an include")
    keys = _read(file)
    includes = keys.pop("include", [])
    merged: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        if not isinstance(include, str):
            raise ConfigError(f"include: {include!r} is not a file name", where=str(file), mend="Write a file's name")
        below = _merge(file.parent / include, folder, [*above, file])
        below.pop("task_list", None)
        merged.update(below)
    return merged | keys


def _read(file: Path) -> dict[str, Any]:
    try:
        if not file.is_file():
            raise FileNotFoundError(errno.ENOENT, "there is no such file")
        with file.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError(f"larger than {_MAX_BYTES} bytes", where=str(file), mend="Is it a task file?")
        loader = _Loader(data)
        loader.folder = file.parent
        try:
            keys = loader.get_single_data()
        finally:
            loader.dispose()
        _bound(keys, file)
    except OSError as error:
        raise ConfigError(f"cannot read a task file: {error.strerror}", where=str(file), mend="Correct it") from error
    except (yaml.YAMLError, UnicodeError, ValueError, RecursionError, TypeError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"not YAML: {line}", where=str(file), mend="Correct the file") from error
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys):
        raise ConfigError("a task file is a mapping of names", where=str(file), mend="Write task: NAME and so on")
    return keys


def _bound(value: Any, file: Path) -> None:
    """Refuse what is large once its aliases are written out."""
    waiting, num = [value], 0
    while waiting:
        num += 1
        if num > _MAX_VALUES:
            raise ConfigError(f"more than {_MAX_VALUES} values", where=str(file), mend="Is it a task file?")
        one = waiting.pop()
        if isinstance(one, dict):
            waiting.extend(one.values())
        elif isinstance(one, list) or type(one) in (tuple, set):
            waiting.extend(one)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML's plain values, and the names of functions."""

    folder: Path


def _function(loader: Any, node: Any) -> Function:
    return Function(str(loader.construct_scalar(node)), loader.folder)


_Loader.add_constructor("!function", _function)
