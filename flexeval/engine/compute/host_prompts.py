"""Our compiled attention of prompts for the CPU, where it multiplies pairs of bfloat16. Knows rows; not where KV rests.

torch's kernel takes each node and each ancestor of a row in a call of its own, and has a product made of every block of
queries and keys. `host_prompts.c` does a row in one go: each block of tokens over all runs of keys that any of them
sees, one softmax over all of them.

Shapes: T tokens of the row, B blocks, N query heads, K KV heads, M = N / K of them to a KV head, H size of a key, W
size of a value, G segments, S bounds of tokens in segments.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from flexeval.engine.codecs.kv_format import KeysValues, KVShape
from flexeval.engine.compute.attention import Context
from flexeval.engine.compute.host_team import Team, library
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import Row
from flexeval.planning.rows import AncestorSpan, FreshSpan, Integers, KeySource, RowPlan

S = TypeVar("S", FreshSpan, AncestorSpan)
_LANES, _MAX_SIZE = 16, 256  # as in the source
_POINTERS = (
    *("queries", "out", "sources", "segments"),
    *("first_segments", "first_tokens", "first_seen", "end_seen", "sinks"),
)
_SIZES = ("num_blocks", "num_kv_heads", "heads_per_kv", "key_size", "value_size", "query_token", "query_head")


class _Segment(NamedTuple):
    """Keys that some tokens of a block see, one after the other."""

    source: int
    """0 is the row's own keys, others `PromptPlan.elsewhere`."""
    first_key: int
    num_keys: int
    first_token: int
    """Of the block."""
    first_seen: Integers
    """Of each token, the first key that it sees, ..."""
    end_seen: Integers
    """... and the one behind the last."""


class _Spans(Generic[S]):
    """Spans of a row, found by the tokens that they have."""

    def __init__(self, spans: Sequence[S]):
        self._spans: Sequence[S] = spans
        self._starts = np.array([span.start for span in spans], dtype=np.int64)
        self._ends = self._starts + np.array([span.length for span in spans], dtype=np.int64)

    def meeting(self, first: int, end: int) -> list[S]:
        """Those with any of the tokens from `first` up to `end`."""
        return [self._spans[index] for index in np.flatnonzero((self._starts < end) & (self._ends > first)).tolist()]


class PromptPlan:
    """How to attend for a row at all layers that see as far."""

    def __init__(self, row: RowPlan, *, window: int | None, block_tokens: int):
        """In blocks of so many tokens at most."""
        self.row = row
        self._positions = np.asarray(row.positions)
        self._window = int(self._positions.max()) + 1 if window is None else window
        self._fresh, self._ancestors = _Spans(row.fresh), _Spans(row.ancestors)
        self.elsewhere: list[AncestorSpan] = []
        """Ancestors whose keys are not the row's."""
        self._sources: dict[KeySource, int] = {}
        first_tokens = [*range(0, row.num_tokens, block_tokens), row.num_tokens]
        blocks = [list(self._segments(*bounds)) for bounds in pairwise(first_tokens)]
        segments = [segment for block in blocks for segment in block]
        first_bounds = accumulate((len(segment.first_seen) for segment in segments), initial=0)
        self.segments_G6 = np.array(
            [
                (*segment[:4], len(segment.first_seen), bounds)
                for segment, bounds in zip(segments, first_bounds, strict=False)
            ],
            dtype=np.int64,
        )
        """As the kernel has them."""
        self.first_segments = np.cumsum([0, *map(len, blocks)], dtype=np.int64)
        """`[B + 1]`: of each block."""
        self.first_tokens = np.array(first_tokens, dtype=np.int64)
        """`[B + 1]`: of each block."""
        self.first_seen_S = np.concatenate([segment.first_seen for segment in segments]).astype(np.int32)
        """Which keys of a segment a token sees: from this one ..."""
        self.end_seen_S = np.concatenate([segment.end_seen for segment in segments]).astype(np.int32)
        """... up to this one."""

    def _segments(self, first: int, end: int) -> Iterator[_Segment]:
        """What the tokens of a block see."""
        for span in self._fresh.meeting(first, end):
            token = np.arange(max(first, span.start), min(end, span.start + span.length))
            oldest = np.maximum(span.start, token - self._window + 1)
            start = int(oldest[0])
            seen = (oldest - start, token + 1 - start)
            yield _Segment(0, start, int(token[-1]) + 1 - start, int(token[0]) - first, *seen)
        for above in self._ancestors.meeting(first, end):
            token = np.arange(max(first, above.start), min(end, above.start + above.length))
            oldest = np.maximum(0, self._positions[token] - self._window + 1 - above.first_key_position)
            start = int(oldest.min())
            if start < above.num_keys:
                num_keys = above.num_keys - start
                seen = (oldest - start, np.full_like(token, num_keys))
                yield _Segment(*self._source(above, start), num_keys, int(token[0]) - first, *seen)

    def _source(self, above: AncestorSpan, start: int) -> tuple[int, int]:
        """Where an ancestor's keys are, and which is the first of them."""
        if above.source.row_start is not None:
            return 0, above.source.row_start + start
        if above.source not in self._sources:
            self.elsewhere.append(above)
            self._sources[above.source] = len(self.elsewhere)
        return self._sources[above.source], start


class _Prompts(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class PromptKernel:
    """The kernel, run by a team."""

    def __init__(self, team: Team):
        self._team = team
        self._plans: dict[tuple[int, int | None, int], PromptPlan] = {}

    def takes(self, q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor) -> bool:
        """Whether it can attend with such heads."""
        return attends_to_prompts(KVShape.of(k_TKH, v_TKW), q_TNH.dtype, q_TNH.shape[1])

    def __call__(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions, row: Row, context: Context
    ) -> Tensor:
        """Attention output `[T, N, W]` of a row's prompts, in the queries' type."""
        num_tokens, num_heads, key_size = q_TNH.shape
        num_kv_heads, value_size = v_TKW.shape[1:]
        plan = self._plan(row, options.window, block_tokens=most_rows() // (num_heads // num_kv_heads))
        elsewhere = [context.ancestor(span) for span in plan.elsewhere]
        keys_values = [KeysValues(*map(_with_heads_in_one, kv)) for kv in (KeysValues(k_TKH, v_TKW), *elsewhere)]
        q_TNH = _with_heads_in_one(q_TNH)
        sources = torch.tensor(
            [
                (
                    kv.keys_CKH.data_ptr(),
                    kv.values_CKW.data_ptr(),
                    *kv.keys_CKH.stride()[:2],
                    *kv.values_CKW.stride()[:2],
                )
                for kv in keys_values
            ]
        )
        out_TNW = q_TNH.new_empty(num_tokens, num_heads, value_size)
        sinks_N = None if options.sinks_N is None else options.sinks_N.float().contiguous()
        arrays = (plan.segments_G6, plan.first_segments, plan.first_tokens, plan.first_seen_S, plan.end_seen_S)
        work = _Prompts(
            q_TNH.data_ptr(),
            out_TNW.data_ptr(),
            sources.data_ptr(),
            *(array.ctypes.data for array in arrays),
            None if sinks_N is None else sinks_N.data_ptr(),
            len(plan.first_tokens) - 1,
            num_kv_heads,
            num_heads // num_kv_heads,
            key_size,
            value_size,
            *q_TNH.stride()[:2],
            options.scale,
            options.softcap or 0.0,
        )
        keeps = (q_TNH, keys_values, sources, out_TNW, sinks_N, plan)
        self._team.begin(self._team.library.flexeval_begin_prompts, work, keeps).wait()
        return out_TNW

    def _plan(self, row: Row, window: int | None, *, block_tokens: int) -> PromptPlan:
        """The row's plan in this sweep; layers ask again and again for the same."""
        key = (row.index, window, block_tokens)
        if key not in self._plans or self._plans[key].row is not row.plan:
            self._plans[key] = PromptPlan(row.plan, window=window, block_tokens=block_tokens)
        return self._plans[key]


def attends_to_prompts(shape: KVShape, dtype: torch.dtype, num_query_heads: int) -> bool:
    """Whether the kernel does, which this compiles at need."""
    sizes = (shape.key_size, shape.value_size)
    return (
        dtype == torch.bfloat16
        and all(size % _LANES == 0 and size <= _MAX_SIZE for size in sizes)
        and 0 < num_query_heads // shape.num_heads <= most_rows()
    )


def most_rows() -> int:
    """Queries of a block to one KV head at most; 0 where the processor has no instructions for it."""
    found = library()
    return 0 if found is None else int(found.flexeval_prompt_rows())


def _with_heads_in_one(values: Tensor) -> Tensor:
    """With the numbers of a head side by side, as they usually are."""
    return values if values.stride(-1) == 1 else values.contiguous()
