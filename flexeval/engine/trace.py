"""What happened, in numbers: bytes and seconds per lane, seconds per phase. Knows counters; draws no conclusion."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class LaneTrace:
    """One lane's work."""

    num_bytes: int = 0
    """Bytes moved between tiers."""
    busy_s: float = 0.0
    """Host seconds spent moving them."""


@dataclass(slots=True)
class Trace:
    """Counters of one engine, since it was loaded."""

    lanes: dict[str, LaneTrace] = field(default_factory=lambda: defaultdict(LaneTrace))
    """By lane: `weights`, `kv_in`, `kv_out`, `hidden`."""
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds by phase: `plan`, `embed`, `layers`, `head`."""
    num_sweeps: int = 0
    """Passes over the layers."""
    num_prompt_tokens: int = 0
    """Prompt tokens of all requests."""
    num_computed_prompt_tokens: int = 0
    """Prompt tokens that went through the layers."""
    num_generated_tokens: int = 0
    """Tokens drawn."""

    def moved(self, lane: str, num_bytes: int) -> None:
        """Count bytes that crossed from one tier to another."""
        self.lanes[lane].num_bytes += num_bytes

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the host seconds of a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] += time.perf_counter() - start
