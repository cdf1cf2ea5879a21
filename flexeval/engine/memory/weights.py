"""The weights at rest and on their way: one slab a layer. Knows slabs, tiers and codecs; not what layers compute.

In a sweep of few tokens, of a layer with experts only what all tokens need is loaded ahead. The experts follow as they
are chosen, into the places where they would lie anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import partial
from math import inf

import torch
from torch import Tensor

from flexeval.engine.checkpoint import Checkpoint
from flexeval.engine.codecs.codec import Codec
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.experts import Fetch
from flexeval.engine.memory.disk import DiskTier
from flexeval.engine.memory.lane import Lane, Transfer
from flexeval.engine.memory.loading import load_layers
from flexeval.engine.memory.prepared import PreparedLayers
from flexeval.engine.memory.read_ahead import ReadAhead
from flexeval.engine.memory.slab import SlabLayout
from flexeval.engine.memory.slab_queue import SlabQueue
from flexeval.engine.memory.tier import Extent, Tier
from flexeval.engine.stopwatch import Stopwatch
from flexeval.engine.trace import Trace
from flexeval.policy.experts import is_by_need


class _Bound(Enum):
    AS_IT_RESTS = "as it rests"
    UNPACKED = "unpacked"


class WeightStore:
    """All layers' slabs; streamed layers pass through a few buffers, coded ones are unpacked into one workspace."""

    def __init__(
        self,
        anatomy: Anatomy,
        checkpoint: Checkpoint,
        tiers: Sequence[Tier],
        *,
        codec: Codec | None,
        device: torch.device,
        device_tier: Tier,
        host_tier: Tier,
        disk_tier: DiskTier | None,
        lane: Lane,
        disk_lane: Lane,
        trace: Trace,
        watch: Stopwatch,
        num_ahead: int = 1,
        may_multiply_coded: bool = True,
        on_layer: Callable[[int], None] = lambda layer: None,
    ):
        """Read the checkpoint layer by layer and put layer l's slab on `tiers[l]`.

        `device_tier` has the room for what is on its way, `num_ahead` slabs beside the one in use; where that is not
        `host_tier`, slabs come from disk by way of the latter, on `disk_lane`. On `disk_tier` slabs outlive the run,
        for the next one.
        Rows of few tokens multiply coded matrices as they rest where that is faster, unless not `may_multiply_coded`.
        `watch` runs while layers are computed, and not while they wait for their experts.
        Raises `CapacityError` where a tier is full, and what the checkpoint raises.
        """
        self.lane = lane
        self._anatomy = anatomy
        self._trace = trace
        self._watch = watch
        self._layouts = [SlabLayout(anatomy.layer_specs(layer), codec) for layer in range(anatomy.num_layers)]
        self._device_tier = device_tier
        self._extents: list[Extent] = []
        self._rooms: list[Extent] = []
        few_tokens = codec.few_tokens(device, anatomy.dtype) if codec is not None and may_multiply_coded else 0
        self._few_tokens = [
            few_tokens if layout.coded_names and layout.coded_names <= codable else 0
            for layout, codable in zip(self._layouts, anatomy.codable, strict=True)
        ]
        """Per layer, up to how many tokens of a row it computes with its matrices as they rest."""
        self._is_bound = [False] * anatomy.num_layers
        self._sweep_tokens = 0
        self._bound: tuple[int, _Bound] | None = None  # a layer of this sweep, and how its rows were computed last
        self._prepared: PreparedLayers | None = None
        self._read_ahead: ReadAhead | None = None
        if disk_tier is not None and checkpoint.identity is not None:
            self._prepared = PreparedLayers(disk_tier, checkpoint.identity, self._layouts)
        try:
            self._extents = load_layers(
                checkpoint,
                self._layouts,
                tiers,
                layers_name=anatomy.layers_name,
                prepared=self._prepared,
                device=device,
                on_layer=on_layer,
            )
            streamed = max((extent.num_bytes for extent in self._extents if extent.view() is None), default=0)
            self._buffers = [self._room(streamed) for _ in range(1 + num_ahead)]
            has_experts = [layout.num_experts > 0 for layout in self._layouts]
            if device_tier is not host_tier and disk_tier in tiers:
                # Of layers with experts, parts are read in turn, by need.
                is_read = [tier is disk_tier and not has for tier, has in zip(tiers, has_experts, strict=True)]
                self._read_ahead = ReadAhead(
                    self._extents, is_read=is_read, host_tier=host_tier, lane=disk_lane, device=device, trace=trace
                )
            types = {layout.coded_dtype for layout in self._layouts if layout.num_coded_values}
            coded = max(layout.num_coded_values for layout in self._layouts)
            self._workspace = self._room(coded * (dtype := types.pop()).itemsize).view(dtype) if types else None
        except BaseException:
            self.close()
            raise
        self._num_loads = 0
        # A load takes its buffer in turn: `Lane.submit` orders it behind the use of the slab that was there.
        self._queue = SlabQueue(
            self._send,
            takes_room=[extent.view() is None for extent in self._extents],
            num_rooms=len(self._buffers),
            waits_for_sweep=has_experts,  # which experts it will want is not known yet
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all slabs at rest."""
        return sum(layout.num_bytes for layout in self._layouts)

    def moved_bytes(self) -> list[int]:
        """Per layer, bytes that come to the compute device at most."""
        return [0 if extent.view() is not None else extent.num_bytes for extent in self._extents]

    def begin_sweep(self, num_tokens: int, *, expects_more: bool) -> None:
        """A sweep of so many tokens begins: its first slabs are on their way, from the sweep before or from now on."""
        self._sweep_tokens, self._bound = num_tokens, None
        self._queue.begin_sweep(expects_more=expects_more)
        if self._read_ahead is not None:
            self._read_ahead.begin_sweep(expects_more=expects_more, next_layer=self._queue.next_layer)
        self._queue.send()

    def take(self, layer: int) -> Tensor:
        """The slab of the next layer in order, on the compute device."""
        return self._queue.take(layer).wait()

    def send_for_next(self) -> None:
        """The layer before the one in use is done, so that other slabs may take its buffer."""
        self._queue.send()

    def _send(self, layer: int) -> Transfer[Tensor]:
        if self._read_ahead is None or (slab := self._read_ahead.take(layer)) is None:
            return self.lane.submit(self.load, layer, self._sweep_tokens)
        coming = self.lane.submit(self.load, layer, self._sweep_tokens, slab)
        self._read_ahead.read_by(coming)
        return coming

    def load(self, layer: int, sweep_tokens: int, read: Transfer[Extent] | None = None) -> Tensor:
        """A layer's slab on the compute device for a sweep of so many tokens; runs on the weights' lane.

        It comes from where it rests, or from where it has been `read` ahead. Where experts are fetched by need, their
        part of it holds nothing yet.
        """
        extent = self._extents[layer]
        if (view := extent.view()) is not None:
            return view
        buffer = self._buffers[self._num_loads % len(self._buffers)][: extent.num_bytes]
        self._num_loads += 1
        is_by_need = self._is_by_need(layer, sweep_tokens)
        part = slice(0, self._layouts[layer].num_dense_bytes if is_by_need else extent.num_bytes)
        if read is not None:
            with self.lane.watch.paused():
                extent = read.wait()
        self._read(extent, buffer, [part])
        return buffer

    def bind(self, layer: int, slab: Tensor, *, row_tokens: int, sweep_tokens: int) -> bool:
        """Let the layer compute a row with a loaded slab: coded matrices as they rest for few tokens, else unpacked.

        What was unpacked for one row serves the layer's later rows of this sweep, however long.

        Args:
            layer: Which.
            slab: What `load` gave.
            row_tokens: Tokens of the row.
            sweep_tokens: Tokens of all rows.

        Returns:
            Whether the layer computes with its tensors where the slab lies, not unpacked.
        """
        layout = self._layouts[layer]
        takes_coded = row_tokens <= self._few_tokens[layer] and self._bound != (layer, _Bound.UNPACKED)
        bound = (layer, _Bound.AS_IT_RESTS if takes_coded else _Bound.UNPACKED)
        is_in_slab = takes_coded or not layout.num_coded_values
        stays = self._extents[layer].view() is not None and is_in_slab
        if self._bound == bound or (stays and self._is_bound[layer]):
            return is_in_slab
        fetch: Fetch | None = None
        if not stays and self._is_by_need(layer, sweep_tokens):
            fetch = partial(self._fetch_experts, layer, slab, set(), is_unpacked=not is_in_slab)
        if takes_coded:
            self._anatomy.bind_layer(layer, layout.as_it_rests(slab), fetch)
        elif fetch is not None:
            layout.decode_dense(slab, self._workspace)
            self._anatomy.bind_layer(layer, layout.tensors(slab, self._workspace), fetch)
        else:
            self._anatomy.bind_layer(layer, layout.unpack(slab, self._workspace))
        self._bound, self._is_bound[layer] = bound, stays
        return is_in_slab

    def place(self, layer: int, slab: Tensor, *, row_tokens: int) -> int | None:
        """Where a layer's tensors lie for a row of so many tokens; None if they are unpacked first, over others."""
        is_unpacked = self._layouts[layer].num_coded_values and row_tokens > self._few_tokens[layer]
        return None if is_unpacked else slab.data_ptr()

    def fetches_experts(self, sweep_tokens: int) -> bool:
        """Whether experts come as they are chosen in a sweep of so many tokens, at any layer."""
        return any(
            extent.view() is None and self._is_by_need(layer, sweep_tokens)
            for layer, extent in enumerate(self._extents)
        )

    @property
    def most_tokens_in_place(self) -> float:
        """Tokens of a row up to which no layer's tensors are unpacked over others."""
        pairs = zip(self._layouts, self._few_tokens, strict=True)
        return min((few_tokens for layout, few_tokens in pairs if layout.num_coded_values), default=inf)

    def bind_in_place(self, layer: int) -> bool:
        """Let a layer compute rows of few tokens with its tensors where they lie; False where they do not stay."""
        self._bound = None
        slab = self._extents[layer].view()
        return slab is not None and self.bind(layer, slab, row_tokens=1, sweep_tokens=1)

    def _is_by_need(self, layer: int, sweep_tokens: int) -> bool:
        experts = self._anatomy.experts[layer]
        return experts is not None and is_by_need(experts.num_experts, experts.per_token, sweep_tokens)

    def _fetch_experts(self, layer: int, slab: Tensor, there: set[int], chosen: Tensor, *, is_unpacked: bool) -> None:
        """Bring the chosen experts that are not `there` into a layer's slab, and unpack them where that is wanted."""
        layout, extent = self._layouts[layer], self._extents[layer]
        missing = sorted(set(chosen.unique().tolist()).intersection(range(layout.num_experts)) - there)
        there.update(missing)
        runs = list(neighbours(missing))
        if runs and extent.view() is None:
            parts = [layout.expert_bytes(experts) for experts in runs]
            with self._watch.paused():
                self.lane.submit(self._read, extent, slab, parts).wait()
        for experts in runs if is_unpacked else ():
            layout.decode_experts(slab, self._workspace, experts)

    def _read(self, extent: Extent, slab: Tensor, parts: Sequence[slice]) -> None:
        extent.read_parts(slab, parts, give_way=self.lane.give_way)
        self._trace.moved("weights", sum(part.stop - part.start for part in parts))

    def close(self) -> None:
        """Give back everything."""
        self._anatomy.unbind_layers()
        for extent in [*self._extents, *self._rooms]:
            extent.free()
        self._extents, self._rooms = [], []
        if self._read_ahead is not None:
            self._read_ahead.close()
        if self._prepared is not None:
            self._prepared.close()

    def _room(self, num_bytes: int) -> Tensor:
        """Memory of the compute device, counted with everything else there."""
        self._rooms.append(self._device_tier.allocate(num_bytes))
        view = self._rooms[-1].view()
        assert view is not None
        return view


def neighbours(numbers: Sequence[int]) -> Iterator[range]:
    """Rising numbers as runs without gaps."""
    start = 0
    for index in range(1, len(numbers) + 1):
        if index == len(numbers) or numbers[index] != numbers[index - 1] + 1:
            yield range(numbers[start], numbers[index - 1] + 1)
            start = index
