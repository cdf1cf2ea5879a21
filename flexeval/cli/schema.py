"""`flexeval schema`: what is printed. Nothing is imported before it is needed."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class File(StrEnum):
    """What flexeval writes as JSON for others to read."""

    RESULTS = "results"
    BASELINE = "baseline"
    STATUS = "status"


def schema(
    file: Annotated[File, typer.Argument(help="results.json, the baseline of `flexeval check`, or status.json.")],
) -> None:
    """Print the JSON Schema of a file that flexeval writes."""
    import json

    from flexeval.gate.baseline import Baseline
    from flexeval.results import RunResults
    from flexeval.schema import json_schema
    from flexeval.status import RunStatus

    kind = {File.RESULTS: RunResults, File.BASELINE: Baseline, File.STATUS: RunStatus}[file]
    typer.echo(json.dumps(json_schema(kind, f"flexeval {file}"), indent=1, ensure_ascii=False))
