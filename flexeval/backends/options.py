"""What the user wrote of policy and limits, as plain values. Knows how to read text; not what is done with it."""

from __future__ import annotations

from pathlib import Path

from flexeval.config import Limits, parse_disk, parse_size
from flexeval.policy.policy import Policy


def read_policy(policy: str | Policy) -> Policy | None:
    """A policy from what the user wrote; None where it is to be searched for. Raises `ConfigError`."""
    if policy == "auto":
        return None
    if isinstance(policy, Policy):
        return policy
    try:
        is_file = Path(policy).is_file()
    except OSError:  # too long for a path
        is_file = False
    return Policy.load(Path(policy)) if is_file else Policy.parse(policy)


def read_limits(gpu_memory: str | int | None, cpu_memory: str | int | None, disk: str | Path | None) -> Limits:
    """Limits from what the user wrote. Raises `ConfigError`."""
    disk_dir, disk_bytes = parse_disk(str(disk)) if disk is not None else (None, 0)
    return Limits(
        gpu_bytes=None if gpu_memory is None else parse_size(gpu_memory),
        cpu_bytes=None if cpu_memory is None else parse_size(cpu_memory),
        disk_bytes=disk_bytes,
        disk_dir=disk_dir,
    )
