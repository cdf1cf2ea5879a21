"""Decode steps in few launches: what layers launch is recorded, and replayed.

A layer is some forty launches from Python; for few tokens they take the host longer than the device. So they are
recorded once, as CUDA graphs, for rows filled up to a size that recurs: what comes before a layer's attention and what
comes after it, for whom a row attends to changes from step to step. Where the same row comes again and again, reading
and writing its KV in the same places, and all weights stay where they are, another recording takes in attention and all
layers: then a step is one launch. Knows how layers are called; neither where weights rest nor what attention does.

Shapes: T tokens of a row, filled up; N query heads, K KV heads, H size of a key, W size of a value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from math import inf
from typing import NamedTuple

from torch import Tensor

from flexeval.engine.compute.anatomy import Anatomy, Embedded
from flexeval.engine.compute.entrance import Entrance
from flexeval.engine.compute.frame import Places
from flexeval.engine.compute.port import Attend, AttentionInputs, AttentionOptions
from flexeval.engine.compute.row import Row
from flexeval.engine.compute.steady import AttendAt, Steady, leave, record_steady, within
from flexeval.engine.compute.tape import Tape, Tapes
from flexeval.planning.rows import RowPlan

SIZES = (8, 16, 32, 64, 128, 256, 512)
"""Tokens that rows are filled up to; longer rows keep the device busy by themselves."""
STEADY_STEPS = 4
"""A row that has come so often is recorded with its attention: that takes the host about as long as ten steps."""
MAX_STEADY = 8
"""Such recordings of one row and size that are kept."""


class LayerWeights(NamedTuple):
    """A layer's weights as one row needs them."""

    place: Hashable
    """Where they lie, now and whenever this is the same; None where nothing can be said."""
    bind: Callable[[], bool]
    """Lets the layer compute with them; whether they are there, not unpacked elsewhere for an earlier row."""


class _Halves(NamedTuple):
    """A layer before and after its attention."""

    before: Tape
    after: Tape
    places: Places
    options: AttentionOptions


class _Records:
    """What was recorded for one row of a sweep and one size."""

    def __init__(self, entrance: Entrance, tapes: Tapes):
        self.entrance = entrance
        self.frame = entrance.frame
        self.tapes = tapes
        self.has_run: set[int] = set()
        """Layers that ran once as they are to be recorded: their kernels are compiled."""
        self.halves: dict[tuple[int, Hashable], _Halves] = {}
        """By layer, and where its weights lie."""
        self.begun: _Halves | None = None
        """Whose first half has been launched."""
        self.num_seen: Counter[Hashable] = Counter()
        """How often a row has come, by what makes rows the same."""
        self.steady: dict[Hashable, Steady] = {}
        """By the same; the one used last at the end."""


class Replay:
    """Runs the layers of decode rows, from recordings where there are any."""

    def __init__(
        self,
        anatomy: Anatomy,
        new_tapes: Callable[[], Tapes],
        bind: Callable[[int], bool],
        *,
        most_tokens: float = inf,
    ):
        """Layers of `anatomy`.

        Args:
            anatomy: The model.
            new_tapes: Tapes for one row of a sweep: recordings of several rows take turns, and may not share memory.
            bind: Lets a layer compute with its weights where they lie for good; False where there is no such place.
            most_tokens: Rows of more are computed with weights that are unpacked over others: they are not for here.
        """
        self._anatomy = anatomy
        self._new_tapes = new_tapes
        self._bind = bind
        self._most_tokens = most_tokens
        self._tapes: dict[int, Tapes] = {}
        self._records: dict[tuple[int, int], _Records] = {}
        self._steady: dict[int, Steady | None] = {}  # by row, in this sweep
        self._is_possible = self._stays = True

    def size(self, plan: RowPlan) -> int | None:
        """Tokens that a row is filled up to; None for one that is not for here: too long, or with prompts in it."""
        if plan.fresh or plan.num_tokens > self._most_tokens:
            return None
        return next((size for size in SIZES if size >= plan.num_tokens), None)

    def begin(self, row: Row, attend_at: AttendAt | None) -> Embedded:
        """Before the first layer: bring what goes into a row's layers to where they read it, and start.

        Args:
            row: The row.
            attend_at: Its attention, which may be recorded; None where that is done elsewhere, or what it reads moves.

        Returns:
            Where the row's hidden states are from now on, and what its layers are called with.
        """
        key = (row.index, row.ids_1T.shape[1])
        if row.index not in self._tapes:
            self._tapes[row.index] = self._new_tapes()
        if key not in self._records:
            tapes = self._tapes[row.index]
            self._records[key] = _Records(Entrance(self._anatomy, tapes, row.ids_1T, row.positions_1T), tapes)
        else:
            self._records[key].entrance.enter(row.ids_1T, row.positions_1T)
        records = self._records[key]
        self._steady[row.index] = steady = None if attend_at is None else self._find_steady(records, row, attend_at)
        if steady is not None:
            steady.first.replay()
        return Embedded(records.frame.hidden_1TD, records.frame.calls)

    def attends(self, row: Row, layer: int) -> bool:
        """Whether a row that has begun will ask for its attention at a layer: it is not in a recording."""
        steady = self._steady[row.index]
        return steady is None or layer in steady.stops

    def run(self, layer: int, row: Row, attend: Attend, weights: LayerWeights) -> Tensor:
        """One layer on one row, after the layer before it; what comes out is overwritten by the next one.

        Args:
            layer: Which; one at which the row attends.
            row: The row.
            attend: Attention of the row's tokens, without those that only fill it up.
            weights: The layer's.
        """
        records, steady = self._of(row), self._steady[row.index]
        if steady is not None:
            stop = steady.stops[layer]
            out_TNW = attend(*_inputs(stop.places, stop.options, row))
            stop.places.out_TNW[: row.plan.num_tokens].copy_(out_TNW)
            stop.next.replay()
            return records.frame.hidden_1TD
        halves = self._find_halves(records, layer, weights)
        if halves is None:
            return self._run(records, layer, row, attend, weights)
        halves.before.replay()
        records.begun = halves
        return self.run_from_attention(layer, row, attend(*_inputs(halves.places, halves.options, row)), weights)

    def run_to_attention(self, layer: int, row: Row, weights: LayerWeights) -> AttentionInputs:
        """A layer on a row as far as its attention; the row goes on with `run_from_attention`."""
        records = self._of(row)
        records.begun = halves = self._find_halves(records, layer, weights)
        if halves is not None:
            halves.before.replay()
            return _inputs(halves.places, halves.options, row)
        weights.bind()
        frame, num_tokens = records.frame, row.plan.num_tokens
        inputs = self._anatomy.run_to_attention(layer, frame.hidden_1TD, frame.calls[layer])
        q_TNH, k_TKH, v_TKW, options = inputs
        return AttentionInputs(q_TNH[:num_tokens], k_TKH[:num_tokens], v_TKW[:num_tokens], options)

    def run_from_attention(self, layer: int, row: Row, out_TNW: Tensor, weights: LayerWeights) -> Tensor:
        """The rest of a layer, given its attention's output `[tokens, N, W]`."""
        records = self._of(row)
        if records.begun is None:
            return self._run(records, layer, row, lambda q_TNH, k_TKH, v_TKW, options: out_TNW, weights)
        records.begun.places.out_TNW[: row.plan.num_tokens].copy_(out_TNW)
        records.begun.after.replay()
        records.begun = None
        return records.frame.hidden_1TD

    def forget_logs(self) -> None:
        """The logs that rows attended to are no more."""
        for records in self._records.values():
            records.steady.clear()
            records.num_seen.clear()
        self._steady.clear()

    def _of(self, row: Row) -> _Records:
        return self._records[row.index, row.ids_1T.shape[1]]

    def _run(self, records: _Records, layer: int, row: Row, attend: Attend, weights: LayerWeights) -> Tensor:
        """The layer as it is."""
        is_there, frame = weights.bind(), records.frame

        def run() -> None:
            attend_within = within(frame, row.plan.num_tokens, attend)
            frame.hidden_1TD.copy_(self._anatomy.run_layer(layer, frame.hidden_1TD, frame.calls[layer], attend_within))

        if weights.place is None or not is_there or layer in records.has_run or not self._is_possible:
            run()
            return frame.hidden_1TD
        with records.tapes.waits() as waits:
            run()
        self._is_possible = not waits
        records.has_run.add(layer)
        return frame.hidden_1TD

    def _find_halves(self, records: _Records, layer: int, weights: LayerWeights) -> _Halves | None:
        """A layer's recording, made where it is time to; None where there can be none yet."""
        if weights.place is None or layer not in records.has_run or not self._is_possible:
            return None
        key = (layer, weights.place)
        if key not in records.halves and weights.bind():
            records.halves[key] = self._record_halves(records, layer)
        return records.halves.get(key)

    def _record_halves(self, records: _Records, layer: int) -> _Halves:
        frame, before, after = records.frame, records.tapes.new(), records.tapes.new()
        reached: list[_Halves] = []

        def stop(q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions) -> Tensor:
            places = leave(frame, q_TNH, k_TKH, v_TKW)
            before.end()
            after.begin()
            reached.append(_Halves(before, after, places, options))
            return places.out_TNW

        with records.tapes.recording():
            before.begin()
            frame.hidden_1TD.copy_(self._anatomy.run_layer(layer, frame.hidden_1TD, frame.calls[layer], stop))
            after.end()
        return reached[0]

    def _find_steady(self, records: _Records, row: Row, attend_at: AttendAt) -> Steady | None:
        """The recording of a row that has come often, made where it is time to."""
        key = row.steady
        if key is None or not self._stays:
            return None
        records.num_seen[key] += 1
        if key in records.steady:
            records.steady[key] = records.steady.pop(key)
        elif records.num_seen[key] > STEADY_STEPS:
            self._stays = all(self._bind(layer) for layer in range(self._anatomy.num_layers))
            has_window = {layer for (layer, _), halves in records.halves.items() if halves.options.window is not None}
            if not self._stays or len(records.halves) < self._anatomy.num_layers:
                return None
            records.steady[key] = record_steady(
                self._anatomy,
                records.frame,
                records.tapes,
                lambda layer: None if row.ancestors and layer in has_window else attend_at(layer),
                row.plan.num_tokens,
            )
            for oldest in list(records.steady)[:-MAX_STEADY]:
                del records.steady[oldest], records.num_seen[oldest]
        return records.steady.get(key)


def _inputs(places: Places, options: AttentionOptions, row: Row) -> AttentionInputs:
    """What attention takes of a row's own tokens, without those that only fill it up."""
    num_tokens = row.plan.num_tokens
    return AttentionInputs(places.q_TNH[:num_tokens], places.k_TKH[:num_tokens], places.v_TKW[:num_tokens], options)
