"""The schemas in docs/: as the command prints them, true of what is written, and false of what is not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_mutations import mutations
from jsonschema import Draft202012Validator
from synthetic_results import TASKS, synthetic
from test_gate import BENCH
from test_report_fidelity import models, run_with_rows
from test_status import status
from typer.testing import CliRunner

from flexeval import typed
from flexeval.cli import app
from flexeval.files import write_json
from flexeval.gate.baseline import Baseline, keep
from flexeval.gate.throughput import speeds_of_bench
from flexeval.results import RunResults

SCHEMAS = Path(__file__).parent.parent / "docs/schemas"


def validator(name: str) -> Draft202012Validator:
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One file of each kind as it comes to lie on the disk."""
    out = tmp_path_factory.mktemp("written")
    run_with_rows(out, "run", dict(zip(("none", "w4"), models(9, 20, 0.5), strict=True)))
    results = RunResults.load(out)
    assert results.fidelity, "closeness is part of it"
    keep(synthetic(num_questions=3), speeds_of_bench(BENCH)).save(out / "baseline.json")
    write_json(out / "status.json", asdict(status()))
    return {
        "results": json.loads((out / "results.json").read_text()),
        "baseline": json.loads((out / "baseline.json").read_text()),
        "status": json.loads((out / "status.json").read_text()),
    }


@pytest.mark.parametrize("name", ["results", "baseline", "status"])
def test_the_schema_in_the_docs_is_the_one_that_is_printed(name: str) -> None:
    printed = CliRunner().invoke(app, ["schema", name]).output
    told = (SCHEMAS / f"{name}.schema.json").read_text()
    assert printed == told, f"write it again: flexeval schema {name} > docs/schemas/{name}.schema.json"
    assert f"schemas/{name}.schema.json" in (SCHEMAS.parent / "results.md").read_text()


@pytest.mark.parametrize("name", ["results", "baseline", "status"])
def test_what_is_written_is_valid(name: str, written: dict[str, Any]) -> None:
    assert [error.message for error in validator(name).iter_errors(written[name])] == []


def test_the_projects_own_baseline_is_valid() -> None:
    kept = json.loads((SCHEMAS.parent.parent / "reports/baselines/smollm2.json").read_text())
    assert validator("baseline").is_valid(kept)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("results", lambda data: data.pop("tasks")),
        ("results", lambda data: data["instances"][0].update(score="0.5")),
        ("results", lambda data: data["instances"][0].update(num_prompt_tokens=-1)),
        ("results", lambda data: data["settings"][0]["peak_bytes"].update(gpu=-1)),
        ("results", lambda data: data.update(unknown=1)),
        ("baseline", lambda data: data["tasks"][0]["questions"]["id0"].pop("asked")),
        ("baseline", lambda data: data["speeds"][0].update(ratios=[None])),
        ("status", lambda data: data.update(state="asleep")),
    ],
)
def test_what_is_not_written_so_is_not_valid(
    name: str, damage: Callable[[Any], object], written: dict[str, Any]
) -> None:
    data = copy.deepcopy(written[name])
    damage(data)
    assert not validator(name).is_valid(data)


SMALL = {
    "results": (RunResults, synthetic(settings=("none",), tasks=TASKS[:1], num_questions=1)),
    "baseline": (Baseline, keep(synthetic(settings=("none",), tasks=TASKS[:1], num_questions=1))),
}


@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(SMALL)))
def test_what_flexeval_reads_is_valid(data: st.DataObject, name: str, tmp_path: Path) -> None:
    kind, value = SMALL[name]
    value.save(tmp_path / "results.json" if kind is Baseline else tmp_path)
    odd = data.draw(mutations(json.loads((tmp_path / "results.json").read_text())))
    try:
        typed.read(kind, odd)
    except ValueError:
        return
    assert validator(name).is_valid(odd)
