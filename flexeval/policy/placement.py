"""Where a policy's items rest, in numbers or as variables of a linear program. Knows neither sizes nor seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from flexeval.policy.policy import Tier

Linear: TypeAlias = Any
"""A number, or an affine expression in LP variables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How many items of each kind rest on each tier: layers of weights and KV, rows of hidden states."""

    counts: Mapping[str, Mapping[Tier, Linear]]
    """Kind, tier: number of items."""
    streams: Mapping[str, Linear]
    """Kind: 1 if any item rests off the compute device, else 0."""
    on_disk: Mapping[str, Linear]
    """Kind: 1 if any item rests on disk, else 0."""
    is_step_in_parts: Linear
    """1 if weights or KV rest off the compute device: a decode step cannot be one recording then."""
    is_slab_ahead: Linear
    """1 if one slab more than usual is on its way: where weights stream and the CPU attends."""
    host_attention: Linear = 0
    """Layers' worth of decode attention that the CPU computes beside a GPU: at most the layers of KV on the cpu."""
