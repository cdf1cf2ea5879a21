"""Decode attention by the CPU, over logs where they lie in host memory. Knows rows and logs; not how they came there.

FlexGen's attention next to the KV cache (Sheng et al., ICML 2023, section 4.1), without a copy of it: long stretches of
a context are attended to as they lie, what lies scattered is gathered, and the parts are merged by log-sum-exp in
float32. Query heads that share a KV head are queries of one call, so that each key is read once for all of them.

Shapes: T new tokens of the row, C tokens of a log, N query heads, K KV heads, M = N / K of them to a KV head, H size of
a key, W size of a value, X either, B sequences of a group, R gathered tokens, S tokens of a stretch, Z parts of all
stretches, P parts of a context, A descendants' tokens, L tokens of an ancestor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexeval.engine.compute.attention import Context, KeysValues
from flexeval.engine.compute.partial import merge_into, partial_attention
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import Row
from flexeval.planning.rows import AncestorSpan, DecodeSpan
from flexeval.planning.stretches import Stretch, lay_out

PART_TOKENS = 64
"""Fewest tokens that a stretch is cut into where there are fewer KV heads than threads (Flash-Decoding, Dao et al.)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rest:
    """Tokens to gather, of sequences that have about as many of them; padding repeats place 0."""

    sequence_B: Tensor
    """Whose."""
    index_BR: Tensor
    """Place of each token in the log."""
    age_BR: Tensor
    """Tokens of the sequence from it on, itself included; 0 where it is padding."""


class _Call(NamedTuple):
    """A stretch, or what a window leaves of it, cut into equal parts."""

    sequence: int
    places: slice
    num_parts: int


class _Calls(NamedTuple):
    """All of a group's, each sequence's one after the other."""

    calls: list[_Call]
    part_Z: Tensor
    """For each part of each call: which of its sequence's parts it is, counted from 1; 0 is what is gathered ..."""
    sequence_Z: Tensor
    """... and whose."""


class _Group:
    """The contexts of a group's sequences at one step, taken apart. Layers ask again and again for the same."""

    def __init__(self, span: DecodeSpan):
        self.span = span
        self._lengths = [len(places) for places in span.own_tokens]
        layouts = [lay_out(places) for places in map(np.asarray, span.own_tokens)]
        self._stretches = [layout.stretches for layout in layouts]
        self._made: dict[tuple[int | None, int], _Calls] = {}
        self.rests = list(self._rests([layout.rest for layout in layouts]))

    def calls(self, window: int | None, num_kv_heads: int) -> _Calls:
        """The stretches that are seen."""
        if (window, num_kv_heads) not in self._made:
            calls: list[_Call] = []
            parts: list[tuple[int, int]] = []
            for sequence, (stretches, length) in enumerate(zip(self._stretches, self._lengths, strict=True)):
                part = 1
                for stretch in stretches:
                    first = 0 if window is None else max(0, length - window - stretch.offset)
                    if first < stretch.length:
                        num_parts = _num_parts(stretch.length - first, num_kv_heads)
                        calls.append(_Call(sequence, _places(stretch, first), num_parts))
                        parts += [(part + index, sequence) for index in range(num_parts)]
                        part += num_parts
            part_Z, sequence_Z = torch.tensor(parts, dtype=torch.long).view(-1, 2).unbind(1)
            self._made[window, num_kv_heads] = _Calls(calls, part_Z, sequence_Z)
        return self._made[window, num_kv_heads]

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

    def __init__(self) -> None:
        self._groups: dict[int, _Group] = {}

    def __call__(self, q_TNH: Tensor, options: AttentionOptions, row: Row, context: Context) -> Tensor:
        """Attention output `[T, N, W]` of the row's new tokens, whose KV `context` already holds."""
        assert row.decode and not row.fresh, "prompts are the GPU's"
        out_TNW, lse_TN = torch.empty(0), torch.empty(q_TNH.shape[:2], dtype=torch.float32)
        for decode in row.decode:
            log, tokens = context.own_log(decode), slice(decode.span.start, decode.span.start + decode.num_sequences)
            if not out_TNW.numel():
                out_TNW = torch.empty(*lse_TN.shape, log.values_CKW.shape[-1], dtype=torch.float32)
            out_TNW[tokens], lse_TN[tokens] = _own(q_TNH[tokens], options, self._group(decode.span), log)
        for span in row.ancestors:
            first = first_seen(span, row, options)
            if first < span.num_keys:
                _ancestor(q_TNH, options, row, span, first, context.ancestor(span), out_TNW, lse_TN)
        if options.sinks_N is not None:  # as in `PackedAttention`
            out_TNW *= torch.sigmoid(lse_TN - options.sinks_N.float())[..., None]
        return out_TNW.to(q_TNH.dtype)

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


def _own(q_BNH: Tensor, options: AttentionOptions, group: _Group, log: KeysValues) -> tuple[Tensor, Tensor]:
    """Output `[B, N, W]` and log-sum-exp `[B, N]` of one query per sequence over its own context."""
    num_kv_heads, value_size = log.values_CKW.shape[1:]
    q_BKMH = q_BNH.unflatten(1, (num_kv_heads, -1))
    calls, part_Z, sequence_Z = group.calls(options.window, num_kv_heads)
    num_parts = int(part_Z.max()) if calls else 0
    out_PBKMW = torch.zeros(1 + num_parts, *q_BKMH.shape[:3], value_size, dtype=torch.float32)
    lse_PBKM = torch.full(out_PBKMW.shape[:-1], -torch.inf)
    for rest in group.rests:
        mask_BR = rest.age_BR > 0
        if options.window is not None:
            mask_BR &= rest.age_BR <= options.window
        partial = partial_attention(
            q_BKMH[rest.sequence_B],
            log.keys_CKH[rest.index_BR].transpose(1, 2),
            log.values_CKW[rest.index_BR].transpose(1, 2),
            scale=options.scale,
            mask_BQS=mask_BR[:, None],
            softcap=options.softcap,
        )
        out_PBKMW[0, rest.sequence_B] = partial.out_BNQW.float()
        lse_PBKM[0, rest.sequence_B] = partial.lse_BNQ
    if calls:
        k_1KCH, v_1KCW = log.keys_CKH.transpose(0, 1)[None], log.values_CKW.transpose(0, 1)[None]
        partials = [
            partial_attention(
                q_BKMH[call.sequence].expand(call.num_parts, -1, -1, -1),
                _cut(k_1KCH[:, :, call.places], call.num_parts),
                _cut(v_1KCW[:, :, call.places], call.num_parts),
                scale=options.scale,
                softcap=options.softcap,
            )
            for call in calls
        ]
        out_PBKMW[part_Z, sequence_Z] = torch.cat([partial.out_BNQW for partial in partials]).float()
        lse_PBKM[part_Z, sequence_Z] = torch.cat([partial.lse_BNQ for partial in partials])
    lse_BKM = lse_PBKM.logsumexp(0)  # finite: every token sees itself
    weight_PBKM = (lse_PBKM - lse_BKM).exp_()
    return (out_PBKMW * weight_PBKM[..., None]).sum(0).flatten(1, 2), lse_BKM.flatten(1, 2)


def _places(stretch: Stretch, first: int) -> slice:
    stop = stretch.place + (stretch.length - 1) * stretch.step + 1
    return slice(stretch.place + first * stretch.step, stop, stretch.step)


def _num_parts(num_tokens: int, num_kv_heads: int) -> int:
    """Torch gives each thread a head of a part: so many parts that all threads have work."""
    num_parts = 1
    while (
        num_parts * num_kv_heads < 2 * torch.get_num_threads()
        and num_tokens % (2 * num_parts) == 0
        and num_tokens >= 2 * num_parts * PART_TOKENS
    ):
        num_parts *= 2
    return num_parts


def _cut(stretch_1KSX: Tensor, num_parts: int) -> Tensor:
    """Its parts, one below the other, where they lie."""
    return stretch_1KSX if num_parts == 1 else stretch_1KSX[0].unflatten(1, (num_parts, -1)).transpose(0, 1)


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
