"""Decode steps in one launch a layer beside attention: what layers launch is recorded, and replayed.

A layer is some forty launches from Python; for few tokens they take the host longer than the device. So they are
recorded once, as CUDA graphs, for rows filled up to a size that recurs. Attention lies between two recordings and stays
as it is: whom a row attends to changes from step to step. A recording reaches from one layer's attention to the next's.
Knows how layers are called; neither where weights rest (they may be recorded only where they stay) nor what attention
does.

Shapes: T tokens of a row, filled up; D model, N query heads, K KV heads, H size of a key, W size of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from flexeval.engine.compute.anatomy import Anatomy, LayerCall
from flexeval.engine.compute.port import Attend, AttentionOptions
from flexeval.engine.compute.tape import Tape, Tapes
from flexeval.planning.rows import RowPlan

SIZES = (8, 16, 32, 64, 128)
"""Tokens that rows are filled up to; longer rows keep the device busy by themselves."""


class _Places(NamedTuple):
    """Where a recorded layer leaves what its attention takes, and finds what it gives."""

    q_TNH: Tensor
    k_TKH: Tensor
    v_TKW: Tensor
    out_TNW: Tensor


class _Stop(NamedTuple):
    """Between two tapes: a layer's attention."""

    places: _Places
    options: AttentionOptions


@dataclass(slots=True, kw_only=True)
class _Frame:
    """Fixed places of one row of a sweep, filled up to one size, and what was recorded on them."""

    hidden_1TD: Tensor
    """What goes into a layer, and what comes out of it."""
    calls: list[LayerCall]
    """What each layer is called with besides."""
    tensors: list[tuple[int, int, Tensor]]
    """Of the tensors in them, each once: a layer, its place among the leaves of that layer's call, and the tensor."""
    places: dict[tuple[object, ...], _Places] = field(default_factory=dict)
    """By shape."""
    has_run: set[int] = field(default_factory=set)
    """Layers that ran once as they are to be recorded: their kernels are compiled."""
    tapes: list[Tape] = field(default_factory=list)
    """Up to the first attention, from each to the next, and from the last on; empty until all layers have run."""
    stops: list[_Stop] = field(default_factory=list)
    """The attention of each layer."""


class Replay:
    """Runs the layers of decode rows, from recordings where there are any."""

    def __init__(self, anatomy: Anatomy, new_tapes: Callable[[], Tapes], bind: Callable[[int], bool]):
        """Layers of `anatomy`.

        Args:
            anatomy: The model.
            new_tapes: Tapes for one row of a sweep: recordings of several rows take turns, and may not share memory.
            bind: Lets a layer compute with its weights where they lie for good; False where there is no such place.
        """
        self._anatomy = anatomy
        self._new_tapes = new_tapes
        self._bind = bind
        self._tapes: dict[int, Tapes] = {}
        self._frames: dict[tuple[int, int], _Frame] = {}
        self._is_possible = True

    @staticmethod
    def size(plan: RowPlan) -> int | None:
        """Tokens that a row is filled up to; None for one that is not for here: too long, or with prompts in it."""
        return None if plan.fresh else next((size for size in SIZES if size >= plan.num_tokens), None)

    def begin(self, row: int, hidden_1TD: Tensor, calls: Sequence[LayerCall]) -> None:
        """Before the first layer: bring what goes into a row's layers to where they read it."""
        key = (row, hidden_1TD.shape[1])
        if row not in self._tapes:
            self._tapes[row] = self._new_tapes()
        if (frame := self._frames.get(key)) is None:
            frame = self._frames[key] = _make_frame(hidden_1TD, calls)
        leaves = {layer: tree_flatten(calls[layer])[0] for layer in {layer for layer, _, _ in frame.tensors}}
        for layer, index, tensor in frame.tensors:
            tensor.copy_(leaves[layer][index])
        frame.hidden_1TD.copy_(hidden_1TD)
        layers = range(self._anatomy.num_layers)
        has_run = len(frame.has_run) == len(layers)
        if not frame.tapes and has_run and self._is_possible and all(self._bind(layer) for layer in layers):
            self._record(frame, self._tapes[row])

    def run(
        self, layer: int, row: int, plan: RowPlan, hidden_1TD: Tensor, attend: Attend, *, bind: Callable[[], bool]
    ) -> Tensor:
        """One layer on one row, after the layer before it; what comes out is overwritten by the next one.

        Args:
            layer: Which.
            row: Index of the row in its sweep.
            plan: Its plan.
            hidden_1TD: What goes in.
            attend: Attention of the row's tokens, without those that only fill it up.
            bind: Lets the layer compute with its weights, and says whether they will lie where they lie now for ever.
        """
        frame, num_tokens = self._frames[row, hidden_1TD.shape[1]], plan.num_tokens
        if not frame.tapes:
            return self._run(layer, row, hidden_1TD, attend, num_tokens, stays=bind())
        if layer == 0:
            frame.tapes[0].replay()
        else:
            assert hidden_1TD is frame.hidden_1TD, (layer, row, "has not come from the layer before")
        places, options = frame.stops[layer]
        q_TNH, k_TKH, v_TKW, out_TNW = (place[:num_tokens] for place in places)
        out_TNW.copy_(attend(q_TNH, k_TKH, v_TKW, options))
        frame.tapes[layer + 1].replay()
        return frame.hidden_1TD

    def _run(self, layer: int, row: int, hidden_1TD: Tensor, attend: Attend, num_tokens: int, *, stays: bool) -> Tensor:
        """The layer as it is."""
        frame = self._frames[row, hidden_1TD.shape[1]]

        def attend_to_tokens(q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions) -> Tensor:
            out_TNW = _places(frame, q_TNH, k_TKH, v_TKW).out_TNW
            out_TNW[:num_tokens] = attend(q_TNH[:num_tokens], k_TKH[:num_tokens], v_TKW[:num_tokens], options)
            return out_TNW

        if not stays or layer in frame.has_run or not self._is_possible:
            return self._anatomy.run_layer(layer, hidden_1TD, frame.calls[layer], attend_to_tokens)
        with self._tapes[row].waits() as waits:
            hidden_1TD = self._anatomy.run_layer(layer, hidden_1TD, frame.calls[layer], attend_to_tokens)
        self._is_possible = not waits
        frame.has_run.add(layer)
        return hidden_1TD

    def _record(self, frame: _Frame, tapes: Tapes) -> None:
        layers = range(self._anatomy.num_layers)
        recorded = [tapes.new() for _ in range(len(layers) + 1)]
        stops: list[_Stop] = []

        def stop(q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions) -> Tensor:
            places, layer = _places(frame, q_TNH, k_TKH, v_TKW), len(stops)
            for place, tensor in zip(places, (q_TNH, k_TKH, v_TKW), strict=False):
                place.copy_(tensor)
            recorded[layer].end()
            recorded[layer + 1].begin()
            stops.append(_Stop(places, options))
            return places.out_TNW

        with tapes.recording():
            recorded[0].begin()
            for layer in layers:
                frame.hidden_1TD.copy_(self._anatomy.run_layer(layer, frame.hidden_1TD, frame.calls[layer], stop))
            recorded[-1].end()
        frame.tapes, frame.stops = recorded, stops


def _make_frame(hidden_1TD: Tensor, calls: Sequence[LayerCall]) -> _Frame:
    """Tensors that layers share have one place, and are brought up to date once."""
    own_tensors: dict[int, Tensor] = {}
    tensors: list[tuple[int, int, Tensor]] = []
    own_calls: list[LayerCall] = []
    for layer, call in enumerate(calls):
        leaves, spec = tree_flatten(call)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                if id(leaf) not in own_tensors:
                    own_tensors[id(leaf)] = torch.empty_like(leaf)
                    tensors.append((layer, index, own_tensors[id(leaf)]))
                leaves[index] = own_tensors[id(leaf)]
        own_calls.append(tree_unflatten(leaves, spec))
    return _Frame(hidden_1TD=torch.empty_like(hidden_1TD), calls=own_calls, tensors=tensors)


def _places(frame: _Frame, q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor) -> _Places:
    """The row's places for these shapes; its layers use them one after the other."""
    key = (q_TNH.shape, k_TKH.shape, v_TKW.shape)
    if key not in frame.places:
        # What only fills the row up is read as well: it must hold numbers.
        frame.places[key] = _Places(
            q_TNH=q_TNH.new_zeros(q_TNH.shape),
            k_TKH=k_TKH.new_zeros(k_TKH.shape),
            v_TKW=v_TKW.new_zeros(v_TKW.shape),
            out_TNW=q_TNH.new_zeros(*q_TNH.shape[:2], v_TKW.shape[2]),
        )
    return frame.places[key]
