"""Which file a scenario wanted when its data could not be had. Knows how HELM's scenarios fetch; fetches nothing.

The failed call still stands in the traceback with its arguments: that is where the path is read from, so that HELM's
own download stays the only one.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import datasets  # type: ignore[import-untyped]

from flexeval.errors import DataError

_DOWNLOAD_FILE = ("helm.common.general", "ensure_file_downloaded")
_LOAD_DATASET = ("datasets.load", "load_dataset")


class MissingData(NamedTuple):
    """Data that a run needs and does not have."""

    path: str
    """Where they are expected."""
    reason: str
    """Why they are not there."""


def diagnose(error: BaseException) -> MissingData | None:
    """Return what was missing when `error` was raised, or None if it has another cause."""
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, DataError):
        return MissingData(path=error.where or error.what, reason=str(error))
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
