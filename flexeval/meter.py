"""How far a batch is, how fast beside the plan, and when it should be done. Knows counts; no engine, no screen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePlan:
    """What the cost model foretells of one phase."""

    num_sweeps: int
    """Passes over the layers."""
    num_tokens: float
    """New tokens computed in all of them."""
    elapsed_s: float
    """Seconds of all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauge:
    """Where an engine stands in its batch, as read in passing."""

    num_sweeps: int = 0
    """Passes over the layers that are done."""
    sweep_share: float = 0.0
    """Of the one under way, the share of layers that were begun."""
    num_prompt_tokens: float = 0.0
    """Prompt tokens computed, those of the pass under way by its share."""
    num_decode_tokens: float = 0.0
    """Tokens computed to continue sequences, likewise."""
    elapsed_s: float = 0.0
    """Seconds in sweeps, the one under way included."""
    used_bytes: Mapping[str, int] = field(default_factory=dict)
    """In use now, by memory tier."""
    plan: Mapping[str, PhasePlan] = field(default_factory=dict)
    """What was foretold, by phase (`prefill`, `decode`); empty before there is a plan."""
    left_s: float | None = None
    """Seconds that what is left should take by the plan as it was corrected; None before it was."""
    planned_bytes: Mapping[str, int] = field(default_factory=dict)
    """Most that the plan allows for, by memory tier."""
    foretold_s: float | None = None
    """What the plan said of all of the batch; None before there is a plan."""
    corrected_s: float | None = None
    """What was said of it after its first block; None before that has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCount:
    """One task's requests."""

    name: str
    """Its name."""
    num_requests: int
    """All of them."""
    num_done: int
    """Those answered, by an earlier run or this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """Where the answering under one setting stands: what a person is shown."""

    setting: str
    """Its name."""
    num_requests: int
    """Different requests, those that an earlier run has answered included."""
    num_done: int
    """Those answered."""
    num_resumed: int
    """Of these, by an earlier run."""
    tasks: tuple[TaskCount, ...]
    """In the suite's order; a request that several share counts in each."""
    elapsed_s: float
    """Seconds in sweeps."""
    num_sweeps: int
    """Passes over the layers that are done."""
    sweep_share: float
    """Of the one under way, the share of layers that were begun."""
    num_planned_sweeps: int
    """Passes that the plan foretells, at most: texts may end early. 0 where there is no plan."""
    tokens_per_s: float | None
    """Prompt tokens computed and tokens drawn, a second; None before there are any."""
    planned_tokens_per_s: float | None
    """What the plan foretells for the same tokens; None where there is no plan."""
    left_s: float | None
    """Seconds that it should still take; None where nothing is known."""
    used_bytes: Mapping[str, int]
    """In use now, by memory tier."""
    planned_bytes: Mapping[str, int]
    """Most that the plan allows for, by memory tier."""
    foretold_s: float | None = None
    """Seconds that were foretold of all of it at first; None where there was no plan."""
    corrected_s: float | None = None
    """Seconds that were foretold of it after the first block; None where that has not ended."""


class Meter:
    """Counts answers while an engine gives them; read from any thread."""

    def __init__(
        self,
        setting: str,
        max_tokens: Sequence[int],
        tasks: Mapping[str, Sequence[int]],
        *,
        resumed: Iterable[int],
        read_gauge: Callable[[], Gauge],
    ):
        """Begin to count.

        Args:
            setting: Name of the setting.
            max_tokens: Of every request, tokens generated at most.
            tasks: By name of a task, indices of its requests.
            resumed: Indices of requests that an earlier run has answered.
            read_gauge: Says where the engine stands.
        """
        self._setting = setting
        self._num_steps = [max(0, num - 1) for num in max_tokens]  # a text's first token comes from its prompt
        self._tasks_of: list[list[str]] = [[] for _ in max_tokens]
        for name, indices in tasks.items():
            for index in indices:
                self._tasks_of[index].append(name)
        self._num_requests = {name: len(indices) for name, indices in tasks.items()}
        self._num_done = dict.fromkeys(tasks, 0)
        self._done = set[int]()
        self._num_allowed = sum(self._num_steps)  # to those unanswered
        self._num_taken = self._num_taken_at_most = 0  # by those answered now
        self._lock = threading.Lock()
        self._read_gauge = read_gauge
        for index in resumed:
            self._count(index)
        self._num_resumed = len(self._done)

    def finish(self, answers: Iterable[tuple[int, int]]) -> None:
        """Count answers: the index of each request, and the tokens that were generated for it."""
        with self._lock:
            for index, num_generated in answers:
                if index not in self._done:
                    self._count(index)
                    self._num_taken += max(0, num_generated - 1)
                    self._num_taken_at_most += self._num_steps[index]

    def _count(self, index: int) -> None:
        self._done.add(index)
        self._num_allowed -= self._num_steps[index]
        for name in self._tasks_of[index]:
            self._num_done[name] += 1

    def read(self) -> Answering:
        """Where it stands now."""
        gauge = self._read_gauge()
        with self._lock:
            computed = {"prefill": gauge.num_prompt_tokens, "decode": gauge.num_decode_tokens}
            num_tokens = sum(computed.values())
            planned_s = _planned_s(gauge.plan, computed)
            return Answering(
                setting=self._setting,
                num_requests=len(self._tasks_of),
                num_done=len(self._done),
                num_resumed=self._num_resumed,
                tasks=tuple(
                    TaskCount(name=name, num_requests=num, num_done=self._num_done[name])
                    for name, num in self._num_requests.items()
                ),
                elapsed_s=gauge.elapsed_s,
                num_sweeps=gauge.num_sweeps,
                sweep_share=gauge.sweep_share,
                num_planned_sweeps=sum(phase.num_sweeps for phase in gauge.plan.values()),
                tokens_per_s=num_tokens / gauge.elapsed_s if num_tokens and gauge.elapsed_s else None,
                planned_tokens_per_s=num_tokens / planned_s if planned_s else None,
                left_s=self._left_s(gauge, planned_s),
                used_bytes=dict(gauge.used_bytes),
                planned_bytes=dict(gauge.planned_bytes),
                foretold_s=gauge.foretold_s,
                corrected_s=gauge.corrected_s,
            )

    def _left_s(self, gauge: Gauge, planned_s: float) -> float | None:
        """What the plan foretells for the tokens left, at the pace kept so far; once it is corrected, by that.

        Texts that are not ended yet are taken to use the same share of the tokens that they may still draw as those
        that are used of all.
        """
        if len(self._done) == len(self._tasks_of):
            return 0.0
        if not gauge.plan or gauge.left_s is not None:
            return gauge.left_s
        used = self._num_taken / self._num_taken_at_most if self._num_taken_at_most else 1.0
        in_flight = max(0.0, gauge.num_decode_tokens - self._num_taken)
        prefill = gauge.plan["prefill"]
        left = {
            "prefill": max(0.0, prefill.num_tokens - gauge.num_prompt_tokens),
            "decode": used * max(0.0, self._num_allowed - in_flight),
        }
        pace = gauge.elapsed_s / planned_s if planned_s and gauge.elapsed_s else 1.0
        return pace * _planned_s(gauge.plan, left)


def _planned_s(plan: Mapping[str, PhasePlan], tokens: Mapping[str, float]) -> float:
    """Seconds that a plan foretells for so many tokens of each phase."""
    return sum(
        num * phase.elapsed_s / phase.num_tokens
        for name, num in tokens.items()
        if (phase := plan.get(name)) is not None and phase.num_tokens
    )
