"""Decode steps in few launches: what layers launch is recorded, and replayed.

A layer is some forty launches from Python; for few tokens they take the host longer than the device. So they are
recorded once, as CUDA graphs, for rows filled up to a size that recurs. A recording reaches from one layer's attention
to the next's, for whom a row attends to changes from step to step. Where the same row comes again and again, reading
and writing its KV in the same places, a second recording takes attention in as well: then a step is one launch.
Knows how layers are called; neither where weights rest (they may be recorded only where they stay) nor what attention
does.

Shapes: T tokens of a row, filled up; D model, N query heads, K KV heads, H size of a key, W size of a value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from flexeval.engine.compute.anatomy import Anatomy, Embedded, LayerCall
from flexeval.engine.compute.port import Attend, AttentionOptions
from flexeval.engine.compute.row import Row
from flexeval.engine.compute.tape import Tape, Tapes
from flexeval.planning.rows import RowPlan

SIZES = (8, 16, 32, 64, 128)
"""Tokens that rows are filled up to; longer rows keep the device busy by themselves."""
STEADY_STEPS = 4
"""A row that has come so often is recorded with its attention: that takes the host about as long as ten steps."""
MAX_STEADY = 8
"""Such recordings of one row and size that are kept."""

AttendAt = Callable[[int], Attend | None]
"""The attention of a row at a layer, on places that stay the same as long as `Row.steady` does; None where they do not.
"""


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
    next: Tape


class _Recording(NamedTuple):
    """A row's way through all layers."""

    first: Tape
    """Up to the first stop."""
    stops: dict[int, _Stop]
    """By layer."""


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
    recording: _Recording | None = None
    """With a stop at every layer; None until all layers have run."""
    num_seen: Counter[Hashable] = field(default_factory=Counter)
    """How often a row has come, by what makes rows the same."""
    steady: dict[Hashable, _Recording] = field(default_factory=dict)
    """Recordings with attention in them, the one used last at the end."""


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
        self._current: dict[int, _Recording | None] = {}
        self._is_possible = True

    @staticmethod
    def size(plan: RowPlan) -> int | None:
        """Tokens that a row is filled up to; None for one that is not for here: too long, or with prompts in it."""
        return None if plan.fresh else next((size for size in SIZES if size >= plan.num_tokens), None)

    def begin(self, row: Row, embedded: Embedded, attend_at: AttendAt | None) -> Tensor:
        """Before the first layer: bring what goes into a row's layers to where they read it, and start.

        Args:
            row: The row.
            embedded: What goes into its layers.
            attend_at: Its attention, which may be recorded; None in a sweep that moves what it reads.

        Returns:
            Where the row's hidden states are from now on.
        """
        key = (row.index, embedded.hidden_1TD.shape[1])
        if row.index not in self._tapes:
            self._tapes[row.index] = self._new_tapes()
        if (frame := self._frames.get(key)) is None:
            frame = self._frames[key] = _make_frame(embedded.hidden_1TD, embedded.calls)
        leaves = {layer: tree_flatten(embedded.calls[layer])[0] for layer in {layer for layer, _, _ in frame.tensors}}
        for layer, index, tensor in frame.tensors:
            tensor.copy_(leaves[layer][index])
        frame.hidden_1TD.copy_(embedded.hidden_1TD)
        self._current[row.index] = recording = self._recording(frame, row, attend_at)
        if recording is not None:
            recording.first.replay()
        return frame.hidden_1TD

    def attends(self, row: Row, layer: int) -> bool:
        """Whether a row that has begun will ask for its attention at a layer: it is not in a recording."""
        recording = self._current[row.index]
        return recording is None or layer in recording.stops

    def run(self, layer: int, row: Row, hidden_1TD: Tensor, attend: Attend, *, bind: Callable[[], bool]) -> Tensor:
        """One layer on one row, after the layer before it; what comes out is overwritten by the next one.

        Args:
            layer: Which; one at which the row attends.
            row: The row.
            hidden_1TD: What goes in.
            attend: Attention of the row's tokens, without those that only fill it up.
            bind: Lets the layer compute with its weights, and says whether they will lie where they lie now for ever.
        """
        frame, recording = self._frames[row.index, hidden_1TD.shape[1]], self._current[row.index]
        if recording is None:
            return self._run(frame, layer, row, hidden_1TD, attend, stays=bind())
        stop = recording.stops[layer]
        q_TNH, k_TKH, v_TKW, out_TNW = (place[: row.plan.num_tokens] for place in stop.places)
        out_TNW.copy_(attend(q_TNH, k_TKH, v_TKW, stop.options))
        stop.next.replay()
        return frame.hidden_1TD

    def forget_logs(self) -> None:
        """The logs that rows attended to are no more."""
        for frame in self._frames.values():
            frame.steady.clear()
            frame.num_seen.clear()
        self._current.clear()

    def _run(self, frame: _Frame, layer: int, row: Row, hidden_1TD: Tensor, attend: Attend, *, stays: bool) -> Tensor:
        """The layer as it is."""

        def attend_to_tokens(q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions) -> Tensor:
            return _attend_within(frame, row.plan.num_tokens, attend, q_TNH, k_TKH, v_TKW, options)

        if not stays or layer in frame.has_run or not self._is_possible:
            return self._anatomy.run_layer(layer, hidden_1TD, frame.calls[layer], attend_to_tokens)
        with self._tapes[row.index].waits() as waits:
            hidden_1TD = self._anatomy.run_layer(layer, hidden_1TD, frame.calls[layer], attend_to_tokens)
        self._is_possible = not waits
        frame.has_run.add(layer)
        return hidden_1TD

    def _recording(self, frame: _Frame, row: Row, attend_at: AttendAt | None) -> _Recording | None:
        """The recording to run a row from, made where it is time to."""
        if frame.recording is None:
            if self._is_possible and len(frame.has_run) == self._anatomy.num_layers:
                frame.recording = self._record(frame, row, lambda layer: None)
            return frame.recording
        if attend_at is None or (key := row.steady) is None:
            return frame.recording
        frame.num_seen[key] += 1
        if key in frame.steady:
            frame.steady[key] = frame.steady.pop(key)
        elif frame.num_seen[key] > STEADY_STEPS:
            stops = frame.recording.stops
            has_window = {layer for layer in stops if row.ancestors and stops[layer].options.window is not None}
            steady = self._record(frame, row, lambda layer: None if layer in has_window else attend_at(layer))
            assert steady is not None, "layers have been recorded before"
            frame.steady[key] = steady
            for oldest in list(frame.steady)[:-MAX_STEADY]:
                del frame.steady[oldest], frame.num_seen[oldest]
        return frame.steady.get(key, frame.recording)

    def _record(self, frame: _Frame, row: Row, attend_at: AttendAt) -> _Recording | None:
        """Record all layers; None where the weights of one do not stay where they are."""
        if not all(self._bind(layer) for layer in range(self._anatomy.num_layers)):
            return None
        tapes = self._tapes[row.index]
        first = tape = tapes.new()
        stops: dict[int, _Stop] = {}
        with tapes.recording():
            tape.begin()
            for layer in range(self._anatomy.num_layers):
                attend = attend_at(layer)

                def stop(
                    q_TNH: Tensor,
                    k_TKH: Tensor,
                    v_TKW: Tensor,
                    options: AttentionOptions,
                    layer: int = layer,
                    attend: Attend | None = attend,
                ) -> Tensor:
                    nonlocal tape
                    if attend is not None:
                        return _attend_within(frame, row.plan.num_tokens, attend, q_TNH, k_TKH, v_TKW, options)
                    places = _places(frame, q_TNH, k_TKH, v_TKW)
                    for place, tensor in zip(places, (q_TNH, k_TKH, v_TKW), strict=False):
                        place.copy_(tensor)
                    tape.end()
                    tape = tapes.new()
                    tape.begin()
                    stops[layer] = _Stop(places, options, tape)
                    return places.out_TNW

                frame.hidden_1TD.copy_(self._anatomy.run_layer(layer, frame.hidden_1TD, frame.calls[layer], stop))
            tape.end()
        return _Recording(first, stops)


def _attend_within(
    frame: _Frame,
    num_tokens: int,
    attend: Attend,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKW: Tensor,
    options: AttentionOptions,
) -> Tensor:
    """Attention of a row's own tokens, without those that only fill it up."""
    out_TNW = _places(frame, q_TNH, k_TKH, v_TKW).out_TNW
    out_TNW[:num_tokens] = attend(q_TNH[:num_tokens], k_TKH[:num_tokens], v_TKW[:num_tokens], options)
    return out_TNW


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
