"""Prompts get the scores of the nodes on their path, and share what they hold of them."""

from __future__ import annotations

import numpy as np

from flexeval.engine.compute.readout import Tokens
from flexeval.engine.prompt_scores import PromptScores
from flexeval.planning.prefix import build_tree
from flexeval.planning.scores import Ending, ScoreTable

HEADER = list(range(40))
TREE = build_tree([[*HEADER, 1, 2], [*HEADER, 3], [7]], max_node_tokens=100)
ROOT, LONG, SHORT, LONE = range(4)
LEFT, RIGHT = Ending(SHORT, 8), Ending(SHORT, 9)
ENDINGS = {LEFT: 0, RIGHT: 1}
"""At the places after those of the tree's 44 tokens."""


def recorded(num_top: int) -> PromptScores:
    """Each token's log-probability is minus its place; read off in two rows."""
    prompts = PromptScores(TREE, ENDINGS)
    table = ScoreTable(TREE, is_scored=[True, True, True, False], endings=ENDINGS)
    for row in (range(1), range(1, 3)):
        scores = table.of(row)
        scored = Tokens.zeros(len(scores), num_top, 3)
        scored.kept_ids_NC[:] = scores.places[:, None]
        scored.logprobs_N[:] = -scores.places
        scored.top_ids_NK[:] = scores.token_ids[:, None] + np.arange(num_top)
        prompts.record(scores, scored)
    return prompts


def test_a_path_is_its_nodes_one_after_the_other() -> None:
    prompts = recorded(num_top=2)
    assert prompts.logprobs([ROOT, LONG]) == tuple(-place for place in range(42))
    assert prompts.logprobs([ROOT, SHORT]) == (*(-place for place in range(40)), -42)
    tops = prompts.tops([ROOT, SHORT])
    assert tops[0] == () and tops[1:] == [((token, 0.0), (token + 1, 0.0)) for token in (*HEADER[1:], 3)]


def test_what_is_kept_of_a_path_begins_after_its_first_token() -> None:
    kept = recorded(num_top=0).kept([ROOT, SHORT])
    assert kept.token_ids_NC[:, 2].tolist() == [*range(1, 40), 42] and kept.logprobs_NC.shape == (40, 3)


def test_prompts_share_what_they_hold_of_a_header() -> None:
    prompts = recorded(num_top=2)
    one, other = prompts.tops([ROOT, LONG]), prompts.tops([ROOT, SHORT])
    assert all(a is b for a, b in zip(one[:40], other[:40], strict=True))
    pairs = zip(prompts.logprobs([ROOT, LONG])[:40], prompts.logprobs([ROOT, SHORT])[:40], strict=True)
    assert all(a is b for a, b in pairs)


def test_endings_are_read_after_their_nodes() -> None:
    prompts = recorded(num_top=1)
    for place, ending in ((44, LEFT), (45, RIGHT)):
        path = [ROOT, SHORT, ending]
        assert prompts.logprobs(path) == (*(-place for place in range(40)), -42, -place)
        assert prompts.tops(path)[-2:] == [((3, 0.0),), ((ending.token_id, 0.0),)]
        assert prompts.kept(path).token_ids_NC[:, 2].tolist() == [*range(1, 40), 42, place]
        assert prompts.are_finite(path)


def test_a_lone_token_has_no_score() -> None:
    nothing = PromptScores(TREE, {})
    assert (nothing.logprobs([LONE]), nothing.tops([LONE])) == ((0.0,), [()])
    assert (recorded(2).logprobs([LONE]), recorded(2).tops([LONE])) == ((0.0,), [()])
