"""Decode steps in two calls a layer: what a layer launches before and after its attention, recorded and replayed.

A layer is some forty launches from Python; for few tokens they take the host longer than the device. So they are
recorded once, as CUDA graphs, for rows filled up to a size that recurs. Attention lies between two recordings and stays
as it is: whom a row attends to changes from step to step. Knows how layers are called; neither where weights rest (a
layer may be recorded only while its weights stay where they are) nor what attention does.

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


class _Recorded(NamedTuple):
    """One layer on the two sides of its attention."""

    before: Tape
    places: _Places
    options: AttentionOptions
    after: Tape


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
    """Layers that ran once unrecorded: their kernels are compiled, and they did not wait for the device."""
    recorded: dict[int, _Recorded] = field(default_factory=dict)
    """By layer."""


class Replay:
    """Runs the layers of decode rows, from recordings where there are any."""

    def __init__(self, anatomy: Anatomy, tapes: Tapes):
        self._anatomy = anatomy
        self._tapes = tapes
        self._frames: dict[tuple[int, int], _Frame] = {}
        self._is_possible = True

    @staticmethod
    def size(plan: RowPlan) -> int:
        """Tokens that a row is filled up to; only rows that decode and nothing else are."""
        num_tokens = plan.num_tokens
        return num_tokens if plan.fresh else next((size for size in SIZES if size >= num_tokens), num_tokens)

    def takes(self, plan: RowPlan) -> bool:
        """Whether a row is run here."""
        return not plan.fresh and plan.num_tokens <= SIZES[-1]

    def begin(self, row: int, hidden_1TD: Tensor, calls: Sequence[LayerCall]) -> None:
        """Before the first layer: bring what a row's layers are called with to where they read it."""
        key = (row, hidden_1TD.shape[1])
        frame = self._frames.get(key)
        if frame is None:
            self._frames[key] = _make_frame(hidden_1TD, calls)
            return
        leaves = {layer: tree_flatten(calls[layer])[0] for layer in {layer for layer, _, _ in frame.tensors}}
        for layer, index, tensor in frame.tensors:
            tensor.copy_(leaves[layer][index])

    def run(
        self, layer: int, row: int, plan: RowPlan, hidden_1TD: Tensor, attend: Attend, *, bind: Callable[[], bool]
    ) -> Tensor:
        """One layer on one row; what comes out is overwritten by the row's next layer.

        Args:
            layer: Which.
            row: Index of the row in its sweep.
            plan: Its plan.
            hidden_1TD: What goes in.
            attend: Attention of the row's tokens, without those that only fill it up.
            bind: Lets the layer compute with its weights, and says whether they will lie where they lie now for ever.
        """
        frame, num_tokens = self._frames[row, hidden_1TD.shape[1]], plan.num_tokens
        recorded = frame.recorded.get(layer)
        if recorded is None:
            can_record = bind() and self._is_possible
            if not can_record or layer not in frame.has_run:
                return self._run(layer, frame, hidden_1TD, attend, num_tokens, can_record)
            recorded = frame.recorded[layer] = self._record(layer, frame)
        if hidden_1TD is not frame.hidden_1TD:
            frame.hidden_1TD.copy_(hidden_1TD)
        recorded.before.replay()
        q_TNH, k_TKH, v_TKW, out_TNW = (place[:num_tokens] for place in recorded.places)
        out_TNW.copy_(attend(q_TNH, k_TKH, v_TKW, recorded.options))
        recorded.after.replay()
        return frame.hidden_1TD

    def _run(
        self, layer: int, frame: _Frame, hidden_1TD: Tensor, attend: Attend, num_tokens: int, can_record: bool
    ) -> Tensor:
        """The layer as it is. Before it is recorded it runs so once: its kernels are compiled then."""

        def attend_to_tokens(q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions) -> Tensor:
            out_TNW = _places(frame, q_TNH, k_TKH, v_TKW).out_TNW
            out_TNW[:num_tokens] = attend(q_TNH[:num_tokens], k_TKH[:num_tokens], v_TKW[:num_tokens], options)
            return out_TNW

        if not can_record:
            return self._anatomy.run_layer(layer, hidden_1TD, frame.calls[layer], attend_to_tokens)
        with self._tapes.waits() as waits:
            hidden_1TD = self._anatomy.run_layer(layer, hidden_1TD, frame.calls[layer], attend_to_tokens)
        self._is_possible &= not waits
        frame.has_run.add(layer)
        return hidden_1TD

    def _record(self, layer: int, frame: _Frame) -> _Recorded:
        before, after = self._tapes.new(), self._tapes.new()
        found: list[tuple[_Places, AttentionOptions]] = []

        def part(q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions) -> Tensor:
            places = _places(frame, q_TNH, k_TKH, v_TKW)
            for place, tensor in zip(places, (q_TNH, k_TKH, v_TKW), strict=False):
                place.copy_(tensor)
            before.end()
            after.begin()
            found.append((places, options))
            return places.out_TNW

        with self._tapes.recording():
            before.begin()
            frame.hidden_1TD.copy_(self._anatomy.run_layer(layer, frame.hidden_1TD, frame.calls[layer], part))
            after.end()
        ((places, options),) = found
        return _Recorded(before, places, options, after)


def _make_frame(hidden_1TD: Tensor, calls: Sequence[LayerCall]) -> _Frame:
    """Tensors that layers share are copied, and brought up to date, once."""
    copies: dict[int, Tensor] = {}
    tensors: list[tuple[int, int, Tensor]] = []
    own_calls: list[LayerCall] = []
    for layer, call in enumerate(calls):
        leaves, spec = tree_flatten(call)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                if id(leaf) not in copies:
                    copies[id(leaf)] = leaf.clone()
                    tensors.append((layer, index, copies[id(leaf)]))
                leaves[index] = copies[id(leaf)]
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
