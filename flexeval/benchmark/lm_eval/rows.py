"""The rows that a task's questions are made of, read with `datasets`. Knows files and splits; must not know prompts.

A task's file may be a stranger's: it may name files of its own folder, in forms that hold plain data, or a dataset of
the hub; code that comes with a dataset is not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexeval.benchmark.lm_eval.task import Task
from flexeval.errors import ConfigError, DataError

_FILE_FORMS = ("json", "csv", "parquet", "text")
_OTHER_FORMS = (  # of `datasets`: some unpickle
    "arrow",
    "audiofolder",
    "cache",
    "imagefolder",
    "pandas",
    "sql",
    "spark",
    "webdataset",
    "xml",
    "generator",
)
_NO_PLAIN_FILE = frozenset("*?[]:")
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


class Rows:
    """The splits of a task's dataset."""

    def __init__(self, task: Task):
        """Read them.

        Raises:
            DataError: A file of the task's folder is not there.
            ConfigError: The task names data in other places.
            Exception: Whatever `datasets` raises where it cannot read them.
        """
        self._task = task
        import datasets  # type: ignore[import-untyped]  # seconds

        self._splits = datasets.load_dataset(
            _form(task), task.dataset_name, data_files=_data_files(task), trust_remote_code=False
        )

    def questions(self) -> tuple[Sequence[dict[str, Any]], Sequence[str]]:
        """The rows that are asked about, and the names of their columns."""
        split = self._split(self.question_split, self._task.process)
        if not hasattr(split, "features"):
            what = f"process_docs returns {type(split).__name__}"
            raise ConfigError(what, where=self._task.where, mend="Return a Dataset")
        return split, list(split.features)

    @property
    def question_split(self) -> str:
        """The test split, or else the validation split."""
        name = self._task.splits["test"] or self._task.splits["validation"]
        assert name is not None, "checked when the task was read"
        return name

    def examples(self) -> Sequence[dict[str, Any]]:
        """The rows that examples are drawn from: `fewshot_split`, the file's own, or the first split there is."""
        examples, splits = self._task.examples, self._task.splits
        found: Sequence[dict[str, Any]]
        if examples.split is not None:
            found = self._split(examples.split, examples.process)
        elif examples.samples is not None:
            found = examples.samples() if callable(examples.samples) else examples.samples
        else:
            found = self._split(splits["training"] or splits["validation"] or self.question_split, self._task.process)
        return found

    def _split(self, name: str, process: Callable[[Any], Any] | None) -> Any:
        if name not in self._splits:
            known = ", ".join(self._splits)
            raise ConfigError(f"the dataset has no split {name!r}", where=self._task.where, mend=f"It has: {known}")
        return process(self._splits[name]) if process else self._splits[name]


def _form(task: Task) -> str:
    path = task.dataset_path
    if path in _FILE_FORMS:
        if task.data_files is None:
            raise ConfigError(f"dataset_path: {path} needs data_files", where=task.where, mend="Name the files")
        return path
    if path in _OTHER_FORMS or not _HUB_NAME.fullmatch(path) or Path(path).exists():
        mend = f"Write {', '.join(_FILE_FORMS)} with data_files, or the name of a dataset of the hub"
        raise ConfigError(f"dataset_path: {path!r} is not supported", where=task.where, mend=mend)
    if task.data_files is not None:
        raise ConfigError(
            "data_files of a dataset of the hub are not supported", where=task.where, mend="Leave them out"
        )
    return path


def _data_files(task: Task) -> Any:
    files = task.data_files
    if isinstance(files, Mapping):
        return {split: _places(task, names) for split, names in files.items()}
    return None if files is None else _places(task, files)


def _places(task: Task, names: Any) -> list[str]:
    return [_place(task, name) for name in (names if isinstance(names, list) else [names])]


def _place(task: Task, name: Any) -> str:
    """A data file beside the task's file, or below the working directory, where lm-evaluation-harness looks."""
    if not isinstance(name, str):
        raise ConfigError(f"data_files holds {name!r}", where=task.where, mend="Write file names")
    for place in ((task.base / name).resolve(), Path(name).resolve()):
        if place.is_file() and place.is_relative_to(task.folder.resolve()):
            return str(place)
    mend = f"Put it below {task.folder}; patterns and addresses are not supported"
    place = (task.base / name).resolve()
    what = f"there is no data file {name!r} in the task's folder"
    if place.exists() or not place.is_relative_to(task.folder.resolve()) or not _NO_PLAIN_FILE.isdisjoint(name):
        raise ConfigError(what, where=task.where, mend=mend)
    raise DataError(what, where=str(place), mend=mend)
