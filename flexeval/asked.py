"""What `flexeval run` was asked for, and how the directory of a run remembers it. Must not know how a run goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flexeval import typed
from flexeval.benchmark.suites import load_suite
from flexeval.errors import ResultsError
from flexeval.files import read_json, write_json
from flexeval.models import DEFAULT_MODEL

JOURNALS = "journal"
"""Folder of the journals in an output directory."""
ASKED_FILE = "run.json"
"""What a run was asked for, in its output directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What `flexeval run` was asked for."""

    suite: str
    """Name of a suite, or path of its file."""
    model: str = DEFAULT_MODEL
    """Model REF."""
    settings: Sequence[str] = ("none",)
    """Names of the settings to compare, the baseline first."""
    out: Path | None = None
    """Directory of the report; `reports/<suite>` otherwise."""
    max_eval_instances: int | None = None
    """Questions per task at most; None leaves it to the suite."""
    skip_missing: bool = False
    """Run without the tasks whose data cannot be had."""
    chat_template: bool | None = None
    """Whether prompts that are answered stand in the model's chat template; None leaves it to the suite."""
    keep_top: int = 32
    """Most probable tokens to keep at each position, and as many others; 0 compares answers only."""
    fresh: bool = False
    """Answer everything again, whatever an earlier run in the same directory has answered."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    dtype: str = "auto"
    """Type of the arithmetic."""
    policy: str = "auto"
    """`auto`, a policy file, or shares and sizes as text."""
    gpu_memory: str | None = None
    """GPU memory at most."""
    cpu_memory: str | None = None
    """Host memory at most."""
    disk: str | None = None
    """Folder for offloaded data, with or without a size."""
    deterministic: bool = False
    """Compute each request apart from all others, so that its answer depends on none of them."""
    command: str = ""
    """The command line, for the report."""


def engine_options(options: RunOptions) -> dict[str, Any]:
    """What of them `Engine.load` takes."""
    names = ("policy", "device", "dtype", "gpu_memory", "cpu_memory", "disk", "deterministic")
    return {name: getattr(options, name) for name in names}


def directory_of(options: RunOptions) -> Path:
    """Where a run writes. Raises `ConfigError` for a suite that there is not."""
    return options.out or Path("reports") / load_suite(options.suite).name


def remember(options: RunOptions, out: Path) -> None:
    """Write it down in the directory of the run."""
    asked = asdict(replace(options, out=None, fresh=False))
    write_json(out / ASKED_FILE, {"folder": str(Path.cwd()), "options": asked})


def is_begun(out: Path) -> bool:
    """Whether a directory holds answers of a run that can go on."""
    return (out / ASKED_FILE).is_file() and any((out / JOURNALS).glob("*"))


def recall(out: Path) -> tuple[RunOptions, Path]:
    """What the run in a directory was asked for, and the folder that it was called in. Raises `ResultsError`."""
    path = out / ASKED_FILE
    try:
        asked = read_json(path)
        if not isinstance(asked, dict) or not isinstance(asked.get("options"), dict):
            raise ValueError("it holds no options")
        told = {name: value for name, value in asked["options"].items() if name != "out"}
        return typed.read(RunOptions, told, out=out.absolute()), Path(str(asked.get("folder")))
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        mend = "Name a directory that `flexeval run` wrote, or call `flexeval run` again"
        raise ResultsError(f"cannot tell what was asked here: {what}", where=str(path), mend=mend) from error
