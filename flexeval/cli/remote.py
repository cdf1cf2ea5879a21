"""`flexeval prepare`, `execute` and `score`: options, and what is printed. Nothing is imported before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flexeval.cli.evaluate import show
from flexeval.cli.options import (
    ChatTemplate,
    CpuMemory,
    Deterministic,
    Device,
    Disk,
    Dtype,
    GpuMemory,
    KeepTop,
    MaxEvalInstances,
    Policy,
    command_line,
)


def prepare(
    suite: Annotated[str, typer.Option(metavar="NAME|FILE.conf", help="As for run.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.parquet", help="Where the prompts go.")],
    model: Annotated[
        str, typer.Option(metavar="REF", help="As for run; its tokenizer is needed, not its weights.")
    ] = "smollm2",
    max_eval_instances: MaxEvalInstances = None,
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Leave out tasks that have no data.")] = False,
    chat_template: ChatTemplate = None,
) -> None:
    """Write a suite's prompts to a file, to be answered elsewhere."""
    from flexeval.progress import choose_progress
    from flexeval.remote import prepare

    console = Console()
    done = prepare(
        suite,
        model,
        out,
        max_eval_instances=max_eval_instances,
        skip_missing=skip_missing,
        chat_template=chat_template,
        progress=choose_progress(console),
    )
    for task, reason in done.skipped.items():
        console.print(f"Skipped: {task}: {reason}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"Prepared: {done.num_requests} requests in {out}", soft_wrap=True, highlight=False)


def execute(
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS.parquet", help="What `flexeval prepare` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.parquet", help="Where the answers go.")],
    model: Annotated[str, typer.Option(metavar="REF", help="As for run.")] = "smollm2",
    setting: Annotated[str, typer.Option(metavar="NAME", help="none, w8, w4, kv4, ...")] = "none",
    device: Device = "auto",
    dtype: Dtype = "auto",
    gpu_memory: GpuMemory = None,
    cpu_memory: CpuMemory = None,
    disk: Disk = None,
    policy: Policy = "auto",
    keep_top: KeepTop = 32,
    deterministic: Deterministic = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Answer again what an earlier call has answered.")] = False,
) -> None:
    """Answer prompts from a file, without HELM or data; stopped, it goes on when it is called again."""
    from flexeval.progress import choose_progress
    from flexeval.remote import execute

    console = Console()
    cost = execute(
        prompts,
        model,
        setting,
        out,
        keep_top=keep_top,
        fresh=fresh,
        engine_options={
            "device": device,
            "dtype": dtype,
            "gpu_memory": gpu_memory,
            "cpu_memory": cpu_memory,
            "disk": disk,
            "policy": policy,
            "deterministic": deterministic,
        },
        progress=choose_progress(console),
    )
    failed = f", {cost.num_failed} requests failed," if cost.num_failed else ""
    words = f"{cost.num_requests} answers{failed} in {cost.elapsed_s:.1f} s, in {out}"
    console.print(f"Executed: {words}", soft_wrap=True, highlight=False)


def score(
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS.parquet", help="What `flexeval prepare` wrote.")],
    answers: Annotated[
        list[Path],
        typer.Argument(metavar="ANSWERS.parquet...", help="What `flexeval execute` wrote, the baseline first."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the report goes.")],
) -> None:
    """Score answers where the prompts were prepared, and write the report."""
    from flexeval.progress import choose_progress
    from flexeval.remote import score

    console = Console()
    command = command_line()
    show(score(prompts, answers, out, command=command, progress=choose_progress(console)), console)
