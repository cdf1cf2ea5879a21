"""What happened, in numbers: bytes and seconds per lane, seconds per phase, both again per sweep.

Knows counters; draws no conclusion.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from flexeval.policy.sweeps import Sweep


@dataclass(slots=True)
class LaneTrace:
    """One lane's work."""

    num_bytes: int = 0
    """Bytes moved between tiers; of `host_attention`, those that the CPU attended to where they rest. Values that a
    sparse setting leaves where they are do not count."""
    busy_s: float = 0.0
    """Seconds at work: of the device where it is a GPU, else of the host."""


@dataclass(slots=True, kw_only=True)
class SweepTrace:
    """One pass over the layers."""

    num_fresh_tokens: int
    """Prompt tokens computed."""
    num_decode_tokens: int
    """Sequences that were continued, by a token each."""
    elapsed_s: float = 0.0
    """Seconds from planning it to the end of its last answer; 0 while it is under way."""
    began_s: float = field(default_factory=time.perf_counter)
    """The host's clock when its rows were known."""
    lanes: dict[str, LaneTrace] = field(default_factory=dict)
    """What was submitted to each lane during the sweep; known when the account was settled since."""
    done: Mapping[str, Sweep] = field(default_factory=dict)
    """By phase, what its rows compute, as the cost model counts it."""


@dataclass(slots=True)
class Trace:
    """Counters of one engine, since it was loaded."""

    lanes: dict[str, LaneTrace] = field(default_factory=lambda: defaultdict(LaneTrace))
    """By lane: `weights`, `disk`, `kv_in`, `kv_out`, `hidden`, `host_attention`, and `compute`, which moves nothing."""
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Host seconds by phase: `plan`, `embed`, `layers`, `head`."""
    sweeps: list[SweepTrace] = field(default_factory=list)
    """Passes over the layers, in order."""
    num_layers_begun: int = 0
    """Of the sweep under way."""
    num_prompt_tokens: int = 0
    """Prompt tokens of all requests."""
    num_generated_tokens: int = 0
    """Tokens drawn."""
    _marks: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Per lane, its bytes when each sweep began."""

    @property
    def num_sweeps(self) -> int:
        """Passes over the layers."""
        return len(self.sweeps)

    @property
    def num_computed_prompt_tokens(self) -> int:
        """Prompt tokens that went through the layers."""
        return sum(sweep.num_fresh_tokens for sweep in self.sweeps)

    def moved(self, lane: str, num_bytes: int) -> None:
        """Count bytes that crossed from one tier to another, or were read where they rest."""
        self.lanes[lane].num_bytes += num_bytes

    def mark(self, lane: str) -> None:
        """Note, in the lane's own order of work, that a sweep begins: what it moves from here on belongs to it."""
        self._marks[lane].append(self.lanes[lane].num_bytes)

    def settle(self, lane: str, laps: Sequence[float]) -> None:
        """Give a lane and each sweep their seconds and bytes, once its work is done.

        Args:
            lane: Its name.
            laps: Its busy seconds before the first sweep and during each.
        """
        total = self.lanes[lane]
        total.busy_s = sum(laps)
        marks = [*self._marks[lane], total.num_bytes]
        assert len(laps) == len(marks) == len(self.sweeps) + 1, (lane, len(laps), len(marks), len(self.sweeps))
        for index, sweep in enumerate(self.sweeps):
            sweep.lanes[lane] = LaneTrace(marks[index + 1] - marks[index], laps[index + 1])

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the host seconds of a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] += time.perf_counter() - start
