"""What a check found, as plain data, and the exit code that follows. Knows no statistic and no layout."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """What became of one comparison."""

    PASS = "pass"
    """A drop beyond the tolerance is ruled out, or nothing changed at all."""
    REGRESSION = "regression"
    """A drop beyond the tolerance is shown."""
    OPEN = "open"
    """Neither is."""


class Kind(StrEnum):
    """What was compared."""

    QUALITY = "quality"
    THROUGHPUT = "throughput"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One comparison."""

    kind: Kind
    """Quality or throughput."""
    setting: str
    """Name of the setting."""
    subject: str
    """`overall`, a task's name, or what a speed is measured against."""
    status: Status
    """What became of it."""
    now: str
    """Now and before, in words: `27.8, was 28.1`."""
    why: str
    """What the status rests on."""
    lost: tuple[str, ...] = ()
    """Questions answered worse than before."""
    must_settle: bool = False
    """Whether the check has no answer while this is not settled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A whole check."""

    findings: tuple[Finding, ...]
    """The most important of each setting first."""
    notes: tuple[str, ...] = ()
    """What to know beside them."""

    @property
    def regressions(self) -> list[Finding]:
        """What got worse."""
        return [finding for finding in self.findings if finding.status is Status.REGRESSION]

    @property
    def undecided(self) -> list[Finding]:
        """What should have been settled and was not."""
        return [finding for finding in self.findings if finding.status is Status.OPEN and finding.must_settle]

    @property
    def exit_code(self) -> int:
        """0 pass, 1 regression, 2 could not decide."""
        return 1 if self.regressions else 2 if self.undecided else 0
