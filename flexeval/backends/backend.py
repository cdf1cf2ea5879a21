"""What a backend is: requests in, completions out, and what it cost. Knows no backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flexeval.request import Completion, Request

OnCompletions = Callable[[Sequence[tuple[int, Completion]]], None]
"""Told which requests (by index) are answered, as soon as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a backend has used since it was loaded."""

    load_s: float
    """Seconds to load the weights."""
    num_prompt_tokens: int
    """Prompt tokens of all sequences."""
    num_computed_prompt_tokens: int
    """Prompt tokens that were computed; fewer where shared ones are computed once."""
    num_generated_tokens: int
    """Tokens generated."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Largest use of each memory tier; tiers that were not measured are absent."""
    policy: dict[str, Any] = field(default_factory=dict)
    """The policy that ran, as JSON; empty where there is none."""
    lanes: dict[str, dict[str, float]] = field(default_factory=dict)
    """Per lane: `num_bytes` moved and `busy_s` seconds it was busy."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds by phase of the work."""
    predicted_s: float = 0.0
    """Seconds that the cost model foretold for what was answered; 0 where nothing was foretold."""
    corrected_s: float = 0.0
    """The same as foretold once a first block was measured, wherever one was; 0 where none was."""
    energy_j: float | None = None
    """Joules that the GPU used while it answered, by its own counter; None where nothing tells."""
    planned_bytes: dict[str, int] = field(default_factory=dict)
    """Of each memory tier, the most that the plan allowed for."""
    splits: list[str] = field(default_factory=list)
    """For each time that memory ran out: what was made smaller so that work could go on."""
    lost_s: float = 0.0
    """Seconds of work that had to be done again then; in no answer's share."""
    moves: list[str] = field(default_factory=list)
    """For each time that the rest of a batch was placed anew because it was worth it: what was changed."""


def add_up(usages: Sequence[Usage]) -> Usage:
    """What several sessions have used: figures add up, peaks are the highest, the policy is the last one's."""
    lanes: dict[str, Counter[str]] = {}
    phases: Counter[str] = Counter()
    for usage in usages:
        phases.update(usage.phases)
        for lane, figures in usage.lanes.items():
            lanes.setdefault(lane, Counter()).update(figures)
    return Usage(
        load_s=sum(usage.load_s for usage in usages),
        num_prompt_tokens=sum(usage.num_prompt_tokens for usage in usages),
        num_computed_prompt_tokens=sum(usage.num_computed_prompt_tokens for usage in usages),
        num_generated_tokens=sum(usage.num_generated_tokens for usage in usages),
        peak_bytes=_highest([usage.peak_bytes for usage in usages]),
        policy=next((usage.policy for usage in reversed(usages) if usage.policy), {}),
        lanes={lane: dict(figures) for lane, figures in lanes.items()},
        phases=dict(phases),
        predicted_s=sum(usage.predicted_s for usage in usages),
        corrected_s=sum(usage.corrected_s for usage in usages),
        energy_j=_sum_if_known([usage.energy_j for usage in usages]),
        planned_bytes=_highest([usage.planned_bytes for usage in usages]),
        splits=[words for usage in usages for words in usage.splits],
        lost_s=sum(usage.lost_s for usage in usages),
        moves=[words for usage in usages for words in usage.moves],
    )


def _sum_if_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _highest(peaks: Sequence[dict[str, int]]) -> dict[str, int]:
    """By tier."""
    tiers = dict.fromkeys(tier for peak in peaks for tier in peak)
    return {tier: max(peak.get(tier, 0) for peak in peaks) for tier in tiers}


class Backend(Protocol):
    """Answers requests with one model."""

    name: str
    """As it appears in reports."""

    def generate(
        self, requests: Sequence[Request], *, on_completions: OnCompletions = lambda completions: None
    ) -> list[Completion]:
        """Answer all requests, in their order. Raises; never answers a failed request with an empty completion."""
        ...

    def usage(self) -> Usage:
        """What was used so far."""
        ...

    def close(self) -> None:
        """Give back memory, threads and files."""
        ...
