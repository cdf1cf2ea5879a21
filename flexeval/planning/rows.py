"""What one packed row of a sweep is made of, in plain integers. Knows spans and offsets; neither tensors nor policy.

A row is the unit of computation: new tokens of several sequences, back to back, without padding. *Fresh* spans are
nodes of the prefix tree on their first pass; a *decode* span is one new token of each sequence of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer]
SHARED = -1
"""Stands for a group where the log of nodes is meant that several sequences share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshSpan:
    """A node computed for the first time: its tokens attend to each other causally."""

    node: int
    """Index in the prefix tree."""
    start: int
    """First of its tokens in the row."""
    length: int
    """Its tokens."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeSpan:
    """One new token for each of some sequences whose own KV lies in one log."""

    group: int
    """The group whose log it is; the new tokens' KV is appended to it."""
    start: int
    """First of its tokens in the row."""
    log_length: int
    """Tokens in the log before this step."""
    own_tokens: Sequence[Integers]
    """Per sequence, where in the log its own context lies, in order, the new token last."""
    first_own_positions: Sequence[int]
    """Per sequence, the position of the first token of that context."""
    version: int
    """The same as in the group's last step if nothing but one token has been appended to each context since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySource:
    """Where the KV of an ancestor is found while a row is computed: exactly one of three places."""

    row_start: int | None = None
    """In this very row, from this token on."""
    scratch_node: int | None = None
    """Left at this layer by an earlier row of the sweep, under this node."""
    group: int | None = None
    """In the log of this group, ..."""
    log_start: int = 0
    """... from this token on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AncestorSpan:
    """Consecutive tokens of a row that all descend from one node and see all of its tokens."""

    start: int
    """First of the tokens in the row."""
    length: int
    """How many."""
    num_keys: int
    """Tokens of the ancestor."""
    first_key_position: int
    """Position of its first token."""
    last_position: int
    """The highest position of the row's tokens."""
    source: KeySource
    """Where its KV is."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compaction:
    """A log is rewritten, before the row reads it, to hold just the tokens that are still needed."""

    group: int
    """Whose log."""
    log_length: int
    """Tokens in it until now."""
    places: Integers
    """Where the tokens lie that stay, in ascending order; token i of them moves to place i."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Tokens of a row whose KV is appended to the log of a group."""

    group: int
    """Whose log."""
    log_start: int
    """Where in the log the first of them goes."""
    spans: tuple[tuple[int, int], ...]
    """(first token in the row, how many), in order."""

    @property
    def num_tokens(self) -> int:
        """Tokens appended."""
        return sum(length for _, length in self.spans)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """Log-probabilities to read off, entry by entry."""

    offsets: Integers
    """Token of the row whose logits are read, in ascending order."""
    token_ids: Integers
    """Whose log-probability after it."""
    places: Integers
    """Where that token lies among the tokens of all nodes, as in `PrefixTree.bounds`."""

    def __len__(self) -> int:
        return len(self.offsets)


NO_SCORES = Scores(**{name: np.zeros(0, dtype=np.int64) for name in ("offsets", "token_ids", "places")})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowPlan:
    """Everything about one row that does not depend on the layer."""

    token_ids: Integers
    """New tokens."""
    positions: Integers
    """Position of each in its own sequence."""
    fresh: tuple[FreshSpan, ...] = ()
    """Nodes on their first pass."""
    decode: tuple[DecodeSpan, ...] = ()
    """Sequences that generate."""
    ancestors: tuple[AncestorSpan, ...] = ()
    """What they see before their own context."""
    compactions: tuple[Compaction, ...] = ()
    """Logs to rewrite first."""
    keeps: tuple[Keep, ...] = ()
    """KV to keep beyond this sweep."""
    scratch: tuple[FreshSpan, ...] = ()
    """Nodes whose KV later rows of this sweep need."""
    scores: Scores = NO_SCORES
    """Log-probabilities of prompt tokens to read off."""
    generators: tuple[tuple[int, int], ...] = ()
    """(token of the row, request): where the next token of a request is drawn, in ascending order of the tokens."""

    @property
    def num_tokens(self) -> int:
        """New tokens of the row."""
        return len(self.token_ids)
