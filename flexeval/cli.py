"""The command line. Knows options and exit codes; how anything is done is somebody else's.

Exit codes: 0 success; 2 something the user can mend, said in one line; 1 our own bug, with its traceback.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

import flexeval
from flexeval.errors import FlexevalError

_INTERRUPTED = 130
_OUTSIDE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG}
"""Errors of files that are no bug of ours."""

app = typer.Typer(
    help="HELM-style evaluation of language models that do not fit your GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Directories = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Directories that `flexeval run` wrote.")]


@app.command()
def run(
    suite: Annotated[str, typer.Option(metavar="NAME|FILE.conf", help="What to ask: a suite, or a file of entries.")],
    model: Annotated[
        str,
        typer.Option(metavar="REF", help="HF directory, hub name, GGUF file, smollm2, or dummy:NAME (random weights)."),
    ] = "smollm2",
    setting: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Compression to compare: none, w4. Repeatable.")
    ] = None,
    max_eval_instances: Annotated[int | None, typer.Option(metavar="N", min=1, help="Questions per task.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the report goes.", show_default="reports/SUITE")
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where layers are computed.")] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16|float16", help="Type of the arithmetic.")
    ] = "auto",
    gpu_memory: Annotated[str | None, typer.Option(metavar="16GiB", help="GPU memory at most.")] = None,
    cpu_memory: Annotated[str | None, typer.Option(metavar="64GiB", help="Host memory at most.")] = None,
    disk: Annotated[str | None, typer.Option(metavar="DIR[:SIZE]", help="Folder for what fits nowhere else.")] = None,
    policy: Annotated[
        str, typer.Option(metavar="auto|FILE|TEXT", help="Where everything rests: gpu-weights=0.2,cpu-kv=1,...")
    ] = "auto",
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Run without tasks that have no data.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Answer again what an earlier run has answered.")] = False,
) -> None:
    """Evaluate a model on a suite, once per setting, and write a report."""
    from flexeval.pipeline import RunOptions, run_suite
    from flexeval.progress import choose_progress
    from flexeval.report.render.terminal import print_table

    console = Console()
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
        skip_missing=skip_missing,
        fresh=fresh,
        command=shlex.join(["flexeval", *sys.argv[1:]]),
    )
    done = run_suite(options, choose_progress(console))
    print_table(done.results, console)
    console.print(f"Report: {done.page}", soft_wrap=True, highlight=False)


@app.command()
def compare(
    directories: _Directories,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a report of the comparison here.")] = None,
) -> None:
    """Compare runs question by question; the first one's `none` is the baseline."""
    from flexeval.report.merge import merge
    from flexeval.report.render.terminal import print_table
    from flexeval.report.write import write_report
    from flexeval.results import RunResults

    console = Console()
    results = merge([RunResults.load(directory) for directory in directories])
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
