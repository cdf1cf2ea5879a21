"""Memory that a process keeps: what is freed is used again without the system, and is given back when asked."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

MEASURE = """
import resource
from flexeval.engine.memory import heap
import torch
if {keeps}:
    heap.keep_freed()
def compute():
    return sum(float(made[0]) for made in [torch.ones(2**22) for _ in range(6)])
compute()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    compute()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
kept = open("/proc/self/statm").read().split()[1]
heap.give_back()
print(int(kept) - int(open("/proc/self/statm").read().split()[1]))
"""


def faults_and_kept(*, keeps: bool) -> tuple[int, int]:
    """Pages that twenty rounds of 96 MiB touched anew, and those given back at the end."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE.format(keeps=keeps)], capture_output=True, text=True, check=True, timeout=120
    )
    faults, kept = map(int, run.stdout.split())
    return faults, kept


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another")
def test_what_is_freed_is_used_again_and_given_back_when_asked() -> None:
    pages = 6 * 2**24 // resource.getpagesize()
    (kept_faults, given_back), (faults, _) = (faults_and_kept(keeps=keeps) for keeps in (True, False))
    assert kept_faults < 3 * pages < faults, "one round's, not twenty's"
    assert given_back > pages / 2
