"""Letting a backend answer, on the clock: what measuring the engine and measuring a peer have in common."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from flexeval.backends.backend import Backend
from flexeval.bench.figures import SystemFigures
from flexeval.progress import Progress
from flexeval.request import Completion, Request

R = TypeVar("R")


class Measured(NamedTuple):
    """What a child hands back."""

    figures: SystemFigures
    answers: list[tuple[int, ...]]
    """Tokens of the answer to each request that was asked."""
    hardware: dict[str, Any]
    """The machine as it was measured; empty for peers."""


class Answered(NamedTuple):
    """Answers, and the seconds they took."""

    completions: list[Completion]
    elapsed_s: float


def answer(backend: Backend, requests: Sequence[Request], progress: Progress, label: str) -> Answered:
    """Let a backend answer all requests at once."""
    num_done = 0
    with progress.activity(label) as update:

        def count(finished: Sequence[tuple[int, Completion]]) -> None:
            nonlocal num_done
            num_done += len(finished)
            update(num_done, len(requests))

        start = time.perf_counter()
        completions = backend.generate(requests, on_completions=count)
        return Answered(completions, time.perf_counter() - start)


def median(runs: Sequence[R], *, key: Callable[[R], float]) -> R:
    """The run in the middle; of an even number the quicker of the two there."""
    return sorted(runs, key=key)[(len(runs) - 1) // 2]


def _every(completions: Sequence[Completion]) -> list[Completion]:
    return [one for completion in completions for one in (completion, *completion.alternatives)]


def num_generated(completions: Sequence[Completion]) -> int:
    """Tokens generated, over all completions of all requests."""
    return sum(one.num_generated_tokens for one in _every(completions))


def tokens(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    """The tokens of each request's first completion."""
    return [completion.token_ids for completion in completions]


def resident_peak_bytes() -> int:
    """The most memory this process ever had in use.

    Linux hands `ru_maxrss` on from parent to child, but not `VmHWM`; elsewhere, `ru_maxrss` counts bytes on macOS and
    kibibytes on the others.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
