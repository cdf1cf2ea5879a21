"""The schema by which `helm-summarize` and HELM's pages show a suite. Knows HELM's schema files, not its results.

HELM Lite's own schema describes the metrics; a group that it does not have gets an entry from what the suite found.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from helm.benchmark.presentation.schema import SCHEMA_YAML_PACKAGE

from flexeval.benchmark.suites import Suite
from flexeval.files import write_text
from flexeval.results import TaskInfo

_BASE = "schema_lite.yaml"


def write_schema(path: Path, suite: Suite, tasks: Sequence[TaskInfo]) -> None:
    """Write the schema of a suite: one HELM run group per group of tasks, and one that holds them all."""
    base = yaml.safe_load(resources.files(SCHEMA_YAML_PACKAGE).joinpath(_BASE).read_text(encoding="utf-8"))
    known = {group["name"]: group for group in base["run_groups"] if "subgroups" not in group}
    first = {task.group: task for task in reversed(tasks)}
    groups = [known.get(name) or _run_group(first[name]) for name in dict.fromkeys(task.group for task in tasks)]
    overview = {
        "name": "core_scenarios",
        "display_name": suite.name,
        "description": suite.description or f"The suite {suite.name}.",
        "category": "All scenarios",
        "subgroups": [group["name"] for group in groups],
    }
    base["run_groups"] = [overview, *groups]
    write_text(path, yaml.safe_dump(base, sort_keys=False, allow_unicode=True))


def _run_group(task: TaskInfo) -> dict[str, Any]:
    return {
        "name": task.group,
        "display_name": task.group,
        "description": task.source or f"The tasks of the group {task.group}.",
        "metric_groups": ["accuracy", "efficiency", "general_information"],
        "environment": {"main_name": task.metric, "main_split": task.split},
        "taxonomy": {"task": task.group, "what": "n/a", "who": "n/a", "when": "n/a", "language": "n/a"},
    }
