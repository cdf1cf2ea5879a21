"""The machine and the software that a result was made with, in words. Knows where to ask; measures nothing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

import flexeval
from flexeval.config import format_size

_PACKAGES = ("torch", "transformers", "crfm-helm", "numpy")


def describe_machine() -> dict[str, str]:
    """Processor, cores, memory and GPU."""
    import torch

    machine = {
        "processor": processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": format_size(psutil.virtual_memory().total),
        "system": platform.platform(terse=True),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        machine["gpu"] = f"{properties.name}, {format_size(properties.total_memory)}"
    return machine


def describe_versions() -> dict[str, str]:
    """Versions of what answers depend on."""
    versions = {"flexeval": flexeval.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def processor() -> str:
    """What the processor calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
