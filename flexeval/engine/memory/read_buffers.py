"""Room on the compute device for what rows read of KV that rests elsewhere: allocated once, and used in turns.

Memory from the device's allocator, lent from stream to stream, is only free again when the device has caught up: a host
that runs ahead would take a new buffer a row, and nothing can be given back while a graph is recorded. Knows bytes and
lanes; not logs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexeval.engine.memory.lane import Transfer


class ReadBuffers:
    """Two turns' worth of buffers: one is used while the next is filled, as two loads may be outstanding.

    For one lane's thread. `Lane.submit` orders a third load behind the use of the first, whose buffers it takes.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._buffers: list[list[Tensor]] = [[], []]
        self._readers: list[list[Transfer[None]]] = [[], []]
        self._turn = 0
        self._num_taken = 0

    def next_turn(self) -> None:
        """Begin to read for another row, in the place of the one before the last."""
        if self._num_taken:
            self._turn = 1 - self._turn
        self._num_taken = 0
        for reader in self._readers[self._turn]:
            reader.wait()
        self._readers[self._turn].clear()

    def take(self, num_bytes: int, *, most_bytes: int) -> Tensor:
        """Room (uint8 `[num_bytes]`) until the turn after the next, made for `most_bytes` where there is none yet."""
        assert num_bytes <= most_bytes, (num_bytes, most_bytes)
        buffers = self._buffers[self._turn]
        if self._num_taken == len(buffers):
            buffers.append(torch.empty(0, dtype=torch.uint8, device=self._device))
        if buffers[self._num_taken].numel() < num_bytes:
            buffers[self._num_taken] = torch.empty(0, dtype=torch.uint8, device=self._device)  # never both at once
            buffers[self._num_taken] = torch.empty(most_bytes, dtype=torch.uint8, device=self._device)
        self._num_taken += 1
        return buffers[self._num_taken - 1][:num_bytes]

    def keep_for(self, reader: Transfer[None]) -> None:
        """Another lane reads what was taken in this turn: it is overwritten only after that."""
        self._readers[self._turn].append(reader)
