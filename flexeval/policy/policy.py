"""What the search decides: where weights, KV cache and hidden states rest, and how much work is in flight.

Plain numbers and JSON, no tensors. Knows neither what anything costs (`cost.py`) nor how a policy is found or obeyed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from flexeval.errors import ConfigError
from flexeval.files import read_json

T = TypeVar("T")


class Tier(StrEnum):
    """A memory that data can rest in, fastest first."""

    GPU = "gpu"
    CPU = "cpu"
    DISK = "disk"


KINDS = ("weights", "kv", "hidden")
"""What a policy places."""


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Fractions of one kind of data on each tier; they add up to 1. Raises `ConfigError`."""

    gpu: float = 0.0
    """Share in GPU memory, in [0, 1]."""
    cpu: float = 0.0
    """Share in host memory, in [0, 1]."""
    disk: float = 0.0
    """Share on disk, in [0, 1]."""

    def __post_init__(self) -> None:
        for tier in Tier:
            share = getattr(self, tier)
            if not _is_share(share):
                raise ConfigError(f"{tier}={share!r} is not a share", mend="Shares of a tier lie in [0, 1]")
        if not abs(self.gpu + self.cpu + self.disk - 1) < 1e-6:
            raise ConfigError(
                f"gpu={self.gpu:g} + cpu={self.cpu:g} + disk={self.disk:g} is {self.gpu + self.cpu + self.disk:g}",
                mend="The shares of the three tiers add up to 1",
            )

    def counts(self, num_items: int) -> dict[Tier, int]:
        """How many of `num_items` equal items each tier holds: largest remainders round up, faster tiers win ties."""
        exact = {tier: getattr(self, tier) * num_items for tier in Tier}
        counts = {tier: int(exact[tier] + 1e-6) for tier in Tier}
        by_remainder = sorted(Tier, key=lambda tier: round(counts[tier] - exact[tier], 6))
        for tier in by_remainder[: num_items - sum(counts.values())]:
            counts[tier] += 1
        assert sum(counts.values()) == num_items, (self, num_items, counts)
        return counts

    def spread(self, num_items: int) -> list[Tier]:
        """The tier of each of `num_items` layers, every tier's items spread evenly over the depth.

        Item j of a tier that holds c belongs at depth (j + 1/2) / c; so transfers come at a steady rate.
        """
        places = [
            ((2 * item + 1) / (2 * count), order, tier)
            for order, (tier, count) in enumerate(self.counts(num_items).items())
            for item in range(count)
        ]
        return [tier for _, _, tier in sorted(places)]

    def of_part(self, part: float) -> Split:
        """The shares of a part of the whole, in (0, 1], where no tier takes more than its share of the whole has room.

        The faster tiers are filled first: what is less than a full load need not go where the rest of one would.
        """
        left = part
        shares: dict[str, float] = {}
        for tier in Tier:
            taken = min(left, getattr(self, tier))
            shares[tier] = taken / part
            left -= taken
        return Split(**shares)

    def spread_sizes(self, sizes: Sequence[int]) -> list[Tier]:
        """The tier of each of some rows of these sizes: whichever lacks most of its share of all so far.

        So none holds more than its share of the total and a part of one row: what all tiers lack adds up to the row's
        size before it is placed, and the tier that lacks most lacks something.
        """
        lacking = dict.fromkeys(Tier, 0.0)
        places = []
        for size in sizes:
            for tier in Tier:
                lacking[tier] += getattr(self, tier) * size
            places.append(max(Tier, key=lambda tier: (getattr(self, tier) > 0, round(lacking[tier], 6))))
            lacking[places[-1]] -= size
        return places


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Where data rests and how much work is in flight. Raises `ConfigError`."""

    weights: Split = Split(cpu=1.0)
    """Over layers: a layer's slab rests on one tier."""
    kv: Split = Split(cpu=1.0)
    """Over layers: the KV of all groups at one layer rests on one tier."""
    hidden: Split = Split(cpu=1.0)
    """Over the rows of a sweep: a row's hidden states rest on one tier between two layers."""
    row_tokens: int = 2048
    """Packed new tokens one layer call computes at most; a longer prompt takes several calls."""
    sweep_tokens: int = 16384
    """Prompt tokens one sweep over the layers computes at most, all rows together, beside a token of each sequence that
    goes on; bounds the hidden states."""
    group_sequences: int = 16
    """Generating sequences that decode together in one layer call."""
    num_groups: int = 1
    """Groups in flight at once; with `group_sequences`, bounds the KV cache."""
    group_tokens: int = 0
    """Tokens that a group's log of KV has room for, and at least its largest sequence; fewer sequences sit in it where
    they need more. 0 is as many as any `group_sequences` of them can come to need."""
    host_attention: float = 0.0
    """Share of decode attention over KV in host memory that the CPU computes there, in [0, 1]."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            least = 0 if name in _MAY_BE_LEFT_OUT else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"{name}={value!r} is out of range", mend=f"{name} is a whole number, at least {least}"
                )
        if not _is_share(self.host_attention):
            what = f"host_attention={self.host_attention!r} is not a share"
            raise ConfigError(what, mend="host_attention lies in [0, 1]")

    @property
    def block_sequences(self) -> int:
        """Generating sequences in flight at most."""
        return self.group_sequences * self.num_groups

    @property
    def slabs_ahead(self) -> int:
        """Layers whose weights are on their way beside the one in use.

        Where the CPU attends, a layer's slab stays in use until the CPU has attended for it: with one slab ahead, the
        link would wait for that as well.
        """
        return 2 if self.host_attention else 1

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON values; `from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, *, where: str | None = None) -> Policy:
        """Read what `to_json` wrote: no field unknown, and every one present but `group_tokens`, which is younger.

        Raises `ConfigError`, naming `where`.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping) or not names - _MAY_BE_LEFT_OUT <= set(data) <= names:
            found = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise ConfigError(f"not a policy: has {found}", where=where, mend=f"A policy has {sorted(names)}")
        values = dict(data)
        for kind in KINDS:
            split = values[kind]
            if not isinstance(split, Mapping) or not set(split) <= set(Tier):
                raise ConfigError(f"{kind}={split!r} is not a split", where=where, mend="Write {gpu: 0.2, cpu: 0.8}")
            values[kind] = _located(Split, split, where=f"{where or 'policy'}: {kind}")
        return _located(cls, values, where=where)

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Read a policy file (JSON). Raises `ConfigError`."""
        try:
            data = read_json(path)
        except (OSError, ValueError) as error:
            mend = "Name a JSON file with a policy, such as the one in a run's results"
            raise ConfigError(f"cannot read a policy: {error}", where=str(path), mend=mend) from error
        return cls.from_json(data, where=str(path))

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read `gpu-weights=0.2,cpu-kv=1,num-groups=3,host-attention=0.5`. Raises `ConfigError`.

        What a kind leaves over rests on the cpu, unless the cpu's share is named too; sizes not named have the
        defaults of this class.
        """
        shares: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
        sizes: dict[str, float] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = item.partition("=")
            tier, _, kind = name.strip().partition("-")
            size = name.strip().replace("-", "_")
            try:
                if tier in set(Tier) and kind in KINDS and tier not in shares[kind]:
                    shares[kind][tier] = float(value)
                elif size in _SIZES and size not in sizes:
                    sizes[size] = int(value)
                elif size == "host_attention" and size not in sizes:
                    sizes[size] = float(value)
                else:
                    raise ValueError(f"unknown or repeated name {name.strip()!r}")
            except ValueError as error:
                names = ", ".join((*_SIZES, "host_attention"))
                mend = f"Write {{gpu,cpu,disk}}-{{{','.join(KINDS)}}}=SHARE or one of {names}=NUMBER"
                raise ConfigError(f"cannot read {item!r}: {error}", where="policy", mend=mend) from error
        for share in shares.values():
            share.setdefault("cpu", max(0.0, 1 - sum(share.values())))
        return cls.from_json(cls().to_json() | sizes | shares, where="policy")


APART_ROW_TOKENS = 512
"""Prompt tokens of a row where requests are computed apart: the same for every batch, as roundings depend on it."""


def apart(policy: Policy) -> Policy:
    """The policy for requests that are computed apart from each other: data rest where they would, rows hold one each.

    The CPU attends for no row: which ones it takes depends on the others.
    """
    return replace(
        policy,
        row_tokens=APART_ROW_TOKENS,
        sweep_tokens=max(policy.sweep_tokens, APART_ROW_TOKENS),
        group_sequences=1,
        num_groups=policy.block_sequences,
        group_tokens=0,
        host_attention=0.0,
    )


def check_sparse(policy: Policy) -> None:
    """Refuse what does not go with attention to some of the keys. Raises `ConfigError`."""
    if policy.host_attention:
        what = f"host_attention={policy.host_attention:g} asks the CPU to attend, which attends to all keys only"
        raise ConfigError(what, where="policy", mend="Set host_attention to 0, or use a setting without topk or quest")


_SIZES = ("row_tokens", "sweep_tokens", "group_sequences", "num_groups", "group_tokens")
_MAY_BE_LEFT_OUT = {"group_tokens"}


def _located(build: Callable[..., T], values: Mapping[str, Any], *, where: str | None) -> T:
    try:
        return build(**values)
    except ConfigError as error:
        raise ConfigError(error.what, where=where, mend=error.mend) from error
