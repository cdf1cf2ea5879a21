"""What the search decides, and what it decides from: plain numbers, JSON, no tensors.

`Policy` says where weights, KV cache and hidden states rest and how much work is in flight; `ModelShape` and
`Workload` say what is to be run. Knows neither what anything costs (`cost.py`) nor how a policy is found or obeyed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
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
        """The tier of each of `num_items` layers (or rows), every tier's items spread evenly over the depth.

        Item j of a tier that holds c belongs at depth (j + 1/2) / c; so transfers come at a steady rate.
        """
        places = [
            ((2 * item + 1) / (2 * count), order, tier)
            for order, (tier, count) in enumerate(self.counts(num_items).items())
            for item in range(count)
        ]
        return [tier for _, _, tier in sorted(places)]


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
    """New tokens one sweep over the layers computes at most, all rows together; bounds the hidden states."""
    group_sequences: int = 16
    """Generating sequences that decode together in one layer call."""
    num_groups: int = 1
    """Groups in flight at once; with `group_sequences`, bounds the KV cache."""
    host_attention: float = 0.0
    """Share of decode attention over KV in host memory that the CPU computes there, in [0, 1]."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} is out of range", mend=f"{name} is a whole number, at least 1")
        if not _is_share(self.host_attention):
            what = f"host_attention={self.host_attention!r} is not a share"
            raise ConfigError(what, mend="host_attention lies in [0, 1]")

    @property
    def block_sequences(self) -> int:
        """Generating sequences in flight at most."""
        return self.group_sequences * self.num_groups

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON values; `from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, *, where: str | None = None) -> Policy:
        """Read what `to_json` wrote: every field present, none unknown. Raises `ConfigError`, naming `where`."""
        names = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping) or set(data) != names:
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


_SIZES = ("row_tokens", "sweep_tokens", "group_sequences", "num_groups")


def _located(build: Callable[..., T], values: Mapping[str, Any], *, where: str | None) -> T:
    try:
        return build(**values)
    except ConfigError as error:
        raise ConfigError(error.what, where=where, mend=error.mend) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a model under one setting. Layers are equal; where they are not, each figure is the largest."""

    num_layers: int
    """Decoder layers."""
    hidden_size: int
    """Width of the hidden states."""
    intermediate_size: int
    """Width inside the feed-forward block; of all active experts together."""
    layer_bytes: int
    """One layer's slab as it rests (packed, if the setting compresses weights)."""
    layer_compute_bytes: int
    """One layer's slab as many tokens are multiplied by it; more than `layer_bytes` means that it is unpacked first."""
    resident_bytes: int
    """Embedding, final norm and head: always on the compute device."""
    layer_params: int
    """Matrix parameters of one layer that a token meets (active experts only)."""
    num_query_heads: int
    """Attention heads."""
    num_kv_heads: int
    """Heads of keys and values."""
    head_size: int
    """Width of a head."""
    kv_bytes_per_token: int
    """Keys and values of one token at one layer, as they rest."""
    hidden_bytes_per_token: int
    """Hidden state of one token."""
    vocab_size: int
    """Rows of the head."""
    dtype_bytes: int
    """Bytes of one number in the layer's arithmetic."""
    few_tokens: int
    """Up to so many tokens of a layer call a packed slab is multiplied as it rests; 0 where it is always unpacked."""
    decode_copies: int
    """Copies that decode attention makes of a group's keys and values; 0 where it reads them where they are."""
    num_experts: int = 1
    """Experts of a layer, where they lie apart."""
    experts_per_token: int = 1
    """How many of them a token meets."""
    expert_share: float = 0.0
    """Share of a layer's bytes that are theirs; 0 without experts."""

    @property
    def is_packed(self) -> bool:
        """Whether a slab is unpacked before it is multiplied."""
        return self.layer_bytes != self.layer_compute_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The sequences of a run, in numbers. Scoring sequences are done after one pass; the others generate."""

    num_sequences: int
    """All sequences, generating and scoring."""
    num_scoring_sequences: int
    """Of these, the ones that need one forward pass: they keep no KV."""
    num_prompt_tokens: int
    """Prompt tokens to compute, each shared prefix once."""
    num_scoring_tokens: int
    """Of these, the ones whose KV nobody decodes from: of scoring sequences and of prefixes only they share."""
    num_shared_tokens: int
    """Room for the KV of shared prefixes that outlives a sweep, in tokens: of those in use at once."""
    max_prompt_tokens: int
    """The longest stretch of prompt tokens computed in one piece: a shared prefix or what follows it."""
    max_own_tokens: int
    """Most tokens a generating sequence adds to the KV cache: its prompt after the shared prefix, and `max_tokens`."""
    mean_context_tokens: float
    """Mean prompt length of a sequence, its shared prefix included: what its last prompt token attends to."""
    num_generated_tokens: int
    """Tokens to generate at most: the sum of `max_tokens` over generating sequences."""
    max_generated_tokens: int
    """The largest `max_tokens`."""
    max_logits_rows: int
    """Most positions of one row of tokens whose logits are wanted."""

    def __post_init__(self) -> None:
        assert 0 <= self.num_scoring_sequences <= self.num_sequences, self
        assert 0 <= self.num_scoring_tokens <= self.num_prompt_tokens, self
        assert self.num_generated_tokens >= self.num_generating_sequences, self

    @property
    def num_generating_sequences(self) -> int:
        """Sequences that decode from a KV cache."""
        return self.num_sequences - self.num_scoring_sequences
