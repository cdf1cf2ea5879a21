"""Rates of this machine that were measured at leisure (`flexeval profile`) and kept. Measures nothing itself.

A profile is of one device, one type of arithmetic and one disk. It is of no use to a machine that differs in any part.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil

from flexeval import typed
from flexeval.cache import cache_root
from flexeval.environment import processor
from flexeval.files import read_json, write_json

FORMAT = 4
"""Of the file; measured again where it is another."""
FEW_TOKENS = 16
"""Tokens of the product that is measured as one of few."""
BUSY_SPREAD = 0.25
"""A rate that varies by more of itself was measured beside other work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What was measured, and how far it varied."""

    created: str
    """ISO 8601, UTC."""
    machine: dict[str, str]
    """What it is of, in words."""
    rates: dict[str, float]
    """Those of `hardware.Hardware` by their names there: the median of all measurements."""
    spreads: dict[str, float]
    """Of each, the largest difference between two measurements as a share of the median."""
    num_repeats: int
    """Measurements."""
    format: int = FORMAT
    """Of this file."""


def identity(device: str, dtype: str, disk_dir: Path | None, gpu: str | None) -> dict[str, str]:
    """What a profile holds for.

    Args:
        device: `cpu` or `cuda`.
        dtype: Type of the arithmetic.
        disk_dir: Folder for what is offloaded, if any; it need not exist.
        gpu: Name of the GPU that is computed on, if any.
    """
    machine = {
        "processor": processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": str(psutil.virtual_memory().total),
        "device": device,
        "dtype": dtype,
        "torch": version("torch"),
    }
    if gpu is not None:
        machine["gpu"] = gpu
    if disk_dir is not None:
        there = next(folder for folder in (disk_dir.absolute(), *disk_dir.absolute().parents) if folder.exists())
        machine["disk"] = str(there.stat().st_dev)
    return machine


def path_of(machine: Mapping[str, str]) -> Path:
    """Where the profile of a machine lies, if there is one."""
    digest = hashlib.sha256(json.dumps([FORMAT, dict(machine)], sort_keys=True).encode()).hexdigest()
    return cache_root() / "profiles" / f"{digest[:16]}.json"


def load(machine: Mapping[str, str]) -> Profile | None:
    """The profile of a machine; None where there is none that can be read."""
    with suppress(OSError, ValueError):
        profile = typed.read(Profile, read_json(path_of(machine)))
        if profile.format == FORMAT and profile.machine == machine and all(map(_is_rate, profile.rates.values())):
            return profile
    return None


def _is_rate(value: float) -> bool:
    return 0 <= value < math.inf


def summarize(machine: Mapping[str, str], measured: Sequence[Mapping[str, float]]) -> Profile:
    """A profile of several measurements."""
    rates = {name: median(one[name] for one in measured) for name in measured[0]}
    spreads = {
        name: (max(one[name] for one in measured) - min(one[name] for one in measured)) / rate if rate else 0.0
        for name, rate in rates.items()
    }
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Profile(created=created, machine=dict(machine), rates=rates, spreads=spreads, num_repeats=len(measured))


def save(profile: Profile, path: Path) -> None:
    """Write a profile, whole or not at all."""
    write_json(path, asdict(profile))
