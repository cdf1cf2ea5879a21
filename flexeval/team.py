"""How many threads torch spreads an operation over. Knows cores and how torch counts; not what is computed.

Torch counts for each thread that calls it. A thread's first question sets its number: to the one that was set last, by
any thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

SPARED_CORES = 2
"""For the thread that feeds the compute device, and for the lanes."""


def num_spare_cores() -> int:
    """Cores that a computation beside the compute device may keep busy, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - SPARED_CORES)


def give_spare_cores(run: Callable[[Callable[[], None]], object]) -> None:
    """Have a thread spread its operations over the spare cores, if it is another than the caller's.

    Args:
        run: Calls what it is given in that thread, and returns when that is done.
    """
    own = torch.get_num_threads()
    run(_take_spare_cores)
    torch.set_num_threads(own)  # for threads that have not asked yet, and for the caller's


def _take_spare_cores() -> None:
    torch.get_num_threads()
    torch.set_num_threads(num_spare_cores())
