"""The whole check: what is read, whether it can be compared, what is found. Every step is somebody else's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexeval.bench.reading import read_figures
from flexeval.errors import ConfigError
from flexeval.gate.baseline import Baseline, keep
from flexeval.gate.findings import Outcome
from flexeval.gate.matching import check_match, is_same_machine, settings_to_check
from flexeval.gate.quality import judge_quality
from flexeval.gate.throughput import LEAST_REPEATS, judge_throughput, speeds_of_bench, speeds_of_runs
from flexeval.results import RunResults


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """What `flexeval check` was asked for."""

    settings: Sequence[str] = ()
    """Settings to check; all of the baseline's otherwise."""
    tolerance: float = 0.01
    """Drop of quality that is accepted: a share of 1, at least 0."""
    speed_tolerance: float = 0.2
    """Share of a ratio of throughput that may be lost; 0 to less than 1."""
    any_model: bool = False
    """Whether the run may be of another model than the baseline."""
    any_machine: bool = False
    """Whether throughput is judged on another machine than the baseline's."""
    shared_only: bool = False
    """Whether questions that only one of the two has are left out, not refused."""
    is_strict: bool = False
    """Whether what stays open overall leaves the check without an answer."""


def read_run(directories: Sequence[Path], bench: Path | None) -> Baseline:
    """A run as far as it is checked: answers of the first directory, speeds of all of them and of a benchmark.

    Speeds that were measured less than three times are left out: nobody knows how far chance moved them.

    Raises:
        ResultsError: One of them cannot be read, or has no question that was asked under all settings.
    """
    if not directories:
        raise ConfigError("there is nothing to check", mend="Name a directory that `flexeval run` wrote")
    runs = [RunResults.load(directory) for directory in directories]
    speeds = speeds_of_runs(runs)
    if bench is not None:
        speeds += speeds_of_bench(read_figures(bench))
    return keep(runs[0], [speed for speed in speeds if len(speed.ratios) >= LEAST_REPEATS])


def check(baseline: Baseline, run: Baseline, options: CheckOptions) -> Outcome:
    """Hold a run against a baseline.

    Raises:
        ResultsError: The two cannot be compared.
    """
    settings = settings_to_check(baseline, run, options.settings)
    notes = check_match(baseline, run, any_model=options.any_model, shared_only=options.shared_only)
    is_elsewhere = not (options.any_machine or is_same_machine(baseline, run))
    return Outcome(
        findings=(
            *judge_quality(baseline, run, settings, tolerance=options.tolerance, is_strict=options.is_strict),
            *judge_throughput(
                [speed for speed in baseline.speeds if speed.setting in settings],
                run.speeds,
                tolerance=options.speed_tolerance,
                not_comparable="not judged: the baseline was measured on another machine" if is_elsewhere else "",
                is_strict=options.is_strict,
            ),
        ),
        notes=(*notes, *_not_checked(run, settings)),
    )


def _not_checked(run: Baseline, settings: Sequence[str]) -> list[str]:
    left_out = [name for name in run.settings if name not in settings]
    return [f"Not checked: {', '.join(left_out)} of the run."] if left_out else []
