"""A file or folder that questions are read from: where, whence, for whom. Plain values; knows no benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flexeval.benchmark.supply.catalogue import licence_of, note_on
from flexeval.benchmark.supply.manifest import files_of

Fetch = Callable[[], object]
"""Brings something, or raises."""
NOT_FETCHED = "not fetched yet"
"""The reason that needs no words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """A file or folder that questions are read from."""

    what: str
    """A name for people: `train.jsonl`, `wmt14 (cs-en)`."""
    path: Path
    """Where it is looked for."""
    source: str
    """Where it comes from: an address, a dataset's name, a package."""
    tasks: tuple[str, ...]
    """Whose questions."""
    is_there: bool
    reason: str = ""
    """Why it is not."""
    fetch: Fetch | None = field(default=None, compare=False, repr=False)
    """Brings it; None if nobody knows how."""

    @property
    def num_bytes(self) -> int:
        """Bytes there."""
        return sum(file.stat().st_size for file in files_of(self.path)) if self.path.exists() else 0

    @property
    def licence(self) -> str:
        """Of the data, and who says so; `unknown` where nobody does."""
        return licence_of(self.source)

    @property
    def note(self) -> str:
        """What else one should know before fetching it."""
        return note_on(self.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What a suite needs."""

    needs: tuple[Need, ...]
    """In the order in which its tasks ask for them."""
    open_ends: dict[str, str]
    """Tasks that may need more than is listed, or whose data cannot be read, and why."""

    @property
    def missing(self) -> tuple[Need, ...]:
        """What is not there."""
        return tuple(need for need in self.needs if not need.is_there)

    @property
    def is_complete(self) -> bool:
        """Whether all is there and can be read."""
        return not self.missing and not self.open_ends
