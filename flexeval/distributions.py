"""What a model held probable where it scored or drew a token: what settings are compared by, beside their answers.

A row is one position: a hash of all tokens before it, the token that stands there, and the most probable tokens. Two
models were asked the same thing where their rows have the same context, whatever request it came from: so rows of a
generation pair up exactly as far as both have drawn the same tokens. Knows no model and no statistic.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from flexeval.files import replacing
from flexeval.request import TokenResult, TopLogprobs

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

Rows = npt.NDArray[np.void]
"""Rows of the type that `row_type` describes."""
Contexts = npt.NDArray[np.uint64]

NO_TOKEN = -1
"""Stands at the end of a row's most probable tokens where the vocabulary has fewer."""
_MASK = 2**64 - 1
_MULTIPLIER = 0x9E3779B97F4A7C15
_FOLD = 32


def row_type(num_top: int) -> np.dtype[np.void]:
    """The type of a row that holds the `num_top` most probable tokens."""
    return np.dtype(
        [
            ("context", "<u8"),  # hash of the tokens before, and of the tokenizer
            ("request", "<u8"),  # `request_key` of the request it was read from first
            ("token", "<i4"),  # the prompt's next token, or the one drawn
            ("is_drawn", "?"),
            ("is_text", "?"),  # whether `token` belongs to a text that is known to be right
            ("logprob", "<f4"),  # of `token`; natural logarithm, temperature 1
            ("top_tokens", "<i4", (num_top,)),  # most probable first
            ("top_logprobs", "<f4", (num_top,)),
        ]
    )


def read_off(prompt_ids: Sequence[int], result: TokenResult, num_top: int, *, vocabulary: int) -> Rows:
    """Rows of everything a result tells: the scored tokens of the prompt, but the first, and all that were drawn.

    Args:
        prompt_ids: The prompt.
        result: Its result, with at least `num_top` most probable tokens.
        num_top: How many of them to keep.
        vocabulary: Stands for the tokenizer: contexts of different ones are never equal.
    """
    num_scored = max(0, len(result.prompt_top_logprobs) - 1)
    first = len(prompt_ids) - num_scored
    tops = [*result.prompt_top_logprobs[1:], *result.top_logprobs]
    rows = np.zeros(len(tops), row_type(num_top))
    if not tops:
        return rows
    tokens = [*prompt_ids, *result.token_ids]
    rows["context"] = _contexts(tokens, vocabulary)[first:-1]
    rows["token"] = tokens[first:]
    rows["is_drawn"][num_scored:] = True
    rows["logprob"] = [*result.prompt_logprobs[1:], *result.logprobs]
    rows["top_tokens"], rows["top_logprobs"] = _columns(tops, num_top)
    return rows


def contexts_after(rows: Rows) -> Contexts:
    """The context that each row's token leads to: equal where context and token are."""
    product: Contexts = (rows["context"] ^ (rows["token"].astype(np.uint64) + np.uint64(1))) * np.uint64(_MULTIPLIER)
    return product ^ (product >> np.uint64(_FOLD))


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
        answers: The requests.
        read: All rows that were ever read off, also for requests that do not count now.
        vocabulary: As for `read_off`.
    """
    drawn = []
    for answer in answers:
        drawn.append(answer.rows[answer.rows["is_drawn"]])
        drawn[-1]["request"] = answer.key
    scored = [rows[~rows["is_drawn"]] for rows in read]
    paths = [np.array(_contexts(answer.scored_ids, vocabulary)[2:], dtype=np.uint64) for answer in answers]
    right = [path for path, answer in zip(paths, answers, strict=True) if answer.is_right]
    owners = np.repeat(np.array([answer.key for answer in answers], dtype=np.uint64), [len(path) for path in paths])
    reached, first = np.unique(_joined(paths, np.dtype(np.uint64)), return_index=True)
    found = _once(_joined(scored, row_type(0)))
    after = contexts_after(found)
    is_asked = np.isin(after, reached)
    found, after = found[is_asked], after[is_asked]
    found["request"] = owners[first][np.searchsorted(reached, after)]
    found["is_text"] = np.isin(after, _joined(right, np.dtype(np.uint64)))
    return np.concatenate([found, _once(_joined(drawn, found.dtype))])


def request_key(short_hash: str) -> int:
    """A request's short hash as a column has it."""
    return int(short_hash, 16)


class NewRows:
    """Lets each token in its context pass once: a beginning that many prompts share is one question, not many."""

    def __init__(self) -> None:
        """Nothing has passed yet."""
        self._seen: set[int] = set()

    def of(self, rows: Rows) -> Rows:
        """The rows that have not passed yet; now they have."""
        contexts = contexts_after(rows).tolist()
        is_new = [context not in self._seen for context in contexts]
        self._seen.update(contexts)
        return rows[np.array(is_new, dtype=np.bool_)]


def to_json(rows: Rows) -> dict[str, Any]:
    """The rows as JSON values."""
    return {"num_top": _num_top(rows), "rows": base64.b64encode(rows.tobytes()).decode()}


def from_json(data: dict[str, Any]) -> Rows:
    """Rows from what `to_json` made of them."""
    return np.frombuffer(base64.b64decode(data["rows"]), row_type(data["num_top"]))


def save(rows: Rows, path: Path) -> None:
    """Write the rows as a Parquet file, whole or not at all."""
    import pyarrow
    from pyarrow import parquet

    columns = {name: _to_arrow(rows[name]) for name in rows.dtype.names or ()}
    with replacing(path) as temporary:
        parquet.write_table(pyarrow.table(columns), temporary, compression="zstd")


def load(path: Path) -> Rows:
    """Read what `save` wrote."""
    from pyarrow import parquet

    table = parquet.read_table(path)
    rows = np.zeros(table.num_rows, row_type(table.schema.field("top_tokens").type.list_size))
    for name in rows.dtype.names or ():
        column = table.column(name).combine_chunks()
        flat = column.flatten() if rows[name].ndim == 2 else column
        rows[name] = flat.to_numpy(zero_copy_only=False).reshape(rows[name].shape)
    return rows


def _joined(parts: Sequence[npt.NDArray[Any]], empty: np.dtype[Any]) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, empty)


def _once(rows: Rows) -> Rows:
    return rows[np.unique(contexts_after(rows), return_index=True)[1]]


def _num_top(rows: Rows) -> int:
    return int(rows.dtype["top_tokens"].shape[0])


def _contexts(tokens: Sequence[int], vocabulary: int) -> list[int]:
    """The context before each token, and the one after the last."""
    return list(accumulate(tokens, _step, initial=vocabulary))


def _step(context: int, token: int) -> int:
    """The context after one more token: FNV-1a's step over whole tokens, its high bits folded down."""
    product = (context ^ (token + 1)) * _MULTIPLIER & _MASK
    return product ^ product >> _FOLD


def _columns(tops: Sequence[TopLogprobs], num_top: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    num = min(num_top, *map(len, tops))
    cut: Iterable[TopLogprobs] = tops if all(len(top) == num for top in tops) else (top[:num] for top in tops)
    pairs = np.fromiter(chain.from_iterable(chain.from_iterable(cut)), float, count=2 * num * len(tops))
    pairs = pairs.reshape(len(tops), num, 2)
    missing = ((0, 0), (0, num_top - num))
    return (
        np.pad(pairs[..., 0], missing, constant_values=NO_TOKEN),
        np.pad(pairs[..., 1], missing, constant_values=-np.inf),
    )


def _to_arrow(values: npt.NDArray[Any]) -> pa.Array:
    import pyarrow

    if values.ndim == 1:
        return pyarrow.array(values)
    flat = pyarrow.array(np.ascontiguousarray(values).ravel())
    return pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
