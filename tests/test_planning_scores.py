"""Every wanted log-probability is read once, after the token before it, in whichever rows the nodes are computed."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from flexeval.planning.prefix import PrefixTree, build_tree
from flexeval.planning.scores import Ending, ScoreTable
from flexeval.planning.usage import NodeUsage

Prefix = tuple[int, ...]
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=12)


def prefixes(tree: PrefixTree) -> list[Prefix]:
    """What the prompts spell out up to each token, at its place."""
    found: list[Prefix] = []
    for node in range(len(tree.nodes)):
        *above, own = [tree.nodes[step].token_ids for step in tree.path(node)]
        start = sum(above, ())
        found += [start + own[: length + 1] for length in range(len(own))]
    return found


@given(
    PROMPTS,
    st.integers(1, 12),
    st.sets(st.integers(0, 11)),
    st.sets(st.integers(0, 40)),
    st.sets(st.tuples(st.integers(0, 11), st.integers(3, 4))),
)
def test_each_token_is_scored_once_after_the_one_before_it(
    prompts: list[list[int]], room: int, scored: set[int], cuts: set[int], last: set[tuple[int, int]]
) -> None:
    """Endings as well, which are other tokens than those of nodes."""
    tree = build_tree(prompts, max_node_tokens=room, min_saved_tokens=1)
    is_scored = NodeUsage(tree, is_generating=[False] * len(prompts)).mark(scored)
    leaf = {prompt: node for node, entry in enumerate(tree.nodes) for prompt in entry.prompts}
    endings = sorted({Ending(leaf[prompt], token) for prompt, token in last if prompt < len(prompts)})
    table = ScoreTable(tree, is_scored=is_scored, endings=endings)
    bounds, spelled = tree.bounds(), prefixes(tree)
    assert len(spelled) == bounds[-1] == tree.num_computed_tokens
    after = [(*spelled[bounds[ending.node + 1] - 1], ending.token_id) for ending in endings]
    read: list[Prefix] = []
    for first, stop in pairwise(sorted({0, *(cut for cut in cuts if cut < len(is_scored)), len(is_scored)})):
        scores = table.of(range(first, stop))
        offsets = scores.offsets.tolist()
        assert offsets == sorted(offsets)
        row = spelled[bounds[first] : bounds[stop]]
        for offset, token_id, place in zip(offsets, scores.token_ids.tolist(), scores.places.tolist(), strict=True):
            assert (*row[offset], token_id) == (spelled + after)[place]
            read.append((spelled + after)[place])
    asked = {tuple(prompts[i][:length]) for i in scored if i < len(prompts) for length in range(2, len(prompts[i]) + 1)}
    assert sorted(read) == sorted([*asked, *after]), "each once, but the first tokens, which nothing stands before"
