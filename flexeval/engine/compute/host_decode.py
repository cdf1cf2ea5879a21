"""Our compiled decode attention for the CPU. Knows tensors; no row.

torch's CPU attention reads a token's heads one by one and reads them again for every query head; what a token's heads
hold lies side by side in a log. `host_decode.c` reads it in one run.

Shapes: T tokens of the row, C tokens of a log, B bytes of a token, K KV heads, M query heads to a KV head, H size of a
key, W size of a value, P parts of contexts.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from flexeval.engine.codecs.kv_format import CodedFormat, KVFormat, KVLog, PlainFormat
from flexeval.engine.compute.host_kinds import KINDS
from flexeval.engine.compute.host_team import Job, Team, library
from flexeval.engine.compute.partial import Partial

PIECES_PER_THREAD = 16
"""Pieces of work for each thread that a call should have, so that threads end at about the same time."""

_LANES, _MAX_SIZE = 16, 1024  # as in the source, where vectors are longest
_CODES = {8: 3, 4: 4, 2: 5}  # by bits
_POINTERS = ("queries", "logs", "tokens", "bounds", "places", "out", "lse", "rounded")
_SIZES = ("num_parts", "num_kv_heads", "heads_per_kv", "key_size", "value_size", "heads_at_once", "rounded_kind")


class _Kind(NamedTuple):
    """What a log holds."""

    kind: int
    group_size: int = 0

    @classmethod
    def of(cls, form: KVFormat) -> _Kind | None:
        """None for what the kernel cannot read."""
        if isinstance(form, PlainFormat) and form.dtype in KINDS:
            return cls(KINDS[form.dtype])
        if isinstance(form, CodedFormat) and form.codec.code_bytes % _LANES == 0:
            return cls(_CODES[form.codec.bits], form.codec.group_size)
        return None


class _Work(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in (*_SIZES, *_Kind._fields)),
        ("softcap", ctypes.c_float),
    )


class Parts(NamedTuple):
    """Parts of contexts, a query each."""

    logs: list[int]
    """Which log each lies in."""
    token_P: Tensor
    """Token of the row that asks, int64."""
    bounds: Tensor
    """`[P + 1]`, int64: the places of part i are those from `bounds[i]` up to `bounds[i + 1]`."""
    places: Tensor
    """Where their tokens lie in the logs, int32."""
    num_tokens: list[int]
    """So many tokens each log has at least."""


class DecodeKernel:
    """The kernel, run by a team."""

    def __init__(self, team: Team):
        self.team = team

    def takes(self, log: KVLog) -> bool:
        """Whether it can read such a log."""
        return _reads(log.format) and log.data_CB.is_contiguous()

    def begin(
        self,
        q_TKMH: Tensor,
        logs: list[KVLog],
        parts: Parts,
        *,
        scale: float,
        softcap: float | None,
        rounded_PKMW: Tensor | None = None,
        lse_PKM: Tensor | None = None,
    ) -> tuple[Partial, Job]:
        """Have the team attend; what comes out is there when the job is done.

        Args:
            q_TKMH: Queries of all tokens of the row.
            logs: Logs of one format.
            parts: What of them is attended to, at least one token each.
            scale: Factor on the scores.
            softcap: Scores become softcap * tanh(score / softcap).
            rounded_PKMW: Contiguous; filled with the output, rounded to its type. The output in float32 is none then.
            lse_PKM: Contiguous, float32; filled with the log-sum-exp of the scores. None makes one.
        """
        form = logs[0].format
        kind = _Kind.of(form)
        assert kind is not None
        for log, num_tokens in zip(logs, parts.num_tokens, strict=True):
            assert (log.format.shape, len(log.data_CB) >= num_tokens) == (form.shape, True), (log, num_tokens)
        _, num_kv_heads, heads_per_kv, key_size = q_TKMH.shape
        value_size, num_parts = form.shape.value_size, len(parts.logs)
        queries = q_TKMH.float().mul(scale).contiguous()
        addresses = torch.tensor([log.data_CB.data_ptr() for log in logs])[torch.tensor(parts.logs)]
        out_PKMW = torch.empty(num_parts, num_kv_heads, heads_per_kv, value_size)
        if lse_PKM is None:
            lse_PKM = torch.empty(num_parts, num_kv_heads, heads_per_kv)
        assert lse_PKM.shape == out_PKMW.shape[:3] and lse_PKM.is_contiguous(), lse_PKM.shape
        if rounded_PKMW is not None:
            assert rounded_PKMW.shape == out_PKMW.shape and rounded_PKMW.is_contiguous(), rounded_PKMW.shape
        num_pieces = min(num_kv_heads, -(-PIECES_PER_THREAD * self.team.num_threads // num_parts))
        tensors = (queries, addresses, parts.token_P, parts.bounds, parts.places, out_PKMW, lse_PKM)
        work = _Work(
            *(tensor.data_ptr() for tensor in tensors),
            None if rounded_PKMW is None else rounded_PKMW.data_ptr(),
            num_parts,
            num_kv_heads,
            heads_per_kv,
            key_size,
            value_size,
            -(-num_kv_heads // num_pieces),
            0 if rounded_PKMW is None else KINDS[rounded_PKMW.dtype],
            *kind,
            softcap or 0.0,
        )
        begin = self.team.library.flexeval_begin_decode
        return Partial(out_PKMW, lse_PKM), self.team.begin(begin, work, (tensors, logs, rounded_PKMW))


def can_read(form: KVFormat) -> bool:
    """Whether logs of such a format are read here by the kernel, which this compiles at need."""
    return _reads(form) and library() is not None


def _reads(form: KVFormat) -> bool:
    sizes = (form.shape.key_size, form.shape.value_size)
    return _Kind.of(form) is not None and all(size % _LANES == 0 and size <= _MAX_SIZE for size in sizes)
