"""Fixed places for one row of a sweep, so that what was recorded on them can be replayed. Knows shapes; no tape.

Shapes: T tokens of a row, filled up; D model, N query heads, K KV heads, H size of a key, W size of a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from flexeval.engine.compute.anatomy import Embedded, LayerCall


class Places(NamedTuple):
    """Where a layer leaves what its attention takes, and finds what it gives."""

    q_TNH: Tensor
    k_TKH: Tensor
    v_TKW: Tensor
    out_TNW: Tensor


class Frame:
    """The places of a row with so many tokens."""

    def __init__(self, embedded: Embedded):
        """For rows like this one. Tensors that layers share have one place, and are brought up to date once."""
        self.hidden_1TD = torch.empty_like(embedded.hidden_1TD)
        """What goes into a layer, and what comes out of it."""
        self.calls: list[LayerCall] = []
        """What each layer is called with besides."""
        self._tensors: list[tuple[int, int, Tensor]] = []  # each once: a layer, its place among the call's leaves
        self._places: dict[tuple[object, ...], Places] = {}
        own_tensors: dict[int, Tensor] = {}
        for layer, call in enumerate(embedded.calls):
            leaves, spec = tree_flatten(call)
            for index, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    if id(leaf) not in own_tensors:
                        own_tensors[id(leaf)] = torch.empty_like(leaf)
                        self._tensors.append((layer, index, own_tensors[id(leaf)]))
                    leaves[index] = own_tensors[id(leaf)]
            self.calls.append(tree_unflatten(leaves, spec))

    def fill(self, hidden_1TD: Tensor, calls: Sequence[LayerCall]) -> None:
        """Bring what goes into the layers of a row to where they read it."""
        leaves = {layer: tree_flatten(calls[layer])[0] for layer in {layer for layer, _, _ in self._tensors}}
        for layer, index, tensor in self._tensors:
            tensor.copy_(leaves[layer][index])
        self.hidden_1TD.copy_(hidden_1TD)

    def places(self, q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor) -> Places:
        """The places for these shapes; the row's layers use them one after the other."""
        key = (q_TNH.shape, k_TKH.shape, v_TKW.shape)
        if key not in self._places:
            # What only fills the row up is read as well: it must hold numbers.
            self._places[key] = Places(
                q_TNH=q_TNH.new_zeros(q_TNH.shape),
                k_TKH=k_TKH.new_zeros(k_TKH.shape),
                v_TKW=v_TKW.new_zeros(v_TKW.shape),
                out_TNW=q_TNH.new_zeros(*q_TNH.shape[:2], v_TKW.shape[2]),
            )
        return self._places[key]
