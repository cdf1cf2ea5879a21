"""What happened, in numbers: bytes and seconds per lane, seconds per phase, both again per sweep.

Knows counters; draws no conclusion.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

from flexeval.policy.measured import MOST_SWEEPS
from flexeval.policy.sweeps import Sweep


@dataclass(slots=True)
class LaneTrace:
    """One lane's work."""

    num_bytes: int = 0
    """Bytes moved between tiers; of `host_attention`, those that the CPU attended to where they rest. Values that a
    sparse setting leaves where they are do not count."""
    busy_s: float = 0.0
    """Seconds at work: of the device where it is a GPU, else of the host."""

    def add(self, other: LaneTrace) -> None:
        """Count further work."""
        self.num_bytes += other.num_bytes
        self.busy_s += other.busy_s


@dataclass(slots=True, kw_only=True)
class SweepTrace:
    """One pass over the layers, or several added up."""

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
    """By phase, what its rows compute, as the cost model counts it; not known of several."""
    num_sweeps: int = 1
    """Passes that it is the sum of."""


@dataclass(slots=True)
class Trace:
    """Counters of one engine, since it was loaded."""

    lanes: dict[str, LaneTrace] = field(default_factory=lambda: defaultdict(LaneTrace))
    """By lane: `weights`, `disk`, `kv_in`, `kv_out`, `hidden`, `host_attention`, and `compute`, which moves nothing."""
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Host seconds by phase: `plan`, `embed`, `layers`, `head`."""
    sweeps: list[SweepTrace] = field(default_factory=list)
    """Passes over the layers since the batch began, in order. Of a long batch the first are added up: those with prompt
    tokens, and those without."""
    num_layers_begun: int = 0
    """Of the sweep under way."""
    num_prompt_tokens: int = 0
    """Prompt tokens of all requests."""
    num_computed_prompt_tokens: int = 0
    """Prompt tokens that went through the layers."""
    num_generated_tokens: int = 0
    """Tokens drawn."""
    _marks: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0]))
    """Per lane, its bytes when it was settled, and when each sweep since then began."""

    def begin_batch(self) -> None:
        """Forget the sweeps of the batch before, all of them settled."""
        self.sweeps = []

    def begin_sweep(self, sweep: SweepTrace) -> None:
        """Open a sweep's account."""
        self.sweeps.append(sweep)
        self.num_computed_prompt_tokens += sweep.num_fresh_tokens

    def moved(self, lane: str, num_bytes: int) -> None:
        """Count bytes that crossed from one tier to another, or were read where they rest."""
        self.lanes[lane].num_bytes += num_bytes

    def mark(self, lane: str) -> None:
        """Note, in the lane's own order of work, that a sweep begins: what it moves from here on belongs to it."""
        self._marks[lane].append(self.lanes[lane].num_bytes)

    def settle(self, lane: str, laps: Sequence[float]) -> None:
        """Give a lane and the sweeps since it was settled their seconds and bytes, once its work is done.

        Args:
            lane: Its name.
            laps: Its busy seconds since then, before the next sweep began and during each.
        """
        total = self.lanes[lane]
        total.busy_s += sum(laps)
        marks = [*self._marks[lane], total.num_bytes]
        self._marks[lane] = [total.num_bytes]
        late, *parts = (LaneTrace(stop - first, lap) for (first, stop), lap in zip(pairwise(marks), laps, strict=True))
        first = len(self.sweeps) - len(parts)
        if first:
            self.sweeps[first - 1].lanes[lane].add(late)
        for sweep, part in zip(self.sweeps[first:], parts, strict=True):
            sweep.lanes[lane] = part

    def shorten(self) -> None:
        """Make few sweeps of many, all of them settled: a batch that takes a night keeps no more than a short one."""
        earlier, last = self.sweeps[:-MOST_SWEEPS], self.sweeps[-MOST_SWEEPS:]
        with_prompts = [sweep for sweep in earlier if sweep.num_fresh_tokens]
        without = [sweep for sweep in earlier if not sweep.num_fresh_tokens]
        sums = [add_up(sweeps) for sweeps in (with_prompts, without) if sweeps]
        self.sweeps = [*sums, *last]  # at once: other threads read it

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the host seconds of a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] += time.perf_counter() - start


def add_up(sweeps: Sequence[SweepTrace]) -> SweepTrace:
    """Sweeps as one, all of them settled; at least one."""
    total = SweepTrace(
        num_fresh_tokens=sum(sweep.num_fresh_tokens for sweep in sweeps),
        num_decode_tokens=sum(sweep.num_decode_tokens for sweep in sweeps),
        elapsed_s=sum(sweep.elapsed_s for sweep in sweeps),
        began_s=sweeps[0].began_s,
        lanes={name: LaneTrace() for name in sweeps[0].lanes},
        num_sweeps=sum(sweep.num_sweeps for sweep in sweeps),
    )
    for sweep in sweeps:
        for name, lane in sweep.lanes.items():
            total.lanes[name].add(lane)
    return total
