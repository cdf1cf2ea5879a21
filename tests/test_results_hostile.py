"""Results from strangers: odd ones are refused in one line, or make a report. HOSTILE_EXAMPLES=1000 looks longer."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_mutations import mutations
from synthetic_results import TASKS, synthetic

from flexeval.errors import FlexevalError, ResultsError
from flexeval.report.merge import distribution_files, distribution_path, merge
from flexeval.report.write import write_report
from flexeval.results import QUANTILES, Fidelity, RunResults

FIDELITY = Fidelity(
    task="",
    setting="w4",
    baseline="none",
    num_positions=9,
    num_questions=3,
    num_top=2,
    tail=0.1,
    kl=0.2,
    kl_error=None,
    kl_quantiles=[0.1] * len(QUANTILES),
    kl_at_least=0.1,
    same_top=0.5,
    same_top_error=0.1,
    num_text=5,
    text_loss=1.0,
    loss_change=0.1,
    loss_change_error=0.01,
    probability_change=-0.1,
    probability_change_error=0.01,
    probability_change_rms=0.2,
    probability_change_quantiles=[0.1] * len(QUANTILES),
)
RESULTS = json.loads(
    json.dumps(
        dataclasses.asdict(
            dataclasses.replace(
                synthetic(settings=("none", "w4"), tasks=TASKS[:2], num_questions=2), fidelity=[FIDELITY]
            )
        )
    )
)


def write(directory: Path, value: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "results.json").write_text(json.dumps(value))
    return directory


@pytest.mark.parametrize("name", ["run", "new\nline", "not UTF-8 \udcff"])
def test_what_is_not_changed_is_read(name: str, tmp_path: Path) -> None:
    results = RunResults.load(write(tmp_path / name, RESULTS))
    assert json.loads(json.dumps(dataclasses.asdict(results))) == RESULTS
    assert write_report(results, tmp_path / name).is_file()


@pytest.mark.parametrize("setting", ["../../x", "/etc/x", "..", "", "a/b", "a\0b", "x" * 300])
def test_a_setting_names_no_file_elsewhere(setting: str, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="is no name of a setting"):
        distribution_path(tmp_path, setting)
    odd = RESULTS | {"settings": [one | {"setting": setting} for one in RESULTS["settings"]]}
    results = RunResults.load(write(tmp_path / "run", odd))
    with pytest.raises(ResultsError, match="is no name of a setting"):
        distribution_files([results], [tmp_path / "run"])


@settings(
    max_examples=int(os.environ.get("HOSTILE_EXAMPLES", "40")),
    suppress_health_check=list(HealthCheck),
    deadline=None,
)
@given(data=st.data())
def test_odd_results_are_refused_or_make_a_report(data: st.DataObject, tmp_path: Path) -> None:
    part = data.draw(st.sampled_from([*RESULTS, "all"]))
    odd = data.draw(mutations(RESULTS if part == "all" else {part: RESULTS[part]}))
    if part != "all" and isinstance(odd, dict):
        odd = {name: value for name, value in RESULTS.items() if name != part} | odd
    try:
        results = RunResults.load(write(tmp_path / "run", odd))
        distribution_files([results], [tmp_path / "run"])
        write_report(merge([results, results]) if data.draw(st.booleans()) else results, tmp_path / "run")
    except FlexevalError as error:
        assert str(error).isprintable() and len(str(error)) < 3000
