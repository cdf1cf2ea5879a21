"""Keeps the host from running far ahead of the compute device. Knows events; not what is computed.

What one stream lends to another is only free again when the device has come by: a host that is a sweep ahead would
hold the hidden states and the KV of all rows between the two at once.
"""

from __future__ import annotations

from collections import deque

import torch


class Pace:
    """Lets the host be `lead` steps ahead of a CUDA device; elsewhere there is nothing to keep up with."""

    def __init__(self, device: torch.device, *, lead: int):
        self._is_cuda = device.type == "cuda"
        self._lead = lead
        self._ahead: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """A step has been enqueued on the current stream: wait until the one `lead` before it is done."""
        if not self._is_cuda:
            return
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._ahead.append(event)
        if len(self._ahead) > self._lead:
            self._ahead.popleft().synchronize()
