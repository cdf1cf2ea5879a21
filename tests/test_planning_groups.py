"""Groups: every node once and in order, within the limits, and knowing whom they depend on."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from flexeval.planning.groups import Group, make_groups
from flexeval.planning.prefix import PrefixTree, build_tree


@st.composite
def cut_trees(draw: st.DrawFn) -> tuple[PrefixTree, list[bool], int, int, list[Group]]:
    """(tree, which prompts generate, tokens of a group, sequences of a group, the groups)."""
    prompts = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=24))
    is_decoding = draw(st.lists(st.booleans(), min_size=len(prompts), max_size=len(prompts)))
    row_tokens, group_tokens, sequences = (draw(st.integers(low, high)) for low, high in ((2, 12), (2, 40), (1, 5)))
    tree = build_tree(prompts, max_node_tokens=row_tokens, min_saved_tokens=2)
    groups = make_groups(
        tree, is_decoding=is_decoding, row_tokens=row_tokens, group_tokens=group_tokens, group_sequences=sequences
    )
    assert all(sum(len(tree.nodes[node].token_ids) for node in row) <= row_tokens for g in groups for row in g.rows)
    return tree, is_decoding, group_tokens, sequences, groups


def nodes_of(group: Group) -> list[int]:
    return [node for row in group.rows for node in row]


@given(cut_trees())
def test_every_node_once_in_order(cut: tuple[PrefixTree, list[bool], int, int, list[Group]]) -> None:
    tree, is_decoding, _, _, groups = cut
    assert [node for group in groups for node in nodes_of(group)] == list(range(len(tree.nodes)))
    for group in groups:
        nodes = [tree.nodes[node] for node in nodes_of(group)]
        assert group.first_node == nodes_of(group)[0]
        assert group.num_tokens == sum(len(node.token_ids) for node in nodes)
        assert list(group.sequences) == [prompt for node in nodes for prompt in node.prompts if is_decoding[prompt]]


@given(cut_trees())
def test_groups_keep_to_the_limits_and_are_full(cut: tuple[PrefixTree, list[bool], int, int, list[Group]]) -> None:
    tree, _, group_tokens, num_sequences, groups = cut
    for group in groups:
        if len(nodes_of(group)) > 1:  # one node alone may be larger than a group
            assert group.num_tokens <= group_tokens
            assert len(group.sequences) <= num_sequences
    for group, following in pairwise(groups):
        next_node = following.first_node
        own = set(following.sequences) & set(tree.nodes[next_node].prompts)
        too_long = group.num_tokens + len(tree.nodes[next_node].token_ids) > group_tokens
        assert too_long or len(group.sequences) + len(own) > num_sequences, "the next node would have had room"


@given(cut_trees())
def test_a_group_depends_on_those_that_hold_ancestors(
    cut: tuple[PrefixTree, list[bool], int, int, list[Group]],
) -> None:
    tree, *_, groups = cut
    group_of = {node: index for index, group in enumerate(groups) for node in nodes_of(group)}
    for index, group in enumerate(groups):
        ancestors = {group_of[step] for node in nodes_of(group) for step in tree.path(node)}
        assert group.depends_on == ancestors - {index}
