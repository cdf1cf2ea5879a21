"""What a model held probable where it scored or drew a token: what settings are compared by, beside their answers.

A row is one position: a hash of all tokens before it, the token that stands there, and what is kept of the
distribution. Two models were asked the same thing where their rows have the same context, whatever request it came
from: so rows of a generation pair up exactly as far as both have drawn the same tokens. Knows no model, no statistic.
"""

from __future__ import annotations

import base64
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from flexeval.hashing import mix
from flexeval.request import TokenResult

Rows = npt.NDArray[np.void]
"""Rows of the type that `row_type` describes."""
Contexts = npt.NDArray[np.uint64]
MOST_TOP = 2**20
"""Tokens kept of a distribution at most: more than any vocabulary has."""
ROUNDING = 0.01
"""A log-probability in few bits may come out above 0."""


@cache
def row_type(num_top: int) -> np.dtype[np.void]:
    """The type of a row that keeps the `num_top` most probable tokens and as many others: see `request.Kept`."""
    return np.dtype(
        [
            ("context", "<u8"),  # hash of the tokens before, and of the tokenizer
            ("request", "<u8"),  # `request_key` of the request it was read from first
            ("position", "<u4"),  # tokens before
            ("token", "<i4"),  # the prompt's next token, or the one drawn
            ("is_drawn", "?"),
            ("is_text", "?"),  # whether `token` belongs to a text that is known to be right
            ("logprob", "<f4"),  # of `token`; natural logarithm, temperature 1
            ("top_tokens", "<i4", (num_top,)),  # most probable first; -1 where there are no more
            ("top_logprobs", "<f4", (num_top,)),
            ("sampled_tokens", "<i4", (num_top,)),  # of all others
            ("sampled_logprobs", "<f4", (num_top,)),
            ("threshold", "<f4"),  # each was sampled with the probability min(1, exp(logprob - threshold))
        ]
    )


def read_off(prompt_ids: Sequence[int], result: TokenResult, num_top: int, *, vocabulary: int) -> Rows:
    """Rows of everything that a result has kept: the scored tokens of the prompt, but the first, and all drawn ones.

    Args:
        prompt_ids: The prompt.
        result: Its result, with `num_top` most probable tokens kept.
        num_top: How many.
        vocabulary: Stands for the tokenizer: contexts of different ones are never equal.
    """
    kept, num_rows = result.kept, len(result.prompt_logprobs[1:]) + len(result.token_ids)
    rows = np.zeros(num_rows, row_type(num_top))
    if not num_rows:
        return rows
    assert kept is not None and kept.token_ids_NC.shape == (num_rows, 2 * num_top + 1), (kept, num_rows, num_top)
    tokens = np.array([*prompt_ids, *result.token_ids])
    first, num_scored = len(tokens) - num_rows, num_rows - len(result.token_ids)
    rows["context"] = _contexts(tokens, vocabulary)[first:-1]
    rows["position"] = np.arange(first, len(tokens))
    rows["token"] = tokens[first:]
    rows["is_drawn"][num_scored:] = True
    rows["logprob"] = [*(result.prompt_logprobs[first:] if num_scored else ()), *result.logprobs]
    rows["top_tokens"], rows["sampled_tokens"], _ = np.split(kept.token_ids_NC, [num_top, 2 * num_top], axis=1)
    rows["top_logprobs"], rows["sampled_logprobs"], threshold_N1 = np.split(
        kept.logprobs_NC, [num_top, 2 * num_top], axis=1
    )
    rows["threshold"] = threshold_N1[:, 0]
    return rows


def contexts_after(rows: Rows) -> Contexts:
    """The context that each row's token leads to: equal where context and token are."""
    after: Contexts = rows["context"] + _share(rows["token"], rows["position"])
    return after


class Answered(NamedTuple):
    """A request whose answer has been read off."""

    key: int
    """Its `request_key`."""
    scored_ids: Sequence[int]
    """Its prompt, if that was scored."""
    is_right: bool
    """Whether the prompt is a text that is known to be right."""
    rows: Rows
    """Rows read off for it; of its prompt perhaps not all, where other requests begin alike."""


def gather(answers: Sequence[Answered], read: Iterable[Rows], *, vocabulary: int) -> Rows:
    """All rows of some requests, each once, with the first request that each belongs to.

    Args:
        answers: The requests, at least one.
        read: All rows that were ever read off, also for requests that do not count now.
        vocabulary: As for `read_off`.
    """
    drawn = []
    for answer in answers:
        drawn.append(answer.rows[answer.rows["is_drawn"]])
        drawn[-1]["request"] = answer.key
    scored = [answers[0].rows[:0], *(rows[~rows["is_drawn"]] for rows in read)]
    paths = [_contexts(np.array(answer.scored_ids), vocabulary)[2:] for answer in answers]
    right = [path[:0] if not answer.is_right else path for path, answer in zip(paths, answers, strict=True)]
    owners = np.repeat(np.array([answer.key for answer in answers], dtype=np.uint64), [len(path) for path in paths])
    reached, first = np.unique(np.concatenate(paths), return_index=True)
    found = _once(np.concatenate(scored))
    after = contexts_after(found)
    is_asked = np.isin(after, reached)
    found, after = found[is_asked], after[is_asked]
    found["request"] = owners[first][np.searchsorted(reached, after)]
    found["is_text"] = np.isin(after, np.concatenate(right))
    return np.concatenate([found, _once(np.concatenate(drawn))])


def request_key(short_hash: str) -> int:
    """A request's short hash as a column has it."""
    return int(short_hash, 16)


class NewRows:
    """Lets each scored token in its context pass once: a beginning that many prompts share is kept once."""

    def __init__(self) -> None:
        """Nothing has passed yet."""
        self._seen: set[int] = set()

    def of(self, rows: Rows) -> Rows:
        """The rows of a result that have not passed yet, and all that were drawn; now they have."""
        after = contexts_after(rows)[~rows["is_drawn"]]
        # What has passed is a beginning: whatever prompt a token came with, all tokens before it came along.
        num_seen = bisect_left(after, True, key=lambda context: int(context) not in self._seen)
        self._seen.update(after[num_seen:].tolist())
        return rows[num_seen:].copy()  # a view would keep what has passed as well


def to_json(rows: Rows) -> dict[str, Any]:
    """The rows as JSON values."""
    return {"num_top": rows["top_tokens"].shape[1], "rows": base64.b64encode(rows.tobytes()).decode()}


def from_json(data: object) -> Rows:
    """Rows from what `to_json` made of them. Raises `ValueError`."""
    num_top, text = (data.get("num_top"), data.get("rows")) if isinstance(data, dict) else (None, None)
    if type(num_top) is not int or not 0 <= num_top <= MOST_TOP or not isinstance(text, str):
        raise ValueError("rows of distributions are not what they should be")
    rows = np.frombuffer(base64.b64decode(text, validate=True), row_type(num_top))
    check(rows)
    return rows


def check(rows: Rows) -> None:
    """Raise `ValueError` for rows that cannot have been read off of a model: what others wrote is not just believed."""
    for name in ("logprob", "top_logprobs", "sampled_logprobs"):
        if not (rows[name] <= ROUNDING).all():  # not a number is not less either
            raise ValueError(f"{name} of a distribution is no logarithm of a probability")
    if np.isnan(rows["threshold"]).any():
        raise ValueError("threshold of a distribution is no number")
    for name in ("is_drawn", "is_text"):
        if (rows[name].view(np.uint8) > 1).any():
            raise ValueError(f"{name} of a distribution is neither true nor false")


def _once(rows: Rows) -> Rows:
    """The rows without those that have come before, in their order."""
    return rows[np.sort(np.unique(contexts_after(rows), return_index=True)[1])]


def _contexts(tokens: npt.NDArray[np.integer], vocabulary: int) -> Contexts:
    """The context before each token, and the one after the last: a sum over all tokens before, modulo 2^64."""
    shares = _share(tokens, np.arange(len(tokens)))
    return np.concatenate([np.zeros(1, np.uint64), np.cumsum(shares, dtype=np.uint64)]) + np.uint64(vocabulary)


def _share(tokens: npt.NDArray[np.integer], positions: npt.NDArray[np.integer]) -> Contexts:
    """What a token at its position adds to a context."""
    return mix(mix(positions) ^ tokens.astype(np.uint64))
