"""Attention where KV rests: queries go to the host, the CPU attends, its output comes back. Knows lanes and streams.

The CPU reads what sequences have for themselves, each token of it for one query of a head; what they share is for the
compute device, which reads it once for all of them. Knows neither which rows are attended for here nor how attention is
computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexeval.engine.compute.host_attention import Attending, HostAttention
from flexeval.engine.compute.host_team import build
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import Row
from flexeval.engine.kernels import has_triton
from flexeval.engine.memory.kv_context import HostContext
from flexeval.engine.memory.lane import Lane, Transfer, drain
from flexeval.engine.trace import Trace
from flexeval.team import give_spare_cores, num_spare_cores


class AttentionLane:
    """The CPU at work beside the compute device, a row at a time."""

    def __init__(self, lane: Lane, *, device: torch.device, trace: Trace):
        """Queries come from `device`, and outputs go back there."""
        self._lane = lane
        self._device = device
        self._trace = trace
        self._attention: HostAttention | None = None  # made by the lane when first asked: it may have to compile
        self._rooms: dict[int, tuple[Tensor, Tensor]] = {}  # by row, page-locked
        give_spare_cores(lambda take: lane.submit(take).wait())

    def submit(self, row: Row, q_TNH: Tensor, options: AttentionOptions, context: HostContext) -> Transfer[Attending]:
        """Attend for a row to its sequences' own contexts, whose new tokens have been stored; for `take`."""
        return self._lane.submit(self._begin, row, q_TNH, options, context)

    def take(self, attending: Transfer[Attending]) -> Tensor:
        """The output `[T, N, W]` on the compute device.

        It is sent for by whoever waits for it, and by a kernel if there is one: in the link's queue it would stand
        behind gigabytes of weights and KV, and the next row's queries behind it.
        """
        attended = attending.wait()
        out_TNW = attended.wait()
        self._lane.watch.add(attended.seconds())
        return self._fetch(out_TNW)

    def take_lse(self, attending: Transfer[Attending]) -> Tensor:
        """The log-sum-exp `[T, N]` of an output that has been taken, likewise; sinks are not among the scores."""
        return self._fetch(attending.wait().lse_TN)

    def drain(self) -> None:
        """Wait for all that was submitted, taken or not."""
        drain(self._lane)
        if self._attention is not None:
            self._attention.drain()

    def _begin(self, row: Row, q_TNH: Tensor, options: AttentionOptions, context: HostContext) -> Attending:
        with self._lane.watch.paused():  # how long the CPU takes is known when it has attended
            context.wait()
            # Copies from a GPU without blocking go to page-locked memory, which torch keeps and hands out again.
            q_TNH = q_TNH.to("cpu", non_blocking=True)
            if self._device.type == "cuda":  # the host reads: its own copies must be there, and all that logs wait for
                torch.cuda.current_stream().synchronize()
            if self._attention is None:
                num_threads = num_spare_cores()
                self._attention = HostAttention(build(num_threads), num_threads, sees_above=False)
            room = self._page_locked(row.index, q_TNH, context) if self._device.type == "cuda" else None
            attending = self._attention.begin(q_TNH, options, row, context, room)
        self._trace.moved("host_attention", attending.num_keys * context.format.token_bytes)
        return attending

    def _fetch(self, tensor: Tensor) -> Tensor:
        if has_triton(self._device):
            from flexeval.engine.memory.fetch_kernel import fetch

            return fetch(tensor, self._device)
        return tensor.to(self._device, non_blocking=True)

    def _page_locked(self, row: int, q_TNH: Tensor, context: HostContext) -> tuple[Tensor, Tensor]:
        """Room for what comes of a row, in the place of what came last, from which its queries came: these are here."""
        shape = (*q_TNH.shape[:2], context.format.shape.value_size)
        room = self._rooms.get(row)
        if room is None or room[0].shape != shape or room[0].dtype != q_TNH.dtype:
            out_TNW = torch.empty(shape, dtype=q_TNH.dtype, pin_memory=True)
            room = self._rooms[row] = out_TNW, torch.empty(shape[:2], pin_memory=True)
        return room
