"""How long something takes on this machine. Knows clocks; not what is timed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

FAST_BUDGET_S = 0.05
"""For what takes well under a millisecond a time."""
RESTING_S, HEATING_S, SUSTAINED_S = 0.3, 0.7, 0.3
"""A GPU's rest before it is timed cold; how long it computes before it is timed hot; and for how long it is then."""


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


def sustained_seconds(run: Callable[[], object], *, once_s: float) -> float:
    """The mean of many runs, of about `once_s`, on a GPU that has been busy for a while.

    At the limit of its power it is slower than cold: an H200 multiplied at 777 TFLOP/s in its first tenth of a second,
    and at 680 after some; another at 766 and 650.
    """
    num_runs = max(1, round(0.01 / once_s))

    def seconds(budget_s: float) -> float:
        start, num_rounds = time.perf_counter(), 0
        while (elapsed_s := time.perf_counter() - start) < budget_s:
            for _ in range(num_runs):
                run()
            torch.cuda.synchronize()
            num_rounds += 1
        return elapsed_s / (num_rounds * num_runs)

    seconds(HEATING_S)
    return seconds(SUSTAINED_S)
