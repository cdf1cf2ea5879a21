"""The prefix tree: every prompt is its path, shared runs are computed once, depth does not matter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexeval.planning.prefix import PrefixTree, build_tree

Prompts = list[list[int]]
# Few different tokens: many prefixes are shared.
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=24)
ROOMS = st.integers(1, 12)
THRESHOLDS = st.integers(1, 20)


def trie_of(prompts: Prompts) -> set[tuple[int, ...]]:
    """Every distinct prefix: the nodes of a plain trie, one token each."""
    return {tuple(prompt[:length]) for prompt in prompts for length in range(1, len(prompt) + 1)}


def num_forks(prompts: Prompts) -> int:
    """Places of the trie where prompts part, or where one ends and another goes on."""
    trie, ends = trie_of(prompts), {tuple(prompt) for prompt in prompts}
    users = dict.fromkeys(trie | {()}, 0)
    for prefix in trie:
        users[prefix[:-1]] += 1
    for end in ends:
        users[end] += 1
    return sum(count > 1 for count in users.values())


def tokens_of(tree: PrefixTree, node: int) -> list[int]:
    return [token for step in tree.path(node) for token in tree.nodes[step].token_ids]


@given(PROMPTS, ROOMS, THRESHOLDS)
def test_every_prompt_is_its_path(prompts: Prompts, room: int, threshold: int) -> None:
    tree = build_tree(prompts, max_node_tokens=room, min_saved_tokens=threshold)
    ends = {prompt: index for index, node in enumerate(tree.nodes) for prompt in node.prompts}
    assert sorted(prompt for node in tree.nodes for prompt in node.prompts) == list(range(len(prompts)))
    assert all(tokens_of(tree, ends[index]) == prompt for index, prompt in enumerate(prompts))
    for index, node in enumerate(tree.nodes):
        assert 1 <= len(node.token_ids) <= room
        assert node.first_position == len(tokens_of(tree, index)) - len(node.token_ids)
    assert tree.num_asked_tokens == sum(map(len, prompts))
    assert tree.num_computed_tokens <= tree.num_asked_tokens


@given(PROMPTS, ROOMS, THRESHOLDS)
def test_descendants_follow_without_a_gap(prompts: Prompts, room: int, threshold: int) -> None:
    tree = build_tree(prompts, max_node_tokens=room, min_saved_tokens=threshold)
    last = list(range(len(tree.nodes)))
    for index, node in reversed(list(enumerate(tree.nodes))):
        if node.parent is not None:
            assert node.parent < index
            last[node.parent] = max(last[node.parent], last[index])
    for index, end in enumerate(last):
        assert all(index in tree.path(node) for node in range(index, end + 1))


@given(PROMPTS, ROOMS)
def test_without_a_threshold_it_computes_what_a_trie_does(prompts: Prompts, room: int) -> None:
    tree = build_tree(prompts, max_node_tokens=room, min_saved_tokens=1)
    assert tree.num_computed_tokens == len(trie_of(prompts))


@given(PROMPTS, ROOMS, THRESHOLDS)
def test_a_fork_not_taken_costs_less_than_the_threshold(prompts: Prompts, room: int, threshold: int) -> None:
    tree = build_tree(prompts, max_node_tokens=room, min_saved_tokens=threshold)
    extra = tree.num_computed_tokens - len(trie_of(prompts))
    assert 0 <= extra <= num_forks(prompts) * (threshold - 1)


@pytest.mark.parametrize(("shared", "num_nodes", "num_tokens"), [(31, 2, 64), (32, 3, 34)])
def test_a_shared_run_is_a_node_where_it_saves_enough(shared: int, num_nodes: int, num_tokens: int) -> None:
    header = [7] * shared
    tree = build_tree([[*header, 1], [*header, 2]], max_node_tokens=100, min_saved_tokens=32)
    assert (len(tree.nodes), tree.num_computed_tokens) == (num_nodes, num_tokens)


def test_equal_prompts_end_in_one_node() -> None:
    tree = build_tree([[1, 2], [3], [1, 2], [1, 2]], max_node_tokens=8)
    assert [(node.token_ids, node.prompts) for node in tree.nodes] == [((1, 2), (0, 2, 3)), ((3,), (1,))]


def test_a_prompt_that_is_the_header_of_others_ends_inside() -> None:
    tree = build_tree([[1, 1, 5], [1, 1], [1, 1, 6]], max_node_tokens=8, min_saved_tokens=1)
    assert [(node.parent, node.token_ids, node.prompts) for node in tree.nodes] == [
        (None, (1, 1), (1,)),
        (0, (5,), (0,)),
        (0, (6,), (2,)),
    ]


def test_nothing_asked_is_nothing_planned() -> None:
    assert build_tree([], max_node_tokens=8) == PrefixTree(nodes=(), num_asked_tokens=0)


def test_an_empty_prompt_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="at least one token"):
        build_tree([[1], []], max_node_tokens=8)


def test_depth_is_no_matter_of_the_call_stack() -> None:
    tokens = tuple(range(10_000))
    chain = build_tree([tokens], max_node_tokens=1)
    assert tokens_of(chain, 9_999) == list(tokens)
    nested = build_tree([tokens[:length] for length in range(1, 3_001)], max_node_tokens=8, min_saved_tokens=1)
    assert nested.path(2_999) == list(range(3_000)), "each prompt is the parent of the next"
    assert nested.num_computed_tokens == 3_000
