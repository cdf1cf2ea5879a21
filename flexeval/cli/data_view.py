"""What `flexeval data` prints of an inventory: for people, a few lines a need; for programs, JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from flexeval.benchmark.supply.need import NOT_FETCHED
from flexeval.config import format_size

if TYPE_CHECKING:
    from flexeval.benchmark.supply.need import Inventory, Need

_NUM_TASKS_NAMED = 3
_COLORS = {"there": "green", "missing": "red", "damaged": "red"}


def print_inventory(
    console: Console,
    suite: str,
    inventory: Inventory,
    damage: Mapping[Path, str],
    remote: Mapping[Path, int],
    *,
    is_fetched: bool = False,
) -> None:
    """Print every need, what may be needed beyond, and what to do."""
    for need in inventory.needs:
        _print_need(console, need, damage.get(need.path, ""), remote.get(need.path))
    tasks_of: dict[str, list[str]] = {}
    for task, why in inventory.open_ends.items():
        tasks_of.setdefault(why, []).append(task)
    for why, tasks in tasks_of.items():
        console.print(Text.assemble((f"{'unclear':9}", "yellow"), f"{_named(tasks)}: {why}"), soft_wrap=True)
    console.print(
        sum_up(suite, inventory, damage, is_fetched=is_fetched), markup=False, highlight=False, soft_wrap=True
    )


def _print_need(console: Console, need: Need, damage: str, remote: int | None) -> None:
    state = _state(need, damage)
    num_bytes = need.num_bytes if need.is_there else remote
    size = f"  {format_size(num_bytes)}" if num_bytes is not None else ""
    reason = damage or need.reason
    details = {
        "why": "" if reason == NOT_FETCHED else reason,
        "for": _named(need.tasks),
        "from": need.source,
        "licence": need.licence,
        "note": need.note,
        "path": str(need.path),  # whole, on one line, to be copied
    }
    console.print(Text.assemble((f"{state:9}", _COLORS[state]), need.what, size), soft_wrap=True)
    for label, text in details.items():
        if text:
            console.print(Text(f"{'':9}{label:8} {text}"), soft_wrap=True)


def _named(tasks: Sequence[str]) -> str:
    """Tasks in a few words, by their first arguments: `mmlu: anatomy, virology and 3 more; gsm`."""
    arguments: dict[str, list[str]] = {}
    for task in tasks:
        head, _, tail = task.partition(": ")
        arguments.setdefault(head, []).append(tail.partition(",")[0])
    return "; ".join(_one_of_each(head, tails) for head, tails in arguments.items())


def _one_of_each(head: str, tails: list[str]) -> str:
    named = [tail for tail in tails if tail][:_NUM_TASKS_NAMED]
    more = f" and {len(tails) - len(named)} more" if named and len(tails) > len(named) else ""
    return f"{head}: {', '.join(named)}{more}" if named else head


def sum_up(suite: str, inventory: Inventory, damage: Mapping[Path, str], *, is_fetched: bool = False) -> str:
    """How much is there, and which command brings the rest; what can be fetched may have been."""
    needs, missing = inventory.needs, inventory.missing
    if not needs and not inventory.open_ends:
        return f"{suite} needs no files: its tasks make their questions themselves."
    num_bytes = sum(need.num_bytes for need in needs if need.is_there)
    text = f"{len(needs) - len(missing)} of {len(needs)} are there ({format_size(num_bytes)})"
    if inventory.open_ends:
        text += f"; unclear: {len(inventory.open_ends)}"
    if damage:
        text += f"; {len(damage)} damaged: remove what is, then fetch or import it again"
    if not missing:
        return text
    fetch = "" if is_fetched else f"To get the rest:    flexeval data fetch --suite {suite}\n"
    return (
        f"{text}.\n{fetch}"
        f"Without a network:  flexeval data export --suite {suite} -o data.tar.gz   where there is one,\n"
        f"                    flexeval data import data.tar.gz   here"
    )


def as_json(
    suite: str,
    inventory: Inventory,
    damage: Mapping[Path, str],
    remote: Mapping[Path, int],
    recorded: Collection[Path],
) -> str:
    """Return an inventory as JSON: `suite`, `is_complete`, `needs`, `unclear`."""
    needs = [
        {
            "what": need.what,
            "state": _state(need, damage.get(need.path, "")),
            "reason": damage.get(need.path, need.reason),
            "path": str(need.path),
            "source": need.source,
            "licence": need.licence,
            "note": need.note,
            "bytes": need.num_bytes if need.is_there else remote.get(need.path),
            "has_checksum": need.path in recorded,
            "tasks": list(need.tasks),
        }
        for need in inventory.needs
    ]
    is_complete = inventory.is_complete and not damage
    found = {"suite": suite, "is_complete": is_complete, "needs": needs, "unclear": inventory.open_ends}
    return json.dumps(found, indent=1, ensure_ascii=False)


def _state(need: Need, damage: str) -> str:
    return "damaged" if damage else "there" if need.is_there else "missing"
