"""Bring what is missing, and look again: what came may ask for more. Knows needs; must not know how any is met."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from flexeval.benchmark.network import impatient_downloads
from flexeval.benchmark.supply.need import Inventory, Need
from flexeval.errors import FlexevalError

During = Callable[[Need], AbstractContextManager[object]]
"""Makes what is entered while a need is met: it may show that this takes time."""


class Fetched(NamedTuple):
    """What fetching has done."""

    inventory: Inventory
    """The last one that was taken; of what could not be fetched it says why."""
    new: tuple[Need, ...]
    """The needs that were met."""


def fetch_missing(take: Callable[[], Inventory], *, during: During = lambda need: nullcontext()) -> Fetched:
    """Fetch what an inventory lacks until nothing new is asked for.

    Args:
        take: Takes the inventory.
        during: Entered while each need is met.
    """
    tried: dict[Path, str] = {}
    while True:
        inventory = take()
        wanted = [need for need in inventory.missing if need.path not in tried]
        if not wanted:
            break
        with impatient_downloads():
            for need in wanted:
                tried[need.path] = _try(need, during)
    needs = tuple(
        need if need.is_there else replace(need, reason=tried.get(need.path) or need.reason) for need in inventory.needs
    )
    new = tuple(need for need in needs if need.is_there and need.path in tried)
    return Fetched(replace(inventory, needs=needs), new)


def _try(need: Need, during: During) -> str:
    """Fetch one thing; say why it did not come, or nothing."""
    if need.fetch is None:
        return ""
    try:
        with during(need):
            need.fetch()
    except FlexevalError as error:
        return error.what.removeprefix(f"{need.source}: ")
    except Exception as error:  # the hub's library raises errors of many kinds; each is one line of the table
        lines = str(error).strip().splitlines() or ["no reason given"]
        return f"{type(error).__name__}: {lines[0]}"
    return ""
