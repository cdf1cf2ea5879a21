"""Rows of what models hold probable: one per position, the same key after the same tokens, and back from every form."""

import numpy as np
import pytest
from kept_rows import kept_of

from flexeval.distributions import (
    Answered,
    NewRows,
    contexts_after,
    from_json,
    gather,
    read_off,
    row_type,
    to_json,
)
from flexeval.errors import ResultsError
from flexeval.parquet import load, save
from flexeval.request import FinishReason, Kept, TokenResult

NUM_TOP = 3
VOCABULARY = 12345


def result(prompt_ids, token_ids=(), *, scored=True, shift=0.0):
    """A made-up result: what is kept at a position depends on its place and on `shift` alone."""
    first = 1 if scored else len(prompt_ids)
    places = np.arange(first, len(prompt_ids) + len(token_ids))
    logits = np.random.default_rng(0).normal(size=(100, 20))[places]
    logits[:, 0] += shift
    logprobs = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
    return TokenResult(
        token_ids=tuple(token_ids),
        logprobs=tuple(-0.5 * len(prompt_ids) - i for i, _ in enumerate(token_ids)),
        finish_reason=FinishReason.LENGTH,
        prompt_logprobs=(0.0, *(-0.5 * place for place in range(1, len(prompt_ids)))) if scored else (),
        kept=kept_of(logprobs, NUM_TOP, first=first),
    )


def rows_of(prompt_ids, token_ids=(), **options):
    vocabulary = options.pop("vocabulary", VOCABULARY)
    return read_off(prompt_ids, result(prompt_ids, token_ids, **options), NUM_TOP, vocabulary=vocabulary)


def test_every_scored_and_drawn_token_is_a_row_but_the_first():
    rows = rows_of((7, 8, 9), (4, 5))
    kept = result((7, 8, 9), (4, 5)).kept
    assert rows["token"].tolist() == [8, 9, 4, 5]
    assert rows["position"].tolist() == [1, 2, 3, 4]
    assert rows["is_drawn"].tolist() == [False, False, True, True]
    assert rows["logprob"].tolist() == [-0.5, -1.0, -1.5, -2.5]
    for values, ids in (
        (rows["top_tokens"], kept.token_ids_NC[:, :3]),
        (rows["sampled_tokens"], kept.token_ids_NC[:, 3:6]),
    ):
        assert (values == ids).all()
    assert (rows["top_logprobs"] == kept.logprobs_NC[:, :3]).all()
    assert (rows["sampled_logprobs"] == kept.logprobs_NC[:, 3:6]).all()
    assert (rows["threshold"] == kept.logprobs_NC[:, 6]).all()
    assert rows_of((7, 8, 9), (4, 5), scored=False)["token"].tolist() == [4, 5]
    assert len(rows_of((7,))) == len(rows_of((7, 8), scored=False)) == 0
    nothing = TokenResult(token_ids=(), logprobs=(), finish_reason=FinishReason.LENGTH, prompt_logprobs=(0.0,))
    assert read_off((7,), nothing, NUM_TOP, vocabulary=0).dtype == row_type(NUM_TOP)


@pytest.mark.parametrize("kept", [None, Kept(np.zeros((1, 5), np.int32), np.zeros((1, 5), np.float32))])
def test_a_result_that_has_not_kept_what_was_asked_is_our_bug(kept):
    one = TokenResult(token_ids=(4,), logprobs=(-1.0,), finish_reason=FinishReason.LENGTH, kept=kept)
    with pytest.raises(AssertionError):
        read_off((7,), one, NUM_TOP, vocabulary=0)


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
    tokens, others = random.integers(50_000, size=(2, 1_000_000))
    rows = np.zeros(tokens.size, row_type(0))
    rows["context"], rows["token"], rows["position"] = VOCABULARY, tokens, 1
    assert np.unique(contexts_after(rows)).size == np.unique(tokens).size
    rows["context"], rows["token"], rows["position"] = contexts_after(rows), others, 2
    pairs = np.unique(np.stack([tokens, others]), axis=1).shape[1]
    assert np.unique(contexts_after(rows)).size == pairs


def test_rows_come_back_from_json_and_from_a_file(tmp_path):
    rows = rows_of((7, 8, 9), (4, 5))
    rows["request"], rows["is_text"] = 2**64 - 1, [True, False, False, True]
    assert (from_json(to_json(rows)) == rows).all()
    for some in (rows, rows[:0]):
        save(some, tmp_path / "not UTF-8 \udcff" / "rows.parquet")
        back = load(tmp_path / "not UTF-8 \udcff" / "rows.parquet")
        assert back.dtype == rows.dtype and (back == some).all()


def test_anybody_can_read_the_file(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = rows_of(tuple(range(40)))
    save(rows, tmp_path / "rows.parquet")
    frame = pandas.read_parquet(tmp_path / "rows.parquet")
    assert frame.columns.tolist() == list(rows.dtype.names)
    assert frame.top_tokens[3].tolist() == rows["top_tokens"][3].tolist()


def test_a_file_that_is_none_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ResultsError, match=r"rows\.parquet"):
        load(path)


def test_what_prompts_share_passes_once():
    new = NewRows()
    first, second = new.of(rows_of((7, 8, 9, 10))), new.of(rows_of((7, 8, 11, 10), (6,)))
    assert first["token"].tolist() == [8, 9, 10]
    assert second["token"].tolist() == [11, 10, 6], "8 after 7 was there; 11 and 9 share their context"
    assert first["context"][1] == second["context"][0]
    assert second.base is None, "what was there takes no room again"
    assert new.of(rows_of((7, 8, 11, 10), (6,)))["token"].tolist() == [6], "what is drawn always passes"
    assert new.of(rows_of((7, 8, 11), (10,)))["token"].tolist() == [10]


def test_rows_are_gathered_for_the_requests_that_count_now():
    """Request 1 is not asked any more, and has read off what request 2 shares with it."""
    new = NewRows()
    once = new.of(rows_of((7, 8, 9), (1,)))
    right, wrong = new.of(rows_of((7, 8, 10, 11), (2,))), new.of(rows_of((7, 8, 10, 12)))
    answers = [Answered(2, (7, 8, 10, 11), True, right), Answered(3, (7, 8, 10, 12), False, wrong)]
    rows = gather(answers, [once, right, wrong], vocabulary=VOCABULARY)
    found = [(row["token"], row["request"], row["is_text"], row["is_drawn"]) for row in rows]
    assert found == [(8, 2, True, False), (10, 2, True, False), (11, 2, True, False), (12, 3, False, False),
                     (2, 2, False, True)]  # fmt: skip
    other_way = gather(answers[::-1], [wrong, right, once], vocabulary=VOCABULARY)
    assert {(row["token"], row["request"]) for row in other_way if not row["is_drawn"]} == {
        (8, 3),
        (10, 3),
        (11, 2),
        (12, 3),
    }
