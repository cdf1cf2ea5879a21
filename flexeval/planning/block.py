"""The block: all sequences that generate at once, by group. Knows who sits where; not when a sweep runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexeval.planning.logs import Crossing, GroupLog, Seat
from flexeval.planning.prefix import PrefixTree
from flexeval.planning.streams import Stream
from flexeval.planning.usage import NodeUsage


class Block:
    """Groups of seats for generating sequences."""

    def __init__(
        self,
        streams: Sequence[Stream],
        tree: PrefixTree,
        usage: NodeUsage,
        *,
        group_sequences: int,
        num_groups: int,
        crossing: Crossing,
    ):
        """Make the groups, as many as are needed; each has room for the largest sequences there are."""
        self._streams = streams
        self._tree = tree
        self._usage = usage
        self._leaf = {stream: node for node, entry in enumerate(tree.nodes) for stream in entry.prompts}
        self._seats: dict[int, tuple[GroupLog, Seat]] = {}
        sizes = [self._size(index) for index, stream in enumerate(streams) if stream.is_generating]
        sizes.sort(reverse=True)
        self.groups: list[GroupLog] = []
        for index in range(num_groups):
            num_seats = min(group_sequences, len(sizes) - index * group_sequences)
            if num_seats > 0:
                capacity = sum(sizes[:num_seats])
                self.groups.append(GroupLog(group=index, num_seats=num_seats, capacity=capacity, crossing=crossing))
        self._num_seats = sum(group.num_seats for group in self.groups)

    @property
    def num_free(self) -> int:
        """Seats that nobody has."""
        return self._num_seats - len(self._seats)

    @property
    def num_stepping(self) -> int:
        """Sequences whose next token a sweep computes."""
        return sum(len(group.stepping) for group in self.groups)

    def __contains__(self, stream: int) -> bool:
        """Whether a stream has a seat."""
        return stream in self._seats

    def seat(self, stream: int) -> tuple[GroupLog, Seat]:
        """The seat of a stream, and its group."""
        return self._seats[stream]

    def enter(self, stream: int) -> None:
        """Give a stream the first free seat, so that the last groups are the first to be empty."""
        leaf = self._leaf[stream]
        num_own = self._usage.num_own[leaf]
        above: int | None = leaf
        while above is not None and self._usage.num_users[above] == 1:
            above = self._tree.nodes[above].parent
        group = next(group for group in self.groups if len(group.seats) < group.num_seats)
        seat = Seat(
            stream=stream,
            leaf=leaf,
            above=above,
            first_position=len(self._streams[stream].prompt_ids) - num_own,
            places=np.zeros(self._size(stream), dtype=np.int32),
            num_prompt_tokens=num_own,
        )
        group.enter(seat)
        self._seats[stream] = group, seat

    def leave(self, stream: int) -> None:
        """Free the seat of a stream, if it has one."""
        if stream in self._seats:
            group, _ = self._seats.pop(stream)
            group.leave(stream)

    def _size(self, stream: int) -> int:
        """Tokens that a sequence can come to keep: the last one drawn is never computed."""
        return self._usage.num_own[self._leaf[stream]] + self._streams[stream].max_tokens - 1
