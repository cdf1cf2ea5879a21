"""What has been sent for and not yet been taken: layer after layer, sweep after sweep, as far as there is room.

Knows which layers take up room, and in what order they come; moves nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class _Sent(NamedTuple, Generic[T]):
    layer: int
    value: T


class SlabQueue(Generic[T]):
    """The layers of one model on one stretch of their way to the compute device."""

    def __init__(
        self,
        send: Callable[[int], T],
        *,
        takes_room: Sequence[bool],
        num_rooms: int,
        waits_for_sweep: Sequence[bool],
    ):
        """Nothing is sent for yet.

        Args:
            send: Sends for a layer; what it gives, `take` hands on.
            takes_room: Per layer, whether it takes a room on this stretch. One that does not is sent for in its turn
                and keeps none waiting.
            num_rooms: How many there are, for what is on its way and for the layer that was taken last.
            waits_for_sweep: Per layer, whether it is not sent for before its own sweep has begun.
        """
        self._send = send
        self._takes_room = takes_room
        self._num_rooms = num_rooms
        self._waits_for_sweep = waits_for_sweep
        self._sent: deque[_Sent[T]] = deque()
        self._next_layer, self._is_next_sweep = 0, False  # what to send for next, and whether this sweep's are all sent
        self._expects_more = False
        self._is_room_taken = False  # by the layer that was taken last

    @property
    def next_layer(self) -> int:
        """What is sent for next; as many as there are layers where that is the next sweep's first."""
        return self._next_layer

    def begin_sweep(self, *, expects_more: bool, next_layer: int = 0) -> None:
        """A sweep begins, of which `next_layer` is taken next: it may have been sent for in the sweep before.

        Where another sweep is expected, its first layers are sent for behind the last ones of this sweep.
        """
        self._expects_more, self._is_next_sweep, self._is_room_taken = expects_more, False, False
        is_other = bool(self._sent) and self._sent[0].layer != next_layer % len(self._takes_room)
        if is_other or any(self._waits_for_sweep[sent.layer] for sent in self._sent):
            self._sent.clear()  # left by a sweep that failed
        if not self._sent:
            self._next_layer = next_layer

    def take(self, layer: int) -> T:
        """What was sent for the next layer in order; the one that was taken before it is done."""
        sent = self._sent.popleft()
        assert sent.layer == layer, (layer, sent)
        self._is_room_taken = self._takes_room[layer]
        return sent.value

    def send(self) -> None:
        """Send for as many as there is room for."""
        while len(self._sent) < len(self._takes_room):
            if self._next_layer == len(self._takes_room):
                if not self._expects_more or self._is_next_sweep:
                    return
                self._next_layer, self._is_next_sweep = 0, True
            layer = self._next_layer
            num_taken = self._is_room_taken + sum(self._takes_room[sent.layer] for sent in self._sent)
            if self._takes_room[layer] and num_taken == self._num_rooms:
                return
            if self._is_next_sweep and self._waits_for_sweep[layer]:
                return
            self._sent.append(_Sent(layer, self._send(layer)))
            self._next_layer += 1
