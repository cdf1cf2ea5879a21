"""`flexeval plan`: what a run would take. Nothing is imported before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flexeval.cli.options import (
    ChatTemplate,
    CpuMemory,
    Deterministic,
    Device,
    Disk,
    Dtype,
    GpuMemory,
    MaxEvalInstances,
    Model,
    Policy,
    Settings,
    SkipMissing,
    SuiteName,
    command_line,
)

if TYPE_CHECKING:  # opening it would import torch
    from flexeval.asked import RunOptions


def plan(
    suite: SuiteName,
    model: Model = "smollm2",
    setting: Settings = None,
    max_eval_instances: MaxEvalInstances = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    gpu_memory: GpuMemory = None,
    cpu_memory: CpuMemory = None,
    disk: Disk = None,
    policy: Policy = "auto",
    skip_missing: SkipMissing = False,
    chat_template: ChatTemplate = None,
    deterministic: Deterministic = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write every figure here.")] = None,
) -> None:
    """Say what a run would take on this machine, and where everything would rest, without loading weights."""
    from flexeval.asked import RunOptions

    options = RunOptions(
        suite=suite,
        model=model,
        settings=tuple(setting or ["none"]),
        max_eval_instances=max_eval_instances,
        device=device,
        dtype=dtype,
        gpu_memory=gpu_memory,
        cpu_memory=cpu_memory,
        disk=disk,
        policy=policy,
        skip_missing=skip_missing,
        chat_template=chat_template,
        deterministic=deterministic,
        command=command_line(),
    )
    show_plan(options, out)


def show_plan(options: RunOptions, out: Path | None = None) -> None:
    """Print what a run would take, and write it to a file if one is named."""
    from flexeval.files import write_json
    from flexeval.forecast.run import forecast_run
    from flexeval.forecast.table import print_forecasts
    from flexeval.progress import choose_progress

    console = Console()
    forecasts = forecast_run(options, choose_progress(console))
    print_forecasts(f"{options.suite}: {options.model}", forecasts, console)
    if out is not None:
        write_json(out, {"command": options.command, "settings": [one.to_json() for one in forecasts]})
        console.print(f"Figures: {out}", soft_wrap=True, highlight=False)
