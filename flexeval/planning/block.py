"""The block: all sequences that generate at once, by group. Knows who sits where; not when a sweep runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexeval.planning.logs import FILLED_SHARE, Crossing, GroupLog, Seat
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
        group_tokens: int,
        crossing: Crossing,
    ):
        """Make the groups, as many as are needed.

        Each has room for the largest sequences there are; with `group_tokens` for so many tokens, or the largest one.
        """
        self._streams = streams
        self._tree = tree
        self._usage = usage
        self._leaf = {stream: node for node, entry in enumerate(tree.nodes) for stream in entry.prompts}
        self._groups: dict[int, GroupLog] = {}  # of the streams for which a seat is kept
        self._seats: dict[int, Seat] = {}
        sizes = [self._size(index) for index, stream in enumerate(streams) if stream.is_generating]
        sizes.sort(reverse=True)
        self.groups: list[GroupLog] = []
        for index in range(num_groups):
            num_seats = min(group_sequences, len(sizes) - index * group_sequences)
            if num_seats > 0:
                capacity = num_promisable = sum(sizes[:num_seats])
                if 0 < group_tokens < capacity:
                    capacity = max(group_tokens, sizes[0])
                    num_promisable = max(int(FILLED_SHARE * group_tokens), sizes[0])
                group = GroupLog(
                    group=index,
                    num_seats=num_seats,
                    capacity=capacity,
                    num_promisable=num_promisable,
                    crossing=crossing,
                )
                self.groups.append(group)

    def __contains__(self, stream: int) -> bool:
        """Whether a stream has a seat."""
        return stream in self._seats

    def seat(self, stream: int) -> tuple[GroupLog, Seat]:
        """The seat of a stream, and its group."""
        return self._groups[stream], self._seats[stream]

    def keeps_seat(self, stream: int) -> bool:
        """Whether a seat is kept for a stream, or taken by it."""
        return stream in self._groups

    def has_room(self, stream: int) -> bool:
        """Whether a stream can have a seat."""
        size = self._size(stream)
        return stream in self._groups or any(group.has_room(size) for group in self.groups)

    def keep_seat(self, stream: int) -> None:
        """Keep the first free seat with room for a stream, so that the last groups are the first to be empty."""
        if stream not in self._groups:
            size = self._size(stream)
            group = next(group for group in self.groups if group.has_room(size))
            group.promise(stream, size)
            self._groups[stream] = group

    def enter(self, stream: int) -> None:
        """Give a stream its seat."""
        self.keep_seat(stream)
        leaf = self._leaf[stream]
        num_own = self._usage.num_own[leaf]
        above: int | None = leaf
        while above is not None and self._usage.num_users[above] == 1:
            above = self._tree.nodes[above].parent
        group = self._groups[stream]
        seat = Seat(
            stream=stream,
            leaf=leaf,
            above=above,
            first_position=len(self._streams[stream].prompt_ids) - num_own,
            places=np.zeros(self._size(stream), dtype=np.int32),
            num_prompt_tokens=num_own,
        )
        group.enter(seat)
        self._seats[stream] = seat

    def leave(self, stream: int) -> None:
        """Free the seat of a stream, if there is one for it."""
        if (group := self._groups.pop(stream, None)) is not None:
            group.leave(stream)
            self._seats.pop(stream, None)

    def _size(self, stream: int) -> int:
        """Tokens that a sequence can come to keep: the last one drawn is never computed."""
        return self._usage.num_own[self._leaf[stream]] + self._streams[stream].max_tokens - 1
