"""One pass over the layers for all rows of a sweep, in zig-zag order (FlexGen, Algorithm 1).

Knows the order of work and what overlaps; neither which rows there are (the scheduler) nor what logits are for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from flexeval.engine.compute.anatomy import Anatomy, LayerCall
from flexeval.engine.compute.attention import Attended, Attention, attend_above, complete
from flexeval.engine.compute.host_attention import Attending
from flexeval.engine.compute.pace import Pace
from flexeval.engine.compute.port import Attend, AttentionOptions
from flexeval.engine.compute.replay import LayerWeights, Replay
from flexeval.engine.compute.row import Needed, Row
from flexeval.engine.memory.attention_lane import AttentionLane
from flexeval.engine.memory.contexts_ahead import ContextsAhead, Wanted
from flexeval.engine.memory.hidden import HiddenStore
from flexeval.engine.memory.kv_context import Cache
from flexeval.engine.memory.lane import Transfer, ahead
from flexeval.engine.memory.weights import WeightStore
from flexeval.engine.stopwatch import Stopwatch
from flexeval.engine.trace import Trace
from flexeval.planning.turns import take_turns


class _Apart(NamedTuple):
    """A row in the middle of a layer, for which the CPU attends."""

    layer: int
    hidden_1TD: Tensor
    call: LayerCall
    weights: LayerWeights
    options: AttentionOptions
    attending: Transfer[Attending]
    above: Attended | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweeper:
    """What a sweep needs of the engine."""

    anatomy: Anatomy
    """The model's layers."""
    weights: WeightStore
    """Their weights."""
    attention: Attention
    """How packed rows attend."""
    host: AttentionLane
    """Where the CPU attends instead."""
    replay: Replay | None
    """Runs the layers of decode rows from recordings, where there can be any."""
    trace: Trace
    """Where time is counted."""
    watch: Stopwatch
    """Counts when the compute device is at work, not when it waits for a lane."""
    pace: Pace
    """Of rows with prompts, whose buffers are large."""

    def sweep(
        self,
        rows: Sequence[Row],
        cache: Cache,
        hidden: HiddenStore,
        on_host: Sequence[Collection[int]],
        *,
        for_later: Callable[[Row], Row],
        expects_more: bool,
    ) -> Iterator[Tensor]:
        """Run all rows through all layers; yield each row's hidden states `[1, T, D]` after the last one, in order.

        The next layer's weights, the next row's KV and the next row's hidden states are always on their way while the
        current row is computed; where another sweep is expected, its first layer's weights too. At layer l the CPU
        attends for the rows `on_host[l]`, while all others are computed and the first of them go on to the next layer.
        `for_later` is `RowMaker.for_later`.
        """
        layers = range(self.anatomy.num_layers)
        in_turn = [rows[index] for index in take_turns([row.plan for row in rows])]
        moving = [row.index for row in in_turn if not hidden.stays(row.index)]
        num_tokens = sum(row.plan.num_tokens for row in rows)
        self.weights.begin_sweep(num_tokens, expects_more=expects_more)
        # A lone row's next input is this cell's output: it cannot be fetched before it is there.
        hidden_ahead = ahead(hidden.lane, hidden.load, moving * len(layers), depth=1 if len(moving) > 1 else 0)
        with self.trace.phase("embed"):
            calls = self._embed(rows, cache, hidden, on_host, for_later)
        contexts = ContextsAhead(cache, len(layers), self._wanted(rows, in_turn, on_host))

        def compute(layer: int, row: Row, weights: LayerWeights) -> None:
            hidden_1TD = hidden.load(row.index) if hidden.stays(row.index) else next(hidden_ahead)
            attend = self._attend(layer, row, cache, contexts.take(Wanted(layer, row)))
            hidden.save(row.index, self._run(layer, row, hidden_1TD, calls[row.index][layer], attend, weights))
            if row.fresh:
                self.pace.step()

        apart: dict[int, _Apart] = {}
        with self.trace.phase("layers"):
            for layer in layers:
                self.trace.num_layers_begun = layer + 1
                slab = self.weights.take(layer)
                weights = partial(self._weights_of, layer, slab, num_tokens)
                before, apart = apart, {}
                # Run at once, or the CPU would wait for all of them.
                soon = before.keys() if contexts.is_in_place[layer] else ()
                for row in rows:  # the CPU has the next layer's queries of one row while it attends for another
                    if row.index in before:
                        self._come_back(row, before[row.index], hidden)
                    if row.index in on_host[layer]:
                        call, hidden_1TD = calls[row.index][layer], hidden.load(row.index)
                        apart[row.index] = self._set_out(layer, row, hidden_1TD, call, cache, contexts, weights(row))
                    elif row.index in soon:
                        compute(layer, row, weights(row))
                self.weights.send_for_next()
                for row in in_turn:
                    if self._is_cell(layer, row, on_host) and row.index not in soon:
                        compute(layer, row, weights(row))
                cache.end_layer()
        # While the CPU attends for the last rows, the first are read off.
        yield from ahead(hidden.lane, hidden.load, self._end(rows, apart, hidden), depth=1 if moving else 0)

    def _wanted(
        self, rows: Sequence[Row], in_turn: Sequence[Row], on_host: Sequence[Collection[int]]
    ) -> Iterator[Wanted]:
        """What is read of logs, in the order of the sweep: by rows for which the CPU attends, and by all others."""
        for layer in range(self.anatomy.num_layers):
            for row in rows:
                if row.index in on_host[layer] and row.ancestors:
                    yield Wanted(layer, row, is_above_alone=True)
            yield from (Wanted(layer, row) for row in in_turn if self._is_cell(layer, row, on_host))

    def _embed(
        self,
        rows: Sequence[Row],
        cache: Cache,
        hidden: HiddenStore,
        on_host: Sequence[Collection[int]],
        for_later: Callable[[Row], Row],
    ) -> dict[int, list[LayerCall]]:
        """Give each row its first hidden states; what its layers are called with, by row."""
        is_moving = any(row.compactions for row in rows)
        calls: dict[int, list[LayerCall]] = {}
        for row in rows:
            with self.watch.running():
                if row.is_replayed:
                    assert self.replay is not None
                    is_apart = is_moving or any(row.index in apart for apart in on_host)
                    stays = self.attention.is_recordable and not is_apart
                    attend_at = None if not stays else partial(self._attend_in_place, for_later(row), cache)
                    hidden_1TD, calls[row.index] = self.replay.begin(row, attend_at)
                else:
                    hidden_1TD, calls[row.index] = self.anatomy.embed(row.ids_1T, row.positions_1T)
            hidden.save(row.index, hidden_1TD)
            if row.fresh:  # embedding takes no time: all rows would be on the device before the first has left it
                hidden.wait(row.index)
                self.pace.step()
        return calls

    def _end(self, rows: Sequence[Row], apart: Mapping[int, _Apart], hidden: HiddenStore) -> Iterator[int]:
        """Index of each row, once it is through all layers."""
        for row in rows:
            if row.index in apart:
                with self.trace.phase("layers"):
                    self._come_back(row, apart[row.index], hidden)
            yield row.index

    def _weights_of(self, layer: int, slab: Tensor, sweep_tokens: int, row: Row) -> LayerWeights:
        num = row.plan.num_tokens
        bind = partial(self.weights.bind, layer, slab, row_tokens=num, sweep_tokens=sweep_tokens)
        return LayerWeights(self.weights.place(layer, slab, row_tokens=num), bind)

    def _run(
        self, layer: int, row: Row, hidden_1TD: Tensor, call: LayerCall, attend: Attend, weights: LayerWeights
    ) -> Tensor:
        with self.watch.running():
            if row.is_replayed:
                assert self.replay is not None
                return self.replay.run(layer, row, attend, weights)
            weights.bind()
            if layer + 1 == self.anatomy.num_layers and row.needed is not None:
                return self._run_for_needed(layer, row.needed, hidden_1TD, call, attend)
            return self.anatomy.run_layer(layer, hidden_1TD, call, attend)

    def _run_for_needed(
        self, layer: int, needed: Needed, hidden_1TD: Tensor, call: LayerCall, attend: Attend
    ) -> Tensor:
        """The last layer: keys and values of all tokens, and what follows attention of the needed ones alone.

        The other tokens' hidden states stay what they were: nobody reads them.
        """
        attended_TNW = attend(*self.anatomy.run_to_attention(layer, hidden_1TD, call))
        call = self.anatomy.embed(needed.ids_1W, needed.positions_1W).calls[layer]
        needed_1WD = hidden_1TD[:, needed.index_W]
        needed_1WD = self.anatomy.run_layer(layer, needed_1WD, call, lambda *_: attended_TNW[needed.index_W])
        return hidden_1TD.index_copy(1, needed.index_W, needed_1WD)

    def _set_out(
        self,
        layer: int,
        row: Row,
        hidden_1TD: Tensor,
        call: LayerCall,
        cache: Cache,
        contexts: ContextsAhead,
        weights: LayerWeights,
    ) -> _Apart:
        """Run a layer up to its attention and hand that to the CPU; meanwhile attend to what the sequences share.

        A layer that is not replayed is called once more to finish, so that norm and projections are computed twice.
        """
        with self.watch.running():
            if row.is_replayed:
                assert self.replay is not None
                inputs = self.replay.run_to_attention(layer, row, weights)
            else:
                weights.bind()
                inputs = self.anatomy.run_to_attention(layer, hidden_1TD, call)
            context = cache.store_for_host(layer, row, inputs.k_TKH, inputs.v_TKW)
        attending = self.host.submit(row, inputs.q_TNH, inputs.options, context)
        above = None
        if row.ancestors:
            shared = contexts.take(Wanted(layer, row, is_above_alone=True))
            with self.watch.running():
                above = attend_above(inputs.q_TNH, inputs.options, row, shared)
        return _Apart(layer, hidden_1TD, call, weights, inputs.options, attending, above)

    def _come_back(self, row: Row, apart: _Apart, hidden: HiddenStore) -> None:
        """Run the rest of a layer, once the CPU has attended."""
        layer, hidden_1TD, call, weights, options, attending, above = apart
        out_TNW = self.host.take(attending)
        with self.watch.running():
            if above is not None or options.sinks_N is not None:
                out_TNW = complete(out_TNW, self.host.take_lse(attending), above, options)
            if row.is_replayed:
                assert self.replay is not None
                hidden_1TD = self.replay.run_from_attention(layer, row, out_TNW, weights)
            else:
                weights.bind()
                hidden_1TD = self.anatomy.run_layer(layer, hidden_1TD, call, lambda *_: out_TNW)
        hidden.save(row.index, hidden_1TD)

    def _is_cell(self, layer: int, row: Row, on_host: Sequence[Collection[int]]) -> bool:
        """Whether a row is run at a layer, and in one go: not in two halves, nor from a recording that goes past it."""
        return row.index not in on_host[layer] and (
            not row.is_replayed or self.replay is None or self.replay.attends(row, layer)
        )

    def _attend_in_place(self, row: Row, cache: Cache, layer: int) -> Attend | None:
        return self._attend(layer, row, cache, cache.load(layer, row)) if cache.is_in_place(layer) else None

    def _attend(self, layer: int, row: Row, cache: Cache, context: Any) -> Attend:
        def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions) -> Tensor:
            seen = cache.store(layer, row, k_TKH, v_TKW, context)
            return self.attention(q_TNH, *seen, options, row, context)

        return attend
