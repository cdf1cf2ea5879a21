"""A benchmark's figures read back from what `flexeval bench --out` wrote. Knows the file; no meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexeval import typed
from flexeval.bench.figures import DERIVED, DERIVED_OF_PHASES, SCHEMA_VERSION, BenchResults
from flexeval.errors import ResultsError
from flexeval.files import read_json


def read_figures(path: Path) -> BenchResults:
    """Read what `BenchResults.save` wrote. Raises `ResultsError`."""
    mend = "Name a file that `flexeval bench --out` wrote"
    if not path.is_file():
        raise ResultsError("no figures here", where=str(path), mend=mend)
    try:
        data = read_json(path)
        if not isinstance(data, dict) or data.pop("schema_version", None) != SCHEMA_VERSION:
            raise ValueError(f"it has no layout version {SCHEMA_VERSION}")
        _drop_derived(data)
        return _checked(typed.read(BenchResults, data))
    except (ValueError, OSError) as error:
        raise ResultsError(f"not a benchmark's figures: {error}", where=str(path), mend=mend) from error


def _drop_derived(data: dict[str, Any]) -> None:
    systems = data.get("systems")
    for system in systems if isinstance(systems, list) else []:
        phases = system.get("phases") if isinstance(system, dict) else None
        _drop(system, DERIVED)
        for phase in phases.values() if isinstance(phases, dict) else []:
            _drop(phase, DERIVED_OF_PHASES)


def _drop(value: Any, names: tuple[str, ...]) -> None:
    if isinstance(value, dict):
        for name in names:
            value.pop(name, None)


def _checked(results: BenchResults) -> BenchResults:
    """The results, unless a system has no rate. Raises `ValueError`."""
    for system in results.systems:
        seconds = [system.elapsed_s, *system.all_elapsed_s, *([system.whole.elapsed_s] if system.whole else [])]
        if not system.all_elapsed_s or min(seconds) <= 0 or system.num_requests <= 0:
            raise ValueError(f"{typed.show(system.system)} answered nothing")
    return results
