"""Append-only logs of KV, and what is forgotten of them. Knows places in logs; neither tensors nor when anything runs.

A log is written from its end on. Where it crosses a link or comes from disk it is read from its beginning, so that both
are one run of bytes; where it is attended to in place, only what is needed is read. What nobody needs any more is
squeezed out by a *compaction*: the places still needed move up, in their order. (The copying of log-structured stores:
Rosenblum and Ousterhout 1991.)
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flexeval.planning.rows import SHARED, Compaction

Places = npt.NDArray[np.int32]


WRITE_WEIGHT = 0.5
"""What writing a token of a log costs beside reading it: decoding writes little, and that way is free meanwhile."""


class Crossing(NamedTuple):
    """At which share of the layers logs come to where they are read, instead of being read in place."""

    read: float
    """In a sweep that reads them."""
    rewritten: float
    """In one that compacts them: a CPU that attends beside a GPU reads in place, but rewrites nothing."""


FILLED_SHARE = 0.8
"""Of a log that is shorter than its sequences could come to need, the part that is promised to them. The rest is for
what is forgotten: a compaction then moves at most four tokens for each that comes after it."""

EVERYWHERE = Crossing(1.0, 1.0)
"""None is read in place."""


@dataclass(slots=True)
class Seat:
    """A generating sequence in a group: where in the group's log its own context lies."""

    stream: int
    """Whose."""
    leaf: int
    """Node at which its prompt ends."""
    above: int | None
    """The last node of its prompt that others share, or None."""
    first_position: int
    """Position of the first token of its own context."""
    places: Places
    """Where each token of that context lies, with room for all that it can become."""
    num_prompt_tokens: int
    """Tokens of its prompt that are its own."""
    length: int = 0
    """Tokens that lie in the log."""

    @property
    def is_stepping(self) -> bool:
        """Whether its prompt has been computed before this sweep."""
        return self.length >= self.num_prompt_tokens

    @property
    def own_places(self) -> Places:
        """Where its tokens lie."""
        return self.places[: self.length]

    def append(self, start: int, num_tokens: int) -> None:
        """Its next tokens lie from `start` on."""
        self.places[self.length : self.length + num_tokens] = np.arange(start, start + num_tokens, dtype=np.int32)
        self.length += num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One new token of each sequence of a group."""

    group: int
    """The group."""
    log_length: int
    """Tokens in its log before."""
    version: int
    """See `GroupLog.version`."""
    seats: list[Seat]
    """The sequences; the new token lies last in each context."""


@dataclass(slots=True)
class GroupLog:
    """The sequences that decode together, and their log."""

    group: int
    """Its name."""
    num_seats: int
    """Sequences at most."""
    capacity: int
    """Tokens of its log at most."""
    num_promisable: int
    """Of these, the ones that its sequences can come to need: no more of them are taken in."""
    crossing: Crossing = EVERYWHERE
    """Where it is read in place, and where not."""
    seats: list[Seat] = field(default_factory=list)
    """In the order of their leaves, so that descendants of a node are neighbours."""
    length: int = 0
    """Tokens in the log, needed or not."""
    version: int = 0
    """Counts the steps at which more has changed than one token appended to each context: members, places."""
    _promised: dict[int, int] = field(default_factory=dict)  # tokens that each sequence can come to need
    _num_promised: int = 0
    _wasted: float = 0  # tokens read for nothing since the last compaction, at each layer in the mean
    _last_streams: tuple[int, ...] = ()  # that stepped together

    @property
    def stepping(self) -> list[Seat]:
        """The sequences whose next token is computed in a sweep."""
        return [seat for seat in self.seats if seat.is_stepping]

    def has_room(self, num_tokens: int) -> bool:
        """Whether another sequence of so many tokens can be taken in."""
        fits = self._num_promised + num_tokens <= self.num_promisable
        return len(self._promised) < self.num_seats and fits

    def promise(self, stream: int, num_tokens: int) -> None:
        """Keep a seat, and so many tokens, for a sequence that enters later."""
        assert self.has_room(num_tokens), (self.group, self._promised, num_tokens)
        self._promised[stream] = num_tokens
        self._num_promised += num_tokens

    def enter(self, seat: Seat) -> None:
        """Take a sequence in, for which a seat is kept."""
        assert self._promised[seat.stream] == len(seat.places), (self.group, seat)
        insort(self.seats, seat, key=lambda seat: (seat.leaf, seat.stream))

    def leave(self, stream: int) -> None:
        """Forget a sequence, whether it has entered or not."""
        self._num_promised -= self._promised.pop(stream)
        self.seats = [seat for seat in self.seats if seat.stream != stream]

    def begin_sweep(self, num_entering: int) -> Compaction | None:
        """Make room for a step of every sequence and for `num_entering` tokens of prompts.

        A sweep reads the whole log wherever it crosses. It is compacted as soon as the tokens read for nothing weigh as
        much as those that a compaction reads and writes beside them (renting skis: Karlin et al. 1988).
        """
        num_needed = sum(seat.length for seat in self.seats)
        stepping = self.stepping
        if not num_needed:
            self.length = self._wasted = 0
        num_dead = self.length - num_needed
        if stepping:
            self._wasted += self.crossing.read * num_dead
        is_full = self.length + len(stepping) + num_entering > self.capacity
        read, rewritten = self.crossing
        price = (rewritten - read) * self.length + WRITE_WEIGHT * rewritten * num_needed
        if not num_dead or not (is_full or (stepping and self._wasted >= price > 0)):
            return None
        kept = np.sort(np.concatenate([seat.own_places for seat in self.seats]))
        compaction = Compaction(group=self.group, log_length=self.length, places=kept)
        for seat in self.seats:
            seat.own_places[:] = np.searchsorted(kept, seat.own_places)
        self.length, self._wasted = num_needed, 0
        self.version += 1
        return compaction

    def step(self) -> Step:
        """One token more for every sequence whose prompt is computed."""
        seats, log_length = self.stepping, self.length
        streams = tuple(seat.stream for seat in seats)
        if streams != self._last_streams:
            self._last_streams = streams
            self.version += 1
        for seat in seats:
            self.append(seat, 1)
        return Step(group=self.group, log_length=log_length, version=self.version, seats=seats)

    def append(self, seat: Seat, num_tokens: int) -> None:
        """The next tokens of a sequence go to the end of the log."""
        seat.append(self.length, num_tokens)
        self.length += num_tokens
        assert self.length <= self.capacity, (self.group, self.length, self.capacity)


class SharedLog:
    """The log of nodes that outlive their sweep for several sequences."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        """Tokens at most."""
        self.length = 0
        """Tokens in the log, needed or not."""
        self.starts: dict[int, int] = {}
        """Where the KV of each node begins."""
        self._sizes: dict[int, int] = {}

    def begin_sweep(self, num_entering: int) -> Compaction | None:
        """Make room for `num_entering` tokens."""
        if not self.starts:
            self.length = 0
        if self.length + num_entering <= self.capacity:
            return None
        nodes = sorted(self.starts, key=self.starts.__getitem__)
        kept = [np.arange(self.starts[node], self.starts[node] + self._sizes[node], dtype=np.int32) for node in nodes]
        compaction = Compaction(group=SHARED, log_length=self.length, places=np.concatenate(kept))
        self.length = 0
        for node in nodes:
            self.append(node, self._sizes[node])
        return compaction

    def append(self, node: int, num_tokens: int) -> None:
        """Keep a node."""
        self.starts[node], self._sizes[node] = self.length, num_tokens
        self.length += num_tokens
        assert self.length <= self.capacity, (node, self.length, self.capacity)

    def forget(self, node: int) -> None:
        """Nobody needs a node any more; it may not have been kept."""
        self.starts.pop(node, None)
