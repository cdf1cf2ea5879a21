"""Rows of what models hold probable: one per position, the same key after the same tokens, and back from every form."""

import numpy as np
import pytest

from flexeval.distributions import (
    Answered,
    NewRows,
    contexts_after,
    from_json,
    gather,
    load,
    read_off,
    row_type,
    save,
    to_json,
)
from flexeval.request import FinishReason, TokenResult

NUM_TOP = 3
VOCABULARY = 12345


def result(prompt_ids, token_ids=(), *, scored=True, shift=0.0):
    """A made-up result: what stands at a position depends on its place and on `shift` alone."""
    places = range(1, len(prompt_ids))
    tops = [tuple((place * 10 + rank, -rank - 1.0 - shift) for rank in range(5)) for place in range(50)]
    return TokenResult(
        token_ids=tuple(token_ids),
        logprobs=tuple(-0.5 * len(prompt_ids) - i for i, _ in enumerate(token_ids)),
        finish_reason=FinishReason.LENGTH,
        top_logprobs=tuple(tops[len(prompt_ids) + i] for i, _ in enumerate(token_ids)),
        prompt_logprobs=(0.0, *(-0.5 * place for place in places)) if scored else (),
        prompt_top_logprobs=((), *(tops[place] for place in places)) if scored else (),
    )


def rows_of(prompt_ids, token_ids=(), **options):
    vocabulary = options.pop("vocabulary", VOCABULARY)
    return read_off(prompt_ids, result(prompt_ids, token_ids, **options), NUM_TOP, vocabulary=vocabulary)


def test_every_scored_and_drawn_token_is_a_row_but_the_first():
    rows = rows_of((7, 8, 9), (4, 5))
    assert rows["token"].tolist() == [8, 9, 4, 5]
    assert rows["is_drawn"].tolist() == [False, False, True, True]
    assert rows["logprob"].tolist() == [-0.5, -1.0, -1.5, -2.5]
    assert rows["top_tokens"].tolist() == [[10, 11, 12], [20, 21, 22], [30, 31, 32], [40, 41, 42]]
    assert rows["top_logprobs"][2].tolist() == [-1.0, -2.0, -3.0]
    assert rows_of((7, 8, 9), (4, 5), scored=False)["token"].tolist() == [4, 5]
    assert len(rows_of((7,))) == len(rows_of((7, 8), scored=False)) == 0


def test_contexts_are_equal_after_the_same_tokens_and_only_then():
    one, other = rows_of((7, 8, 9, 10)), rows_of((7, 8), (9, 3))
    assert one["context"].tolist()[:3] == other["context"].tolist(), "scored or drawn"
    assert contexts_after(one)[:-1].tolist() == one["context"].tolist()[1:]
    paths = [(1, 2, 3), (1, 3, 2), (2, 1, 3), (1, 2), (0, 1, 2, 3), (1, 0, 2, 3), (65_536, 0), (0, 65_536), (131_000,)]
    ends = [int(contexts_after(rows_of((*path, 1)))[-1]) for path in paths]
    ends += [int(contexts_after(rows_of((*path, 1), vocabulary=1))[-1]) for path in paths]
    assert len(set(ends)) == 2 * len(paths)


def test_contexts_of_a_million_tokens_do_not_collide():
    random = np.random.default_rng(0)
    tokens = random.integers(50_000, size=1_000_000)
    rows = np.zeros(tokens.size, row_type(0))
    rows["context"], rows["token"] = VOCABULARY, tokens
    assert np.unique(contexts_after(rows)).size == np.unique(tokens).size
    rows["context"] = contexts_after(rows)
    rows["token"] = random.integers(50_000, size=tokens.size)
    pairs = np.unique(np.stack([tokens, rows["token"]]), axis=1).shape[1]
    assert np.unique(contexts_after(rows)).size == pairs


def test_a_small_vocabulary_leaves_places_empty():
    short = TokenResult(
        token_ids=(0,), logprobs=(-0.1,), finish_reason=FinishReason.LENGTH, top_logprobs=(((0, -0.1), (1, -2.3)),)
    )
    (row,) = read_off((1,), short, NUM_TOP, vocabulary=0)
    assert row["top_tokens"].tolist() == [0, 1, -1]
    assert row["top_logprobs"][2] == -np.inf


def test_rows_come_back_from_json_and_from_a_file(tmp_path):
    rows = rows_of((7, 8, 9), (4, 5))
    rows["request"], rows["is_text"] = 2**64 - 1, [True, False, False, True]
    assert (from_json(to_json(rows)) == rows).all()
    for some in (rows, rows[:0]):
        save(some, tmp_path / "deep" / "rows.parquet")
        back = load(tmp_path / "deep" / "rows.parquet")
        assert back.dtype == rows.dtype and (back == some).all()


def test_the_file_is_small_and_anybody_can_read_it(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = rows_of(tuple(range(40)))
    save(rows, tmp_path / "rows.parquet")
    frame = pandas.read_parquet(tmp_path / "rows.parquet")
    assert frame.columns.tolist() == list(rows.dtype.names)
    assert frame.top_tokens[3].tolist() == rows["top_tokens"][3].tolist()


def test_what_prompts_share_passes_once():
    new = NewRows()
    first, second = new.of(rows_of((7, 8, 9, 10))), new.of(rows_of((7, 8, 11, 10)))
    assert first["token"].tolist() == [8, 9, 10]
    assert second["token"].tolist() == [11, 10], "8 after 7 was there; 11 and 9 share their context"
    assert first["context"][1] == second["context"][0]
    assert len(new.of(rows_of((7, 8, 9, 10)))) == 0


def test_rows_are_gathered_for_the_requests_that_count_now():
    """Request 1 is not asked any more, and has read off what request 2 shares with it."""
    new = NewRows()
    once = new.of(rows_of((7, 8, 9), (1,)))
    right, wrong = new.of(rows_of((7, 8, 10, 11), (2,))), new.of(rows_of((7, 8, 10, 12)))
    answers = [Answered(2, (7, 8, 10, 11), True, right), Answered(3, (7, 8, 10, 12), False, wrong)]
    rows = gather(answers, [once, right, wrong], vocabulary=VOCABULARY)
    found = sorted((row["token"], row["request"], row["is_text"], row["is_drawn"]) for row in rows)
    assert found == [(2, 2, False, True), (8, 2, True, False), (10, 2, True, False), (11, 2, True, False),
                     (12, 3, False, False)]  # fmt: skip
    other_way = gather(answers[::-1], [wrong, right, once], vocabulary=VOCABULARY)
    assert {(row["token"], row["request"]) for row in other_way if not row["is_drawn"]} == {
        (8, 3),
        (10, 3),
        (11, 2),
        (12, 3),
    }
    assert len(gather([], [once], vocabulary=VOCABULARY)) == 0
