"""`flexeval run`, `compare` and `report`: options, and what is printed. Nothing is imported before it is needed."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
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
    KeepTop,
    MaxEvalInstances,
    Model,
    Policy,
    Settings,
    SkipMissing,
    SuiteName,
    command_line,
)
from flexeval.cli.plan import show_plan
from flexeval.errors import ConfigError, ResultsError

if TYPE_CHECKING:  # opening it would import torch
    from flexeval.asked import RunOptions
    from flexeval.pipeline import Done


def run(
    suite: SuiteName,
    model: Model = "smollm2",
    setting: Settings = None,
    max_eval_instances: MaxEvalInstances = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the report goes.", show_default="reports/SUITE")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    gpu_memory: GpuMemory = None,
    cpu_memory: CpuMemory = None,
    disk: Disk = None,
    policy: Policy = "auto",
    keep_top: KeepTop = 32,
    skip_missing: SkipMissing = False,
    chat_template: ChatTemplate = None,
    deterministic: Deterministic = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Answer again what an earlier run has answered.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, as flexeval plan does.")] = False,
) -> None:
    """Evaluate a model on a suite, once per setting, and write a report."""
    from flexeval.asked import RunOptions

    options = RunOptions(
        suite=suite,
        model=model,
        settings=tuple(setting or ["none"]),
        max_eval_instances=max_eval_instances,
        out=out,
        device=device,
        dtype=dtype,
        gpu_memory=gpu_memory,
        cpu_memory=cpu_memory,
        disk=disk,
        policy=policy,
        keep_top=keep_top,
        skip_missing=skip_missing,
        chat_template=chat_template,
        deterministic=deterministic,
        fresh=fresh,
        command=command_line(),
    )
    if dry_run:
        show_plan(options)
    else:
        _evaluate(options)


def resume(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `flexeval run` began.")],
) -> None:
    """Go on with a run where it stopped, with the options it was begun with."""
    from flexeval.asked import recall

    options, folder = recall(directory)
    try:
        os.chdir(folder)  # paths among its options are relative to there
    except OSError as error:
        mend = "Call flexeval run again with paths as they are now"
        what = f"the folder that it was begun in cannot be entered: {error.strerror}"
        raise ConfigError(what, where=str(folder), mend=mend) from error
    _evaluate(options)


def compare(
    directories: Annotated[
        list[Path] | None, typer.Argument(metavar="[DIR...]", help="Directories that `flexeval run` wrote.")
    ] = None,
    settings: Annotated[
        str | None,
        typer.Option(metavar="none,w4,...", help="Instead: run these on a suite, the baseline first, and compare."),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(metavar="NAME|FILE.conf", help="What to ask them.", show_default="compression")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="REF", help="Which model.", show_default="smollm2")] = None,
    models: Annotated[
        str | None,
        typer.Option(metavar="REF,REF,...", help="Instead: run these on a suite, the baseline first, and compare."),
    ] = None,
    max_eval_instances: MaxEvalInstances = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a report of the comparison here.")] = None,
    shared_only: Annotated[
        bool, typer.Option("--shared-only", help="Leave out questions that not all of them were asked.")
    ] = False,
) -> None:
    """Compare runs question by question; the first one's `none` is the baseline."""
    from flexeval.asked import RunOptions

    if settings is not None or models is not None:
        if directories:
            mend = "Name directories, or settings or models to run"
            raise ConfigError("directories were run already", where="--settings" if settings else "--models", mend=mend)
        if model is not None and models is not None:
            raise ConfigError("models are named twice", where="--model, --models", mend="Leave one of them out")
        options = RunOptions(
            suite=suite or "compression",
            model=model or "smollm2",
            settings=tuple((settings or "none").split(",")),
            max_eval_instances=max_eval_instances,
            out=out,
            command=command_line(),
        )
        if models is None:
            _evaluate(options)
            return
        out = out or Path("reports") / f"{Path(options.suite).stem}-models"
        directories = _run_models(options, models.split(","), out)
    else:
        given = {"--suite": suite, "--model": model, "--max-eval-instances": max_eval_instances}
        for option, value in given.items():
            if value is not None:
                mend = "It goes with --settings none,w4,... or --models REF,REF"
                raise ConfigError("directories were run already", where=option, mend=mend)
        if not directories:
            mend = "Name directories (DIR...), --settings none,w4,... or --models REF,REF"
            raise ConfigError("there is nothing to compare", mend=mend)
    _compare(directories, out, shared_only=shared_only)


def _run_models(options: RunOptions, models: Sequence[str], out: Path) -> list[Path]:
    """Run each model into a directory of its own in `out`; return those."""
    from flexeval.pipeline import run_suite
    from flexeval.progress import choose_progress

    names = [re.sub(r"[^\w.+-]+", "-", model).strip("-.") for model in models]
    for name in names:
        if not name or names.count(name) > 1:
            mend = "Name each once, or run them one by one and compare their directories"
            raise ConfigError(f"{name!r} does not tell one model from all others", where="--models", mend=mend)
    for model, name in zip(models, names, strict=True):
        run_suite(replace(options, model=model, out=out / name), choose_progress(Console()))
    return [out / name for name in names]


def _compare(directories: Sequence[Path], out: Path | None, *, shared_only: bool) -> None:
    from flexeval.report.fidelity import measure
    from flexeval.report.merge import distribution_files, merge
    from flexeval.report.pairing import check_same_questions
    from flexeval.report.render.terminal import print_table
    from flexeval.report.write import write_report
    from flexeval.results import RunResults

    console = Console()
    runs = [RunResults.load(directory) for directory in directories]
    results = merge(runs)
    if not shared_only:
        check_same_questions(results)
    if found := measure(results, distribution_files(runs, directories)):
        results = replace(results, fidelity=found)
    print_table(results, console)
    if out is not None:
        results.save(out)
        console.print(f"Report: {write_report(results, out)}", soft_wrap=True, highlight=False)


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `flexeval run` wrote.")],
) -> None:
    """Write a run's report again from its results."""
    from flexeval.report.render.terminal import print_table
    from flexeval.report.write import write_report
    from flexeval.results import RunResults

    console = Console()
    results = RunResults.load(directory)
    page = write_report(results, directory if directory.is_dir() else directory.parent)
    print_table(results, console)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False)


def _evaluate(options: RunOptions) -> None:
    from flexeval.asked import directory_of, is_begun
    from flexeval.pipeline import run_suite
    from flexeval.progress import choose_progress

    console = Console()
    try:
        show(run_suite(options, choose_progress(console)), console)
    except KeyboardInterrupt:
        if is_begun(out := directory_of(options)):
            hint = f"flexeval: what is answered is kept in {out}; flexeval resume {shlex.quote(str(out))} goes on"
            print(hint, file=sys.stderr)
        raise


def show(done: Done, console: Console) -> None:
    """Print what a run found. Raises `ResultsError` for what was not answered or not scored, when all is printed."""
    from flexeval.report.render.terminal import print_table

    print_table(done.results, console)
    console.print(f"Report: {done.page}", soft_wrap=True, highlight=False)
    if done.failed_requests:
        raise ResultsError(" ".join(done.failed_requests), mend="The same command asks them again")
    if done.failed:
        reasons = "; ".join(f"{task}: {reason}" for task, reason in done.failed.items())
        num_failed = f"{len(done.failed)} task{'s' if len(done.failed) > 1 else ''}"
        raise ResultsError(f"{num_failed} could not be scored, the others are in the report. {reasons}")
