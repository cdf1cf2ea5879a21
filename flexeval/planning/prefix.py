"""A token prefix tree: what prompts share is computed once. Knows token ids; not what they mean or cost.

Few-shot headers are most of a benchmark's prompt tokens. Each node of the tree is a run of tokens that is computed
once; a prompt is the path from a root to a node. (Hydragen, Juravsky et al. 2024; RadixAttention, Zheng et al. 2024.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from flexeval.planning.rows import Integers

MIN_SAVED_TOKENS = 32
"""A shared run becomes a node of its own only where it saves this many tokens; attention per node costs too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A run of tokens that follows its parent's."""

    parent: int | None
    """Index of the node before it, or None where a prompt begins."""
    first_position: int
    """Position of its first token in every prompt that holds it."""
    token_ids: tuple[int, ...]
    """Its tokens, at least one."""
    prompts: tuple[int, ...]
    """The prompts that end with its last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixTree:
    """Every prompt as a path through shared nodes."""

    nodes: tuple[Node, ...]
    """Depth first: a node comes after its parent, and its descendants follow it without a gap."""
    num_asked_tokens: int
    """Tokens of all prompts."""

    @property
    def num_computed_tokens(self) -> int:
        """Tokens of all nodes."""
        return sum(len(node.token_ids) for node in self.nodes)

    def bounds(self) -> Integers:
        """Where each node's tokens begin if those of all nodes lie back to back, and where the last node's end."""
        return np.cumsum([0, *(len(node.token_ids) for node in self.nodes)])

    def path(self, node: int) -> list[int]:
        """The nodes from the root to `node`, both included."""
        path = [node]
        while (parent := self.nodes[path[-1]].parent) is not None:
            path.append(parent)
        return path[::-1]


def build_tree(
    prompts: Sequence[Sequence[int]],
    *,
    max_node_tokens: int,
    min_saved_tokens: int = MIN_SAVED_TOKENS,
    ranks: Sequence[int] | None = None,
    is_apart: bool = False,
) -> PrefixTree:
    """The prefix tree of `prompts` (each of at least one token).

    Args:
        prompts: Token ids; equal prompts end in the same node.
        max_node_tokens: A longer run becomes a chain of nodes, so that any one fits a row.
        min_saved_tokens: What a shared run must save at least.
        ranks: Of each prompt; of the branches of a node, the one that holds the highest rank comes first.
        is_apart: Nothing is shared: every prompt is a chain of nodes of its own, an equal one as well.
    """
    assert all(prompts), "a prompt has at least one token"
    if is_apart:
        return _chains(prompts, max_node_tokens, ranks)
    arrays = [np.array(prompt, dtype=np.uint32) for prompt in prompts]
    keys = [array.astype(">u4").tobytes() for array in arrays]  # bytes sort as the tokens do
    order = sorted(range(len(prompts)), key=keys.__getitem__)
    ordered = [prompts[index] for index in order]
    shared = np.array([0, *(_common_length(arrays[a], arrays[b]) for a, b in pairwise(order))], dtype=np.int64)
    rank = np.array([0 if ranks is None else ranks[index] for index in order])
    nodes: list[Node] = []
    add = partial(_add, nodes, max_node_tokens)

    # Each entry: prompts [low, high) in sorted order, which share their first `done` tokens, all in `parent`'s path.
    pending: list[tuple[int, int, int, int | None]] = [(0, len(ordered), 0, None)] if prompts else []
    while pending:
        low, high, done, parent = pending.pop()
        common = int(shared[low + 1 : high].min()) if high - low > 1 else len(ordered[low])
        bounds = [low, *(low + 1 + np.flatnonzero(shared[low + 1 : high] == common)).tolist(), high]
        num_ending = next((i for i in range(low, high) if len(ordered[i]) > common), high) - low
        branches = [(a, b) for a, b in pairwise(bounds) if a >= low + num_ending]
        branches.sort(key=lambda branch: -rank[branch[0] : branch[1]].max())
        num_users = len(branches) + (num_ending > 0)
        if common > done and (num_users == 1 or (num_users - 1) * (common - done) >= min_saved_tokens):
            ending = [order[i] for i in range(low, low + num_ending)]
            parent, done = add(parent, done, ordered[low][done:common], ending), common
        elif num_ending:
            add(parent, done, ordered[low][done:common], [order[i] for i in range(low, low + num_ending)])
        pending.extend((a, b, done, parent) for a, b in reversed(branches))
    return PrefixTree(nodes=tuple(nodes), num_asked_tokens=sum(map(len, prompts)))


def _chains(prompts: Sequence[Sequence[int]], max_node_tokens: int, ranks: Sequence[int] | None) -> PrefixTree:
    nodes: list[Node] = []
    for index in sorted(range(len(prompts)), key=lambda index: 0 if ranks is None else -ranks[index]):
        _add(nodes, max_node_tokens, None, 0, prompts[index], [index])
    return PrefixTree(nodes=tuple(nodes), num_asked_tokens=sum(map(len, prompts)))


def _add(
    nodes: list[Node],
    max_node_tokens: int,
    parent: int | None,
    first: int,
    tokens: Sequence[int],
    ending: Sequence[int],
) -> int:
    """Add a run of tokens below `parent`, from position `first` on; the index of its last node."""
    for start in range(0, len(tokens), max_node_tokens):
        part = tuple(tokens[start : start + max_node_tokens])
        is_last = start + max_node_tokens >= len(tokens)
        nodes.append(
            Node(
                parent=parent,
                first_position=first + start,
                token_ids=part,
                prompts=tuple(sorted(ending)) if is_last else (),
            )
        )
        parent = len(nodes) - 1
    assert parent is not None
    return parent


def _common_length(a: npt.NDArray[np.uint32], b: npt.NDArray[np.uint32]) -> int:
    """Length of the longest common prefix."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    place = int(differs.argmax())
    return place if differs[place] else length
