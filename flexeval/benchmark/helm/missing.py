"""Which file a scenario wanted when its data could not be had. Knows how HELM's scenarios fetch; fetches nothing.

The failed call still stands in the traceback with its arguments: that is where the path is read from, so that HELM's
own download stays the only one.
"""

from __future__ import annotations

import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import datasets  # type: ignore[import-untyped]
from helm.common.optional_dependencies import OptionalDependencyNotInstalled

from flexeval.errors import DataError

_DOWNLOAD_FILE = ("helm.common.general", "ensure_file_downloaded")
_LOAD_DATASET = ("datasets.load", "load_dataset")
_DATA = "data at"
_PACKAGE = "package"
_INSTALLED_AS = {"pytrec_eval": "pytrec-eval-terrier"}
"""Packages by another name than HELM gives: its own pytrec_eval has no wheel, and fetches its source as it is built."""


class MissingData(NamedTuple):
    """Data, or a package, that a run needs and does not have."""

    path: str
    """Where they are expected; a package's name."""
    reason: str
    """Why they are not there."""
    kind: str = _DATA
    """What `path` names, in words that go before it."""

    @property
    def is_package(self) -> bool:
        """Whether it is one that pip installs."""
        return self.kind == _PACKAGE

    @property
    def place(self) -> str:
        """What is missing, in words."""
        return f"{self.kind} {self.path}"


def diagnose(error: BaseException) -> MissingData | None:
    """Return what was missing when `error` was raised, or None if it has another cause."""
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, DataError):
        return MissingData(path=error.where or error.what, reason=str(error))
    if (package := _package(error)) is not None:
        why = f"pip install {_INSTALLED_AS[package]}" if package in _INSTALLED_AS else str(error)
        return MissingData(path=package, reason=why, kind=_PACKAGE)
    for frame in _frames(error):
        function, local = (frame.f_globals.get("__name__"), frame.f_code.co_name), frame.f_locals
        if function == _DOWNLOAD_FILE:
            return MissingData(path=local["target_path"], reason=f"{local['source_url']}: {reason}")
        if function == _LOAD_DATASET:
            return MissingData(path=dataset_path(local["path"], local["name"], local["cache_dir"]), reason=reason)
    if isinstance(error, OSError) and (request := getattr(error, "request", None)) is not None:
        return MissingData(path=str(request.url), reason=reason)  # of the package requests: a model of spaCy's
    if isinstance(error, FileNotFoundError) and error.filename:
        return MissingData(path=str(error.filename), reason=reason)
    return None


def _package(error: BaseException) -> str | None:
    """Return the package that an optional part of HELM wanted to import, if that is what failed."""
    cause = error.__cause__ if isinstance(error, OptionalDependencyNotInstalled) else error
    if not isinstance(cause, ModuleNotFoundError) or cause.name is None:
        return None
    package = cause.name.partition(".")[0]
    return None if package in ("helm", "flexeval", "flexeval_tasks") else package  # a name in a run spec is wrong


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Yield the frames of the traceback, those of the causes last."""
    seen: BaseException | None = error
    while seen is not None:
        for frame, _ in traceback.walk_tb(seen.__traceback__):
            yield frame
        seen = seen.__cause__ or seen.__context__


def dataset_path(path: str, config: str | None, cache_dir: str | None) -> str:
    """Return the folder in which `datasets` looks for a copy that it has prepared."""
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___")
    return str(folder / config if config else folder)


def missing_data_error(missing: Mapping[str, Sequence[MissingData]], num_tasks: int) -> DataError:
    """Say in one line what some of a suite's tasks lack.

    Args:
        missing: By task, at least one.
        num_tasks: Tasks in all.
    """
    tasks_of: dict[str, list[str]] = defaultdict(list)
    for task, found in missing.items():
        for lack in found:
            tasks_of[lack.place.removeprefix(f"{_DATA} ")].append(task)
    places = "; ".join(f"{place} for {', '.join(dict.fromkeys(tasks))}" for place, tasks in tasks_of.items())
    first = next(iter(missing.values()))[0]
    is_data = all(lack.kind == _DATA for found in missing.values() for lack in found)
    return DataError(
        f"{len(missing)} of {num_tasks} tasks {'have no data' if is_data else 'lack what they need'}. "
        f"Expected: {places}. First failure: {first.reason}",
        mend="flexeval data check says how to get them; --skip-missing runs the other tasks"
        if is_data
        else "Provide it (helm.log may say more), or run the other tasks with --skip-missing",
    )
