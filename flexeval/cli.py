"""The command line. Knows options and exit codes; how anything is done is somebody else's.

Exit codes: 0 success; 2 something the user can mend, said in one line; 1 our own bug, with its traceback.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

import flexeval
from flexeval.errors import ConfigError, FlexevalError

if TYPE_CHECKING:  # opening it would import torch
    from flexeval.pipeline import RunOptions

_INTERRUPTED = 130
_OUTSIDE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENAMETOOLONG}
"""Errors of files that are no bug of ours."""

app = typer.Typer(
    help="How good a language model is on HELM, how fast this machine evaluates it, and what compression costs.",
    epilog="To begin with: flexeval run --suite demo --setting none --setting w4",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def run(
    suite: Annotated[
        str, typer.Option(metavar="NAME|FILE.conf", help="What to ask: demo, helm-lite, or a file of HELM run entries.")
    ],
    model: Annotated[
        str,
        typer.Option(
            metavar="REF",
            help="HF or prepared directory, hub name, GGUF file, smollm2, or dummy:NAME (random weights).",
        ),
    ] = "smollm2",
    setting: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What to compare: none, w8, w4, kv4, w4kv4, topk10, quest10, w4kv4-topk10, ... Repeatable.",
        ),
    ] = None,
    max_eval_instances: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Questions per task at most.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the report goes.", show_default="reports/SUITE")
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where layers are computed.")] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16|float16", help="Type of the arithmetic.")
    ] = "auto",
    gpu_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="GPU memory at most: 16GiB.")] = None,
    cpu_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Host memory at most: 64GiB.")] = None,
    disk: Annotated[str | None, typer.Option(metavar="DIR[:SIZE]", help="Folder for what fits nowhere else.")] = None,
    policy: Annotated[
        str, typer.Option(metavar="auto|FILE|TEXT", help="Where everything rests: gpu-weights=0.2,cpu-kv=1,...")
    ] = "auto",
    keep_top: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Keep N most probable tokens, by which settings are compared; 0: answers alone."
        ),
    ] = 32,
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Run without tasks that have no data.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Answer again what an earlier run has answered.")] = False,
) -> None:
    """Evaluate a model on a suite, once per setting, and write a report."""
    from flexeval.pipeline import RunOptions

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
        fresh=fresh,
        command=shlex.join(["flexeval", *sys.argv[1:]]),
    )
    _evaluate(options)


@app.command()
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
    max_eval_instances: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Questions per task at most.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a report of the comparison here.")] = None,
) -> None:
    """Compare runs question by question; the first one's `none` is the baseline."""
    from flexeval.pipeline import RunOptions
    from flexeval.report.fidelity import measure
    from flexeval.report.merge import distribution_files, merge
    from flexeval.report.render.terminal import print_table
    from flexeval.report.write import write_report
    from flexeval.results import RunResults

    if settings is not None:
        if directories:
            mend = "Name directories, or settings to run"
            raise ConfigError("directories were run already", where="--settings", mend=mend)
        options = RunOptions(
            suite=suite or "compression",
            model=model or "smollm2",
            settings=tuple(settings.split(",")),
            max_eval_instances=max_eval_instances,
            out=out,
            command=shlex.join(["flexeval", *sys.argv[1:]]),
        )
        _evaluate(options)
        return
    for option, value in {"--suite": suite, "--model": model, "--max-eval-instances": max_eval_instances}.items():
        if value is not None:
            raise ConfigError("directories were run already", where=option, mend="It goes with --settings none,w4,...")
    if not directories:
        raise ConfigError("there is nothing to compare", mend="Name directories (DIR...), or --settings none,w4,...")
    console = Console()
    runs = [RunResults.load(directory) for directory in directories]
    results = merge(runs)
    if found := measure(results, distribution_files(runs, directories)):
        results = replace(results, fidelity=found)
    print_table(results, console)
    if out is not None:
        results.save(out)
        console.print(f"Report: {write_report(results, out)}", soft_wrap=True, highlight=False)


@app.command()
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


@app.command()
def bench(
    model: Annotated[
        str,
        typer.Option(metavar="REF", help="As for run; dummy:NAME has random weights of a published model's sizes."),
    ],
    suite: Annotated[
        str | None, typer.Option(metavar="NAME|FILE.conf", help="Ask a suite's questions, instead of random tokens.")
    ] = None,
    prompt_len: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Random tokens of a prompt.", show_default="512")
    ] = None,
    gen_len: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens to generate for each.", show_default="32")
    ] = None,
    shared_prefix: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Of a prompt's tokens, the first N are the same in all.")
    ] = None,
    score: Annotated[bool, typer.Option("--score", help="Score the prompts instead of generating.")] = False,
    num_requests: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Requests; else as many as make each of them no cheaper."),
    ] = None,
    scale: Annotated[
        str | None, typer.Option(metavar="1,4,16", help="Measure multiples of the requests as well.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the random tokens.", show_default="0")] = None,
    max_eval_instances: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of a suite: questions per task.")
    ] = None,
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Run without tasks that have no data.")] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What to measure: none, w8, w4, kv4, w4kv4, topk10, quest10, w4kv4-topk10, ... Repeatable.",
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option(metavar="auto|FILE|TEXT", help="Where everything rests: gpu-weights=0.2,cpu-kv=1,...")
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where layers are computed.")] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16|float16", help="Type of the arithmetic.")
    ] = "auto",
    gpu_memory: Annotated[str | None, typer.Option(metavar="16GiB", help="GPU memory at most.")] = None,
    cpu_memory: Annotated[str | None, typer.Option(metavar="64GiB", help="Host memory at most.")] = None,
    disk: Annotated[str | None, typer.Option(metavar="DIR[:SIZE]", help="Folder for what fits nowhere else.")] = None,
    repeat: Annotated[int, typer.Option(metavar="N", min=1, help="Measured runs; the median one counts.")] = 1,
    warm_up: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Requests to answer beforehand.", show_default="all")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Measure transformers, accelerate or deepspeed as well. Repeatable."),
    ] = None,
    peer_batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="A peer's batch.", show_default="1 for transformers, else what fits"),
    ] = None,
    peer_requests: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Ask peers N only, spread evenly.", show_default="all")
    ] = None,
    peer_gen_len: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Let peers generate N tokens only.", show_default="all")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write every figure here.")] = None,
) -> None:
    """Measure how fast the engine and its peers answer, and how near the machine's bounds it comes."""
    from flexeval.bench.run import BenchOptions, run_bench
    from flexeval.bench.table import print_bench
    from flexeval.bench.work import choose_work, parse_scale
    from flexeval.progress import choose_progress

    console = Console()
    options = BenchOptions(
        model=model,
        work=choose_work(
            suite=suite,
            prompt_len=prompt_len,
            gen_len=gen_len,
            shared_prefix=shared_prefix,
            is_scoring=score,
            seed=seed,
            only_of_suites=(max_eval_instances, skip_missing),
        ),
        num_requests=num_requests,
        scale=parse_scale(scale) if scale is not None else (),
        max_eval_instances=max_eval_instances,
        skip_missing=skip_missing,
        settings=tuple(setting or ["none"]),
        policy=policy,
        device=device,
        dtype=dtype,
        gpu_memory=gpu_memory,
        cpu_memory=cpu_memory,
        disk=disk,
        num_repeats=repeat,
        num_warm_up=warm_up,
        peers=tuple(peer or []),
        peer_batch_size=peer_batch_size,
        peer_requests=peer_requests,
        peer_gen_len=peer_gen_len,
        command=shlex.join(["flexeval", *sys.argv[1:]]),
    )
    results = run_bench(options, choose_progress(console))
    print_bench(results, console)
    if out is not None:
        results.save(out)
        console.print(f"Figures: {out}", soft_wrap=True, highlight=False)


@app.command()
def prepare_model(
    model: Annotated[str, typer.Option(metavar="REF", help="As for run.")],
    setting: Annotated[
        str, typer.Option(metavar="NAME", help="Compression of the weights: w8, w4, w4-g128, w4-hqq, ...")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A new directory, to be named with --model.", show_default="the cache"),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="Where weights are packed; the bytes are the same.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16|float16", help="Type of the arithmetic, later.")
    ] = "auto",
) -> None:
    """Quantize a model once and write it, for all later runs: they read it instead of the original weights."""
    from flexeval.config import format_size
    from flexeval.preparation import PrepareOptions, prepare
    from flexeval.progress import choose_progress

    console = Console()
    options = PrepareOptions(model=model, setting=setting, out=out, device=device, dtype=dtype)
    done = prepare(options, choose_progress(console))
    found = done.manifest
    words = f"{found.setting}, {found.dtype}, {format_size(done.num_bytes)}" + ("" if done.is_new else ", as before")
    console.print(f"Prepared: {done.directory} ({words})", soft_wrap=True, highlight=False)


def _evaluate(options: RunOptions) -> None:
    from flexeval.pipeline import run_suite
    from flexeval.progress import choose_progress
    from flexeval.report.render.terminal import print_table

    console = Console()
    done = run_suite(options, choose_progress(console))
    print_table(done.results, console)
    console.print(f"Report: {done.page}", soft_wrap=True, highlight=False)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"flexeval {flexeval.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that wait give way: beside other work, 4x as fast
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # ragged rows fragment a GPU's memory
    try:
        code = app(standalone_mode=False)
    except FlexevalError as error:
        _fail(str(error))
    except typer.TyperException as error:  # an option that there is not, a value that cannot be read
        if not error.format_message():  # no command at all: the help has been shown
            sys.exit(error.exit_code)
        _fail(f"{error.format_message().rstrip('.')}. See flexeval --help")
    except OSError as error:
        if error.errno not in _OUTSIDE:
            raise
        _fail(f"{error.strerror} ({error.filename or 'while writing'}). Make room there, or name another place")
    if code == _INTERRUPTED:
        print("flexeval: interrupted; run the same command again to go on where it stopped", file=sys.stderr)
    sys.exit(code)


def _fail(message: str) -> NoReturn:
    print("flexeval:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
