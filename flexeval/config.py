"""What a user can choose, as plain values. Knows how to read them from text; not what they cost or how they run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from pathlib import Path

from flexeval.errors import ConfigError

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*$", re.IGNORECASE)
_UNIT_BYTES = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SETTING = re.compile(
    r"(?=w|kv|topk|quest)(?:w(?P<weight_bits>8|4))?(?:kv(?P<kv_bits>8|4|2))?(?:-g(?P<group_size>32|64|128))?"
    r"(?P<hqq>-hqq)?(?P<embed>-embed)?(?P<perchannel>-perchannel)?(?:(?:^|-)(?P<method>topk|quest)(?P<percent>[1-9][0-9]?))?"
)


def parse_size(text: str | int) -> int:
    """Bytes in a size such as `16GiB`, `500MB` or `1024`. Raises `ConfigError`."""
    match = _SIZE.match(str(text))
    if not match:
        raise ConfigError(f"{text!r} is not a size", mend="Write a number and a unit, such as 16GiB or 500MB")
    return int(Decimal(match[1]) * _UNIT_BYTES[(match[2] or "").lower()])


def format_size(num_bytes: float) -> str:
    """A size for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


class SparseMethod(StrEnum):
    """How a query's keys are chosen."""

    TOPK = "topk"
    """Those with the highest scores (FlexGen: Sheng et al., ICML 2023, section 5)."""
    QUEST = "quest"
    """Pages of them with the highest bounds of their scores (Quest: Tang et al., ICML 2024)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsity:
    """Of the keys that a query may see, which it attends to."""

    method: SparseMethod
    """How they are chosen."""
    percent: int
    """How many, in percent of those it may see, rounded up; in [1, 99]."""

    def __post_init__(self) -> None:
        assert 1 <= self.percent <= 99, self.percent


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to compress the same model; its name is the identity of a HELM deployment."""

    name: str
    """As the user wrote it: `none`, `w4`, `kv4`, `w4kv4-g128-topk10`, `w4-hqq-embed`, `kv4-perchannel`."""
    weight_bits: int | None = None
    """Bits of a layer's matrices at rest; None keeps them as loaded."""
    kv_bits: int | None = None
    """Bits of keys and values at rest; None keeps them as computed."""
    group_size: int = 64
    """Numbers that share a scale and a minimum: of a matrix along its inputs, of keys and values along the head."""
    is_refined: bool = False
    """Whether the minima of matrices' groups are refined by half-quadratic quantization."""
    codes_vocabulary: bool = False
    """Whether embedding and head rest as the layers' matrices do; else as loaded."""
    has_key_channels: bool = False
    """Whether keys rest channel by channel, each moved and scaled by its own range."""
    sparsity: Sparsity | None = None
    """Which keys are attended to; None attends to all."""

    @property
    def weights(self) -> str:
        """The part of the name that says what becomes of layers' weights: `w4-g128` of `w4kv4-g128-embed`."""
        if self.weight_bits is None:
            return "none"
        groups = "" if self.group_size == 64 else f"-g{self.group_size}"
        return f"w{self.weight_bits}{groups}{'-hqq' if self.is_refined else ''}"

    @classmethod
    def parse(cls, name: str) -> Setting:
        """Read a setting's name: parts in the order `w kv -g -hqq -embed -perchannel -topk`, each at most once.

        Raises `ConfigError`.
        """
        if name == "none":
            return cls(name=name)
        match = _SETTING.fullmatch(name)
        lacks = match is not None and (
            ((match["hqq"] or match["embed"]) and not match["weight_bits"])
            or (match["perchannel"] and not match["kv_bits"])
        )
        if match is None or lacks:
            mend = (
                "A setting is none, w8, w4, kv8, kv4, kv2 or such as w4kv4; -g32 or -g128 behind it sets its groups; "
                "-hqq behind it, of one with w, refines its weights' rounding; "
                "-embed behind it, of one with w, compresses embedding and head as well; "
                "-perchannel behind it, of one with kv, scales each channel of keys; "
                "topk10 or quest10, alone or last as in w4kv4-topk10, attends to 10 (1 to 99) percent of the keys"
            )
            raise ConfigError(f"unknown setting {name!r}", mend=mend)
        bits = {part: int(match[part]) for part in ("weight_bits", "kv_bits") if match[part]}
        sparsity = None
        if match["method"]:
            sparsity = Sparsity(method=SparseMethod(match["method"]), percent=int(match["percent"]))
        return cls(
            name=name,
            group_size=int(match["group_size"] or 64),
            is_refined=bool(match["hqq"]),
            codes_vocabulary=bool(match["embed"]),
            has_key_channels=bool(match["perchannel"]),
            sparsity=sparsity,
            **bits,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much of each memory tier may be used; None means what is free."""

    gpu_bytes: int | None = None
    """Memory of the GPU, everything on it included."""
    cpu_bytes: int | None = None
    """Host memory for weights, KV cache and hidden states."""
    disk_bytes: int | None = None
    """Room in `disk_dir`; 0 keeps the engine off the disk."""
    disk_dir: Path | None = None
    """Folder for offloaded data; None keeps the engine off the disk."""


def parse_disk(text: str) -> tuple[Path, int | None]:
    """Read `DIR` or `DIR:SIZE` of the `--disk` option. Raises `ConfigError`."""
    path, colon, size = text.rpartition(":")
    folder, num_bytes = (path, parse_size(size)) if colon and _SIZE.match(size) else (text, None)
    if not folder:
        raise ConfigError(f"{text!r} names no folder", where="--disk", mend="Write DIR or DIR:SIZE")
    return Path(folder), num_bytes
