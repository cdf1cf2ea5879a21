"""What a layer's tensors are called and look like: how the model tells the stores what it needs. Knows no bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor of a layer, before anything is stored."""

    name: str
    """Its name within the layer."""
    shape: tuple[int, ...]
    """Its shape in the layer."""
    dtype: torch.dtype
    """The type the layer computes with."""
    is_input_first: bool = False
    """Whether a matrix is stored [..., input, output] (GPT-2's Conv1D) rather than [..., output, input]."""
    is_router: bool = field(default=False, repr=False)  # a slab's fingerprint sees it in what is not coded
    """Whether it chooses experts: a few numbers that decide too much to be coded."""
    num_experts: int = 0
    """How many experts its first dimension counts, whose parts are used one by one; 0 where it is one tensor."""
