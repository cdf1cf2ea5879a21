"""One pass over the layers for all rows of a sweep, in zig-zag order (FlexGen, Algorithm 1).

Knows the order of work and what overlaps; neither which rows there are (the scheduler) nor what logits are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from flexeval.engine.compute.anatomy import Anatomy, LayerCall
from flexeval.engine.compute.attention import PackedAttention
from flexeval.engine.compute.port import Attend, AttentionOptions
from flexeval.engine.compute.replay import Replay
from flexeval.engine.compute.row import Row
from flexeval.engine.memory.hidden import HiddenStore
from flexeval.engine.memory.kv import KVCache, LoadedContext
from flexeval.engine.memory.lane import ahead
from flexeval.engine.memory.weights import WeightStore
from flexeval.engine.stopwatch import Stopwatch
from flexeval.engine.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweeper:
    """What a sweep needs of the engine."""

    anatomy: Anatomy
    """The model's layers."""
    weights: WeightStore
    """Their weights."""
    attention: PackedAttention
    """How packed rows attend."""
    replay: Replay | None
    """Runs the layers of decode rows from recordings, where there can be any."""
    trace: Trace
    """Where time is counted."""
    watch: Stopwatch
    """Counts when the compute device is at work, not when it waits for a lane."""

    def sweep(
        self, rows: Sequence[Row], cache: KVCache, hidden: HiddenStore, *, expects_more: bool
    ) -> Iterator[Tensor]:
        """Run all rows through all layers; yield each row's hidden states `[1, T, D]` after the last one, in order.

        The next layer's weights, the next row's KV and the next row's hidden states are always on their way while the
        current row is computed; where another sweep is expected, its first layer's weights too.
        """
        layers = range(self.anatomy.num_layers)
        cells = [(layer, row) for layer in layers for row in rows]
        num_tokens = sum(row.plan.num_tokens for row in rows)
        slabs = self.weights.stream(num_tokens, expects_more=expects_more)
        context_ahead = ahead(cache.lane_in, lambda cell: cache.load(*cell), cells)
        # A lone row's next input is this cell's output: it cannot be fetched before it is there.
        hidden_ahead = ahead(hidden.lane, hidden.load, [row.index for _, row in cells], depth=1 if len(rows) > 1 else 0)
        calls: dict[int, list[LayerCall]] = {}
        with self.trace.phase("embed"):
            for row in rows:
                with self.watch.running():
                    embedded = self.anatomy.embed(row.ids_1T, row.positions_1T)
                    if self.replay is not None and self.replay.takes(row.plan):
                        self.replay.begin(row.index, embedded.hidden_1TD, embedded.calls)
                calls[row.index] = embedded.calls
                hidden.save(row.index, embedded.hidden_1TD)
        with self.trace.phase("layers"):
            for layer in layers:
                slab = next(slabs)
                self.weights.begin_layer()
                for row in rows:
                    hidden_1TD, context = next(hidden_ahead), next(context_ahead)
                    attend = self._attend(layer, row, cache, context)
                    bind = partial(
                        self.weights.bind, layer, slab, row_tokens=row.plan.num_tokens, sweep_tokens=num_tokens
                    )
                    with self.watch.running():
                        hidden_1TD = self._run(layer, row, hidden_1TD, calls[row.index][layer], attend, bind)
                    hidden.save(row.index, hidden_1TD)
                cache.end_layer()
        yield from ahead(hidden.lane, hidden.load, [row.index for row in rows])

    def _run(
        self, layer: int, row: Row, hidden_1TD: Tensor, call: LayerCall, attend: Attend, bind: Callable[[], bool]
    ) -> Tensor:
        if self.replay is not None and self.replay.takes(row.plan):
            return self.replay.run(layer, row.index, row.plan, hidden_1TD, attend, bind=bind)
        bind()
        return self.anatomy.run_layer(layer, hidden_1TD, call, attend)

    def _attend(self, layer: int, row: Row, cache: KVCache, context: LoadedContext) -> Attend:
        def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions) -> Tensor:
            cache.store(layer, row, k_TKH, v_TKW, context)
            return self.attention(q_TNH, k_TKH, v_TKW, options, row, context)

        return attend
