"""Which log-probabilities of a prefix tree are wanted, and after which token each is read. Knows places of tokens only.

A token's *place* counts the tokens of all nodes, back to back. Its log-probability is read off the logits after the
token before it: the one at the place before, or for the first of a node the last of its parent. After all of them come
the places of *endings*: last tokens of prompts that are only scored, which are in no node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from flexeval.planning.prefix import PrefixTree
from flexeval.planning.rows import Scores
from flexeval.planning.streams import Stream


class Ending(NamedTuple):
    """A token that is scored after a node and is not computed."""

    node: int
    token_id: int


def find_endings(streams: Sequence[Stream], leaf: Mapping[int, int]) -> dict[Ending, int]:
    """The endings of all streams, numbered; `leaf` is the node where each stream's prompt ends."""
    endings = (Ending(leaf[index], token) for index, one in enumerate(streams) for token in one.last_ids.values())
    return {ending: number for number, ending in enumerate(dict.fromkeys(endings))}


class ScoreTable:
    """Everything that is to be scored in one batch of prompts, in the order in which it is read."""

    def __init__(self, tree: PrefixTree, *, is_scored: Sequence[bool], endings: Iterable[Ending] = ()):
        """List the endings, and all tokens of the nodes that `is_scored` marks but those that begin a prompt."""
        self._bounds = bounds = tree.bounds()
        scored = np.flatnonzero(is_scored)
        nodes = [tree.nodes[node] for node in scored]
        places = np.flatnonzero(np.repeat(np.array(is_scored, dtype=np.bool_), np.diff(bounds)))
        token_ids = np.fromiter(chain.from_iterable(node.token_ids for node in nodes), np.int64, count=len(places))
        above = np.array([-1 if node.parent is None else node.parent for node in nodes], dtype=np.int64)
        before = places - 1
        before[np.searchsorted(places, bounds[scored])] = bounds[above + 1] - 1  # -1 where a prompt begins
        ends = np.array([*endings], dtype=np.int64).reshape(-1, 2)
        before = np.concatenate([before, bounds[ends[:, 0] + 1] - 1])
        places = np.concatenate([places, bounds[-1] + np.arange(len(ends))])
        token_ids = np.concatenate([token_ids, ends[:, 1]])
        order = np.argsort(before, kind="stable")[np.count_nonzero(before < 0) :]
        self._before, self._places, self._token_ids = before[order], places[order], token_ids[order]

    def of(self, row: range) -> Scores:
        """What is read off a row of nodes: in them, after them, and at the start of their children."""
        first, stop = self._bounds[[row.start, row.stop]]
        own = slice(*np.searchsorted(self._before, (first, stop)))
        return Scores(offsets=self._before[own] - first, token_ids=self._token_ids[own], places=self._places[own])
