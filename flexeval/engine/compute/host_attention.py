"""Decode attention by the CPU, over logs where they lie in host memory. Knows rows and logs; not how they came there.

FlexGen's attention next to the KV cache (Sheng et al., ICML 2023, section 4.1), without a copy of it: long stretches of
a context are attended to as they lie, each by a thread of its own, what lies scattered is gathered, and the parts are
merged by log-sum-exp in float32. Query heads that share a KV head are queries of one call, so that each key is read
once for all of them.

Shapes: T new tokens of the row, C tokens of a log, N query heads, K KV heads, M = N / K of them to a KV head, H size of
a key, W size of a value, B sequences of a group, R gathered tokens, P parts of a context, A descendants' tokens, L
tokens of an ancestor, Q their queries of one KV head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexeval.engine.codecs.kv_format import KeysValues, KVLog
from flexeval.engine.compute.attention import Context
from flexeval.engine.compute.partial import merge_into, partial_attention
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import Row
from flexeval.planning.rows import AncestorSpan, DecodeSpan
from flexeval.planning.stretches import Stretch, lay_out
from flexeval.workers import Workers

PART_TOKENS = 1024
"""Tokens of a stretch that a thread attends to at a time, at most (Flash-Decoding, Dao et al. 2023)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rest:
    """Tokens to gather, of sequences that have about as many of them; padding repeats place 0."""

    sequence_B: Tensor
    """Whose."""
    index_BR: Tensor
    """Place of each token in the log."""
    age_BR: Tensor
    """Tokens of the sequence from it on, itself included; 0 where it is padding."""


class _Part(NamedTuple):
    """A part of a stretch."""

    sequence: int
    ordinal: int
    """Which of its sequence's parts it is, counted from 1; 0 is what is gathered."""
    places: slice
    """In the log."""


class _Group:
    """The contexts of a group's sequences at one step, taken apart. Layers ask again and again for the same."""

    def __init__(self, span: DecodeSpan):
        self.span = span
        self._lengths = [len(places) for places in span.own_tokens]
        layouts = [lay_out(places) for places in map(np.asarray, span.own_tokens)]
        self._stretches = [layout.stretches for layout in layouts]
        self._parts: dict[int | None, list[_Part]] = {}
        self.rests = list(self._rests([layout.rest for layout in layouts]))

    def parts(self, window: int | None) -> list[_Part]:
        """What is seen of the stretches."""
        if window not in self._parts:
            parts: list[_Part] = []
            for sequence, (stretches, length) in enumerate(zip(self._stretches, self._lengths, strict=True)):
                ordinal = 0
                for stretch in stretches:
                    first = 0 if window is None else max(0, length - window - stretch.offset)
                    for start in range(first, stretch.length, PART_TOKENS):
                        ordinal += 1
                        stop = min(start + PART_TOKENS, stretch.length)
                        parts.append(_Part(sequence, ordinal, _places(stretch, start, stop)))
            self._parts[window] = parts
        return self._parts[window]

    def _rests(self, offsets: list[np.ndarray]) -> Iterator[_Rest]:
        """Batches in which no sequence has twice as many tokens as another: padding stays small."""
        order = sorted((b for b, own in enumerate(offsets) if len(own)), key=lambda b: len(offsets[b]))
        for _, batch in groupby(order, key=lambda b: len(offsets[b]).bit_length()):
            sequences = list(batch)
            index_BR = np.zeros((len(sequences), len(offsets[sequences[-1]])), dtype=np.int64)
            age_BR = np.zeros_like(index_BR)
            for row, b in enumerate(sequences):
                index_BR[row, : len(offsets[b])] = np.asarray(self.span.own_tokens[b])[offsets[b]]
                age_BR[row, : len(offsets[b])] = self._lengths[b] - offsets[b]
            yield _Rest(
                sequence_B=torch.tensor(sequences),
                index_BR=torch.from_numpy(index_BR),
                age_BR=torch.from_numpy(age_BR),
            )


class HostAttention:
    """Dense decode attention on the CPU; one instance serves every row and layer, from one thread at a time."""

    def __init__(self, workers: Workers):
        self._workers = workers
        self._groups: dict[int, _Group] = {}

    def __call__(self, q_TNH: Tensor, options: AttentionOptions, row: Row, context: Context) -> Tensor:
        """Attention output `[T, N, W]` of the row's new tokens, whose KV `context` already holds."""
        assert row.decode and not row.fresh, "prompts are the GPU's"
        logs = [context.own_log(decode) for decode in row.decode]
        out_TNW = torch.empty(*q_TNH.shape[:2], logs[0].format.shape.value_size, dtype=torch.float32)
        lse_TN = torch.empty(q_TNH.shape[:2], dtype=torch.float32)
        for decode, log in zip(row.decode, logs, strict=True):
            tokens = slice(decode.span.start, decode.span.start + decode.num_sequences)
            out_TNW[tokens], lse_TN[tokens] = self._own(q_TNH[tokens], options, decode.span, log)
        for span in row.ancestors:
            first = first_seen(span, row, options)
            if first < span.num_keys:
                _ancestor(q_TNH, options, row, span, first, context.ancestor(span), out_TNW, lse_TN)
        if options.sinks_N is not None:  # as in `PackedAttention`
            out_TNW *= torch.sigmoid(lse_TN - options.sinks_N.float())[..., None]
        return out_TNW.to(q_TNH.dtype)

    def _own(self, q_BNH: Tensor, options: AttentionOptions, span: DecodeSpan, log: KVLog) -> tuple[Tensor, Tensor]:
        """Output `[B, N, W]` and log-sum-exp `[B, N]` of one query per sequence over its own context."""
        num_kv_heads, _, value_size = log.format.shape
        q_BKMH = q_BNH.unflatten(1, (num_kv_heads, -1))
        group = self._group(span)
        parts = group.parts(options.window)
        num_parts = 1 + max((part.ordinal for part in parts), default=0)
        out_PBKMW = torch.zeros(num_parts, *q_BKMH.shape[:3], value_size, dtype=torch.float32)
        lse_PBKM = torch.full(out_PBKMW.shape[:-1], -torch.inf)

        def attend(part: _Part) -> None:
            k_CKH, v_CKW = log.at(part.places)
            partial = partial_attention(
                q_BKMH[part.sequence][None],
                k_CKH.transpose(0, 1)[None],
                v_CKW.transpose(0, 1)[None],
                scale=options.scale,
                softcap=options.softcap,
            )
            out_PBKMW[part.ordinal, part.sequence] = partial.out_BNQW[0]
            lse_PBKM[part.ordinal, part.sequence] = partial.lse_BNQ[0]

        self._workers.map(attend, parts)
        for rest in group.rests:
            mask_BR = rest.age_BR > 0
            if options.window is not None:
                mask_BR &= rest.age_BR <= options.window
            own = log.at(rest.index_BR)
            partial = partial_attention(
                q_BKMH[rest.sequence_B],
                own.keys_CKH.transpose(1, 2),
                own.values_CKW.transpose(1, 2),
                scale=options.scale,
                mask_BQS=mask_BR[:, None],
                softcap=options.softcap,
            )
            out_PBKMW[0, rest.sequence_B] = partial.out_BNQW.float()
            lse_PBKM[0, rest.sequence_B] = partial.lse_BNQ
        lse_BKM = lse_PBKM.logsumexp(0)  # finite: every token sees itself
        weight_PBKM = (lse_PBKM - lse_BKM).exp_()
        return (out_PBKMW * weight_PBKM[..., None]).sum(0).flatten(1, 2), lse_BKM.flatten(1, 2)

    def _group(self, span: DecodeSpan) -> _Group:
        group = self._groups.get(span.group)
        if group is None or group.span is not span:
            group = self._groups[span.group] = _Group(span)
        return group


def num_keys_read(row: Row, options: AttentionOptions) -> int:
    """Tokens whose keys and values the attention of a row reads."""
    lengths = [len(places) for batch in row.decode for places in batch.span.own_tokens]
    own = lengths if options.window is None else [min(length, options.window) for length in lengths]
    return sum(own) + sum(max(0, span.num_keys - first_seen(span, row, options)) for span in row.ancestors)


def first_seen(span: AncestorSpan, row: Row, options: AttentionOptions) -> int:
    """The first token of an ancestor that any of its descendants sees, counted from the ancestor's first."""
    if options.window is None:
        return 0
    first_position = int(min(row.plan.positions[span.start : span.start + span.length]))
    return max(0, first_position - options.window + 1 - span.first_key_position)


def _places(stretch: Stretch, start: int, stop: int) -> slice:
    """Where tokens `start` to `stop` of a stretch lie."""
    return slice(stretch.place + start * stretch.step, stretch.place + (stop - 1) * stretch.step + 1, stretch.step)


def _ancestor(
    q_TNH: Tensor,
    options: AttentionOptions,
    row: Row,
    span: AncestorSpan,
    first: int,
    keys_values: KeysValues,
    out_TNW: Tensor,
    lse_TN: Tensor,
) -> None:
    """All descendants' tokens over what they see of one ancestor, merged into what they have attended to so far."""
    tokens = slice(span.start, span.start + span.length)
    k_LKH, v_LKW = keys_values.keys_CKH[first:], keys_values.values_CKW[first:]
    q_AKMH = q_TNH[tokens].unflatten(1, (k_LKH.shape[1], -1))
    num_tokens, num_kv_heads, heads_per_kv, _ = q_AKMH.shape
    mask_1QL = None
    if options.window is not None and span.last_position - span.first_key_position - first >= options.window:
        key_position_L = span.first_key_position + first + torch.arange(len(k_LKH))
        distance_AL = torch.from_numpy(np.asarray(row.plan.positions[tokens]))[:, None] - key_position_L
        mask_1QL = (distance_AL < options.window).repeat_interleave(heads_per_kv, dim=0)[None]
    partial = partial_attention(
        q_AKMH.transpose(0, 1).flatten(1, 2)[None],
        k_LKH.transpose(0, 1)[None],
        v_LKW.transpose(0, 1)[None],
        scale=options.scale,
        mask_BQS=mask_1QL,
        softcap=options.softcap,
    )
    out_KAMW = partial.out_BNQW[0].unflatten(1, (num_tokens, heads_per_kv))
    lse_KAM = partial.lse_BNQ[0].unflatten(1, (num_tokens, heads_per_kv))
    merge_into(
        out_TNW[tokens],
        lse_TN[tokens],
        out_KAMW.transpose(0, 1).reshape(num_tokens, num_kv_heads * heads_per_kv, -1).float(),
        lse_KAM.transpose(0, 1).reshape(num_tokens, -1),
    )
