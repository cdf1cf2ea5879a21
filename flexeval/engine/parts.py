"""The engine's parts under one policy: tiers, lanes, weights, stores; made together, and given back together.

Knows which part needs which; not in what order they work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self, TypeVar

import torch

from flexeval.config import Sparsity
from flexeval.engine.checkpoint import Checkpoint
from flexeval.engine.codecs.codec import Codec
from flexeval.engine.codecs.kv_format import KVCoding, make_format
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.attention import Attention
from flexeval.engine.compute.dense import dense_attention
from flexeval.engine.compute.pace import Pace
from flexeval.engine.compute.replay import Replay
from flexeval.engine.compute.row import Row, RowMaker
from flexeval.engine.compute.selection import make_selection
from flexeval.engine.compute.sparse import SparseAttention
from flexeval.engine.compute.tape import CudaTapes
from flexeval.engine.memory import heap
from flexeval.engine.memory.attention_lane import AttentionLane
from flexeval.engine.memory.disk import DiskTier
from flexeval.engine.memory.hidden import HiddenStore
from flexeval.engine.memory.kv import KVCache
from flexeval.engine.memory.kv_context import Cache
from flexeval.engine.memory.lane import drain
from flexeval.engine.memory.lanes import make_lanes
from flexeval.engine.memory.sparse_kv import SparseKVCache
from flexeval.engine.memory.tiers import Tiers
from flexeval.engine.memory.weights import WeightStore
from flexeval.engine.stopwatch import Stopwatch
from flexeval.engine.sweep import Sweeper
from flexeval.engine.trace import SweepTrace, Trace
from flexeval.planning.rows import RowPlan
from flexeval.policy.done import done_by
from flexeval.policy.measured import MOST_SWEEPS
from flexeval.policy.policy import Policy, check_sparse

H = TypeVar("H", bound=HiddenStore)
ROWS_AHEAD = 3
"""Rows with prompts, at a layer each, that the host may have enqueued and the device not done."""


class EngineParts:
    """What answers with one model under one policy. Close it, or use it in a `with` block."""

    def __init__(
        self,
        anatomy: Anatomy,
        checkpoint: Checkpoint,
        policy: Policy,
        *,
        codec: Codec | None,
        kv_coding: KVCoding | None = None,
        sparsity: Sparsity | None = None,
        vocabulary_codec: Codec | None = None,
        device: torch.device,
        disk_tier: DiskTier | None,
        on_layer: Callable[[int], None] = lambda layer: None,
        overlap: bool | None = None,
        is_apart: bool = False,
    ):
        """Load the weights to where the policy wants them.

        Args:
            anatomy: The model's parts.
            checkpoint: Its weights.
            policy: Where everything rests, and how much is in flight.
            codec: How layers' matrices rest; None as they are.
            kv_coding: How keys and values rest; None as they are.
            sparsity: Which keys are attended to; None attends to all.
            vocabulary_codec: How embedding and head rest; None as they are.
            device: Where layers are computed.
            disk_tier: Room on disk; needed where the policy uses it. The executor closes it.
            on_layer: Told, for each layer that is loaded, how many were before it.
            overlap: Whether transfers run beside the computation; by default where there are any.
            is_apart: Requests are computed apart, in shapes and by kernels that do not depend on each other.
        """
        if sparsity is not None:
            check_sparse(policy)
        self.policy = policy
        self.trace = Trace()
        self._anatomy = anatomy
        self._device = device
        self._kv_coding = kv_coding
        self._is_sparse = sparsity is not None
        self._is_apart = is_apart
        self._watch = Stopwatch(device)
        self.tiers = Tiers(device, disk_tier)
        self._resident_bytes = anatomy.resident_bytes(vocabulary_codec)
        num_layers = anatomy.num_layers
        if overlap is None:
            overlap = not all(self.tiers.is_home(split) for split in (policy.weights, policy.kv, policy.hidden))
        if device.type == "cpu":
            heap.keep_freed()
        self._lanes = make_lanes(device, overlap=overlap)
        try:
            self.tiers.check(policy)
            if self.tiers.host.is_pinned:  # before weights are bound
                self._kv_shapes = [anatomy.kv_shape(layer) for layer in range(num_layers)]
            anatomy.bind_rest(checkpoint.rest(), device, vocabulary_codec)
            self._kv_tiers = self.tiers.spread(policy.kv, num_layers)
            self._weights = WeightStore(
                anatomy,
                checkpoint,
                self.tiers.spread(policy.weights, num_layers),
                codec=codec,
                device=device,
                device_tier=self.tiers.home,
                host_tier=self.tiers.host,
                disk_tier=disk_tier,
                lane=self._lanes["weights"],
                disk_lane=self._lanes["disk"],
                trace=self.trace,
                watch=self._watch,
                num_ahead=policy.slabs_ahead,
                may_multiply_coded=not is_apart,
                on_layer=on_layer,
            )
        except BaseException:
            self._close_lanes()
            self.tiers.close()
            raise
        selection = make_selection(sparsity)
        attention: Attention = SparseAttention(selection) if selection is not None else dense_attention(device)
        self._replay = self._make_replay()
        self._host = AttentionLane(self._lanes["host_attention"], device=device, trace=self.trace)
        self._sweeper = Sweeper(
            anatomy=anatomy,
            weights=self._weights,
            attention=attention,
            replay=self._replay,
            host=self._host,
            trace=self.trace,
            watch=self._watch,
            pace=Pace(device, lead=ROWS_AHEAD),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back memory, threads and files."""
        self._close_lanes()
        self._weights.close()
        self.tiers.close()
        if self._device.type == "cpu":
            heap.give_back()

    def peak_bytes(self) -> dict[str, int]:
        """The most that was used of each tier: on a GPU everything, elsewhere what the engine's stores hold."""
        return self._with_resident(self.tiers.peak_bytes())

    def used_bytes(self) -> dict[str, int]:
        """What is in use of each tier now, as `peak_bytes` counts it."""
        return self._with_resident(self.tiers.used_bytes())

    def _with_resident(self, num_bytes: dict[str, int]) -> dict[str, int]:
        if self._device.type != "cuda":  # a GPU's allocator has counted them
            num_bytes[self.tiers.home.name] += self._resident_bytes
        return num_bytes

    def _make_replay(self) -> Replay | None:
        """Recordings are of rows that have come a few times."""
        if self._device.type != "cuda" or self._is_apart:
            return None
        stream = torch.cuda.Stream(self._device)
        weights = self._weights
        return Replay(
            self._anatomy, lambda: CudaTapes(stream), weights.bind_in_place, most_tokens=weights.most_tokens_in_place
        )

    def _make_rows(self, maker: RowMaker, plans: Sequence[RowPlan]) -> list[Row]:
        replay = self._replay
        if replay is not None and self._weights.fetches_experts(sum(plan.num_tokens for plan in plans)):
            replay = None  # what fills rows up would choose experts as well
        sizes = [None if replay is None else replay.size(plan) for plan in plans]
        return [
            maker.make(index, plan, replayed_size=size)
            for index, (plan, size) in enumerate(zip(plans, sizes, strict=True))
        ]

    def _begin_sweep(self, plans: Sequence[RowPlan]) -> None:
        """Open the sweep's account. Each lane does so in its turn: what an earlier sweep left to it counts there."""
        num_fresh = sum(plan.num_tokens for plan in plans if plan.fresh)
        num_decode = sum(plan.num_tokens for plan in plans) - num_fresh
        if len(self.trace.sweeps) >= 2 * MOST_SWEEPS:
            self.settle()
            self.trace.shorten()
        self.trace.begin_sweep(
            SweepTrace(num_fresh_tokens=num_fresh, num_decode_tokens=num_decode, done=done_by(plans))
        )
        self._begin_lap("compute", self._watch)
        for name, lane in self._lanes.items():
            lane.submit(self._begin_lap, name, lane.watch)

    def _begin_lap(self, name: str, watch: Stopwatch) -> None:
        self.trace.mark(name)
        watch.next_lap()

    def _make_cache(self, capacities: Mapping[int, int], *, coding: KVCoding | None) -> Cache:
        make = SparseKVCache if self._is_sparse else KVCache
        self._expect_logs(capacities, coding)
        return make(
            self._kv_tiers,
            capacities=capacities,
            coding=coding,
            device=self._device,
            lane_in=self._lanes["kv_in"],
            lane_out=self._lanes["kv_out"],
            trace=self.trace,
        )

    def _expect_logs(self, capacities: Mapping[int, int], coding: KVCoding | None) -> None:
        """Have the logs that rest in host memory made, layer by layer, while the first prompts are computed."""
        host = self.tiers.host
        if self._is_sparse or not host.is_pinned:
            return
        forms = [make_format(shape, self._anatomy.dtype, coding) for shape in self._kv_shapes]
        sizes = [form.token_bytes for form, tier in zip(forms, self._kv_tiers, strict=True) if tier is host]
        host.expect([num_tokens * size for size in sizes for num_tokens in capacities.values() if num_tokens])

    def _end_batch(self, cache: Cache) -> None:
        """Give the cache back, and settle the account of every lane."""
        self._host.drain()  # it reads logs where they rest
        if self._replay is not None:
            self._replay.forget_logs()
        cache.close()
        self.tiers.host.expect_no_more()
        self.settle()

    def settle(self) -> None:
        """Settle the account of every lane, between two sweeps or after the last. Waits for what they have to do."""
        for name, lane in self._lanes.items():
            drain(lane)
            self.trace.settle(name, lane.watch.take_laps())
        self.trace.settle("compute", self._watch.take_laps())

    def _make_hidden(self, make: type[H], rows: Sequence[Row], *, prompt_tokens: int) -> H:
        """A sweep's rows, those that decode first: their few tokens would wait for larger copies, so they stay.

        A lone row's hidden states stay as well: they are the next layer's input at once. And so do those of a sweep
        that takes few of the batch's `prompt_tokens`, as far as the room for those of a full one goes.
        """
        home = self.tiers.home
        sizes = [row.plan.num_tokens for row in rows if row.fresh]
        fresh = [home] * len(sizes)
        if sizes and len(rows) > 1:
            part = min(1.0, sum(sizes) / min(self.policy.sweep_tokens, prompt_tokens))
            fresh = self.tiers.spread_sizes(self.policy.hidden.of_part(part), sizes)
        return make(
            [home] * (len(rows) - len(sizes)) + fresh,
            device=self._device,
            device_tier=home,
            lane=self._lanes["hidden"],
            trace=self.trace,
        )

    def _close_lanes(self) -> None:
        for lane in self._lanes.values():
            lane.close()
