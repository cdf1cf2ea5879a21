"""How much host memory is really free: the machine's, or less where a cgroup (a container, a batch job) says so.

Knows the files of Linux cgroups, version 1 and 2, and psutil; nothing of GPUs, models or policies.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil


class _Version(NamedTuple):
    """Where a version of cgroups keeps its figures."""

    mount: str
    limit: str
    usage: str
    reclaimable: str


_V1 = _Version("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Version("", "memory.max", "memory.current", "inactive_file")


def free_host_bytes(root: Path = Path("/")) -> int:
    """Bytes this process can still take: the least of what the machine has available and what its cgroups allow.

    Args:
        root: Where `proc` and `sys` are mounted.
    """
    available = int(psutil.virtual_memory().available)
    return max(0, min([available, *_cgroup_free_bytes(root)]))


def _cgroup_free_bytes(root: Path) -> Iterator[int]:
    """Room under every limit from this process's cgroup up to the root (a parent's limit binds its children)."""
    membership = root / "proc/self/cgroup"
    if not membership.is_file():  # not Linux
        return
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version = _V2
        elif "memory" in controllers.split(","):
            version = _V1
        else:
            continue
        mount = root / "sys/fs/cgroup" / version.mount
        # Inside a container the path may name a group of the host; then only the mount's own files are visible.
        group = mount / path.strip("/")
        for folder in (group, *group.parents):
            if (folder / version.limit).is_file():
                yield from _room(folder, version)
            if folder == mount:
                break


def _room(folder: Path, version: _Version) -> Iterator[int]:
    limit = (folder / version.limit).read_text().strip()
    if limit == "max":
        return
    usage = int((folder / version.usage).read_text())
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    # Page cache not touched lately is given back under pressure, so it counts as free (as Kubernetes counts it).
    yield int(limit) - usage + int(statistics.get(version.reclaimable, 0))
