"""How long something takes on this machine. Knows clocks; not what is timed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

FAST_BUDGET_S = 0.05
"""For what takes well under a millisecond a time."""


def best_seconds(run: Callable[[], object], device: str, *, budget_s: float = 0.1) -> float:
    """The shortest of several runs, at least two after a warm-up and no more than the budget asks for."""

    def timed() -> float:
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    seconds = [timed(), timed()]
    while sum(seconds) < budget_s:
        seconds.append(timed())
    return min(seconds)
