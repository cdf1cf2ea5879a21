"""`flexeval data check`, `fetch`, `export` and `import`: options, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:  # opening it would import HELM
    from flexeval.benchmark.helm.inventory import Need

app = typer.Typer(help="The files that questions are read from: which there are, and how to get the others.")

SuiteOption = Annotated[str, typer.Option("--suite", metavar="NAME|FILE.conf", help="As for run.")]
_MISSING = 1


@app.command()
def check(
    suite: SuiteOption,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")] = False,
) -> None:
    """Say what a suite needs, where it is looked for, and what is missing (exit code 1). Downloads nothing."""
    needs = _take(suite, downloads=False)
    if as_json:
        typer.echo(json.dumps([_to_json(need) for need in needs], indent=1))
    else:
        _print(needs)
    raise typer.Exit(0 if all(need.is_there for need in needs) else _MISSING)


@app.command()
def fetch(suite: SuiteOption) -> None:
    """Download what a suite needs, as HELM would; say what came, and what did not (exit code 1)."""
    needs = _take(suite, downloads=True)
    _print(needs)
    raise typer.Exit(0 if all(need.is_there for need in needs) else _MISSING)


@app.command("export")
def export_data(
    suite: SuiteOption,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.tar.gz", help="Where the archive goes.")],
) -> None:
    """Write a suite's files to an archive, for a machine without a network."""
    from flexeval.benchmark.parcel import pack
    from flexeval.config import format_size

    needs = _take(suite, downloads=False)
    entries = pack([need.path for need in needs if need.is_there], _roots(), out)
    num_bytes = sum(entry.size for entry in entries)
    missing = [need for need in needs if not need.is_there]
    words = f"{len(entries)} files, {format_size(num_bytes)}, in {out}" + (
        f"; {len(missing)} of {len(needs)} needs are missing" if missing else ""
    )
    Console().print(f"Exported: {words}", soft_wrap=True, highlight=False)
    raise typer.Exit(_MISSING if missing else 0)


@app.command("import")
def import_data(
    source: Annotated[Path, typer.Argument(metavar="ARCHIVE|DIR", help="What `flexeval data export` wrote.")],
) -> None:
    """Put the files of an archive where they are looked for: all of them, checked, or none."""
    from flexeval.benchmark.parcel import unpack

    done = unpack(source, _roots())
    words = f"{done.num_new} files" + (f"; {done.num_there} were there already" if done.num_there else "")
    Console().print(f"Imported: {words}", soft_wrap=True, highlight=False)


def _take(suite: str, *, downloads: bool) -> list[Need]:
    from flexeval.benchmark.suites import load_suite
    from flexeval.cache import cache_root
    from flexeval.progress import choose_progress

    loaded = load_suite(suite)
    with choose_progress(Console(stderr=True)).activity("looking" if not downloads else "fetching") as update:
        import flexeval.benchmark.helm  # noqa: F401 (first, and quietly)
        from flexeval.benchmark.helm.inventory import take_inventory

        return take_inventory(loaded, cache_root() / "helm", downloads=downloads, on_task=update)


def _roots() -> dict[str, Path]:
    """The folders that data lie below, the most particular first."""
    import datasets  # type: ignore[import-untyped]
    import nltk  # type: ignore[import-untyped]

    from flexeval.cache import cache_root

    return {
        "cache": cache_root(),
        "datasets": Path(datasets.config.HF_DATASETS_CACHE),
        "nltk": Path(nltk.data.path[0]),
    }


def _to_json(need: Need) -> dict[str, object]:
    return {
        "path": str(need.path),
        "source": need.source,
        "licence": need.licence,
        "bytes": need.num_bytes,
        "tasks": list(need.tasks),
        "is_there": need.is_there,
        "reason": need.reason,
    }


def _print(needs: list[Need]) -> None:
    from flexeval.config import format_size

    console = Console()
    for need in needs:
        tasks = need.tasks[0] + (f" and {len(need.tasks) - 1} more" if len(need.tasks) > 1 else "")
        state = f"there, {format_size(need.num_bytes)}" if need.is_there else f"missing: {need.reason}"
        lines = (tasks, f"  {state}", f"  at   {need.path}", f"  from {need.source}", f"  licence: {need.licence}")
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    num_there = sum(need.is_there for need in needs)
    console.print(f"{num_there} of {len(needs)} are there", highlight=False)
