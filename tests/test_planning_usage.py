"""Who uses a node, and the room that is held for it: against counts over the prompts themselves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexeval.planning.prefix import PrefixTree, build_tree
from flexeval.planning.usage import PATHS_IN_FLIGHT, NodeUsage

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=24)


@st.composite
def used_trees(draw: st.DrawFn) -> tuple[PrefixTree, list[bool], NodeUsage]:
    """(tree, which prompts generate, their usage)."""
    prompts = draw(PROMPTS)
    is_generating = draw(st.lists(st.booleans(), min_size=len(prompts), max_size=len(prompts)))
    tree = build_tree(prompts, max_node_tokens=draw(st.integers(1, 12)), min_saved_tokens=draw(st.integers(1, 4)))
    return tree, is_generating, NodeUsage(tree, is_generating=is_generating)


def users(tree: PrefixTree) -> list[set[int]]:
    """The prompts that run through each node, path by path."""
    through: list[set[int]] = [set() for _ in tree.nodes]
    for leaf, entry in enumerate(tree.nodes):
        for node in tree.path(leaf):
            through[node] |= set(entry.prompts)
    return through


@given(used_trees())
def test_users_and_descendants(used: tuple[PrefixTree, list[bool], NodeUsage]) -> None:
    tree, is_generating, usage = used
    for node, prompts in enumerate(users(tree)):
        assert usage.num_users[node] == len(prompts)
        assert usage.is_generating[node] == any(is_generating[prompt] for prompt in prompts)
        descendants = [other for other in range(len(tree.nodes)) if node in tree.path(other)]
        assert descendants == list(range(node, usage.last_descendant[node] + 1))
        assert usage.is_owned(node) == (len(prompts) == 1 and usage.is_generating[node])


@given(used_trees())
def test_own_tokens_are_those_of_no_other_prompt(used: tuple[PrefixTree, list[bool], NodeUsage]) -> None:
    tree, _, usage = used
    through = users(tree)
    for leaf, entry in enumerate(tree.nodes):
        alone = [node for node in tree.path(leaf) if len(through[node]) == 1]
        if len(entry.prompts) == 1:
            assert usage.num_own[leaf] == sum(len(tree.nodes[node].token_ids) for node in alone)
        if alone and entry.prompts:
            left = [usage.num_left[node] for node in alone]
            sizes = [len(tree.nodes[node].token_ids) for node in alone]
            assert left == [sum(sizes[index:]) for index in range(len(sizes))]


@given(PROMPTS, st.data())
def test_room_does_not_depend_on_how_runs_are_cut(prompts: list[list[int]], data: st.DataObject) -> None:
    """The cost model counts on whole runs, the scheduler cuts them to fit rows."""
    is_generating = data.draw(st.lists(st.booleans(), min_size=len(prompts), max_size=len(prompts)))
    usages = [
        NodeUsage(build_tree(prompts, max_node_tokens=room, min_saved_tokens=2), is_generating=is_generating)
        for room in (12, data.draw(st.integers(1, 12)))
    ]
    assert len({(usage.generating_room(), usage.scoring_room()) for usage in usages}) == 1


def test_room_for_headers_by_hand() -> None:
    """Ten tasks with headers of 100, every second one of which only scores."""
    prompts = [[task, *range(100, 199), index] for task in range(10) for index in range(3)]
    is_generating = [prompt[0] % 2 == 0 for prompt in prompts]
    usage = NodeUsage(build_tree(prompts, max_node_tokens=64), is_generating=is_generating)
    assert usage.generating_room() == PATHS_IN_FLIGHT * 100
    assert usage.scoring_room() == 2 * 100
    assert usage.scoring_room(sweep_tokens=1) == 2 * 100, "one token follows a header"
    few = NodeUsage(build_tree(prompts[:6], max_node_tokens=64), is_generating=is_generating[:6])
    assert (few.generating_room(), few.scoring_room()) == (100, 100), "no more than there are"


def test_a_prompt_longer_than_a_sweep_is_held_between_two() -> None:
    usage = NodeUsage(build_tree([list(range(100))], max_node_tokens=8), is_generating=[False])
    assert (usage.scoring_room(), usage.scoring_room(sweep_tokens=100), usage.scoring_room(sweep_tokens=99)) == (
        0,
        0,
        100,
    )
