"""Groups: nodes of the prefix tree that enter the engine together. Knows sizes; not tensors, nor when a group runs.

A group's kept KV is one log. Its nodes are computed in packed rows; its sequences decode together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexeval.planning.prefix import PrefixTree


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Consecutive nodes of the tree."""

    first_node: int
    """Index of its first node."""
    rows: tuple[tuple[int, ...], ...]
    """Its nodes in order, packed into rows of bounded length."""
    num_tokens: int
    """Tokens of its nodes."""
    sequences: tuple[int, ...]
    """Requests that end in its nodes and go on generating, in the order of their nodes."""
    depends_on: frozenset[int]
    """Earlier groups that hold ancestors of its nodes."""


def make_groups(
    tree: PrefixTree, *, is_decoding: Sequence[bool], row_tokens: int, group_tokens: int, group_sequences: int
) -> list[Group]:
    """Cut the tree, depth first, into groups.

    Args:
        tree: What is to be computed; no node is longer than `row_tokens`.
        is_decoding: Per request, whether it generates after its first forward pass.
        row_tokens: Tokens of a row at most.
        group_tokens: Tokens of a group at most.
        group_sequences: Decoding sequences of a group at most; only a node where more prompts end exceeds it.
    """
    groups: list[Group] = []
    lineage: list[frozenset[int]] = []  # per node, the groups that hold it and its ancestors
    rows: list[list[int]] = []
    sequences: list[int] = []
    num_tokens = row_size = 0

    def close() -> None:
        nonlocal rows, sequences, num_tokens, row_size
        members = [node for row in rows for node in row]
        groups.append(
            Group(
                first_node=members[0],
                rows=tuple(tuple(row) for row in rows),
                num_tokens=num_tokens,
                sequences=tuple(sequences),
                depends_on=frozenset().union(*{lineage[node] for node in members}) - {len(groups)},
            )
        )
        rows, sequences, num_tokens, row_size = [], [], 0, 0

    for index, node in enumerate(tree.nodes):
        size = len(node.token_ids)
        assert size <= row_tokens, (size, row_tokens)
        decoding = [prompt for prompt in node.prompts if is_decoding[prompt]]
        if rows and (num_tokens + size > group_tokens or len(sequences) + len(decoding) > group_sequences):
            close()
        if not rows or row_size + size > row_tokens:
            rows.append([])
            row_size = 0
        rows[-1].append(index)
        row_size += size
        num_tokens += size
        sequences += decoding
        inherited = lineage[node.parent] if node.parent is not None else frozenset[int]()
        lineage.append(inherited if len(groups) in inherited else inherited | {len(groups)})
    if rows:
        close()
    return groups
