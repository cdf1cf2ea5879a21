"""Attention over a packed row: each token sees its own context and its ancestors'. Knows rows; not where KV rests.

Every new token attends to its own context (its node's earlier tokens, or its sequence's log in decode), and to each
ancestor node, whose KV is read once for all of its descendants in the row. The parts are merged by log-sum-exp.

Shapes: T new tokens of the row, C tokens of a log, N query heads, K KV heads, H size of a key, W size of a value,
B sequences, L fresh tokens, S context, A descendants' tokens, P ancestor's tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flexeval.engine.codecs.kv_format import KeysValues, KVLog
from flexeval.engine.compute.contexts import DecodeBatch
from flexeval.engine.compute.partial import merge_into, partial_attention
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import FreshBatch, Row
from flexeval.engine.compute.runs import attend_before, attend_within_runs
from flexeval.engine.kernels import has_triton
from flexeval.planning.rows import AncestorSpan


class Context(Protocol):
    """Gives a row the KV of earlier tokens at the current layer."""

    def own_log(self, batch: DecodeBatch) -> KVLog:
        """The log of a decode batch, the new tokens' KV included."""
        ...

    def ancestor(self, span: AncestorSpan) -> KeysValues:
        """An ancestor that is not in the row itself."""
        ...


class Attention(Protocol):
    """How packed rows attend."""

    is_recordable: bool
    """Whether it launches the same on the same places, so that a recording of it can be replayed."""

    def __call__(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions, row: Row, context: Context
    ) -> Tensor:
        """Attention output `[T, N, W]` of the row's new tokens, whose KV `context` already holds."""
        ...


class PackedAttention:
    """Dense attention; one instance serves every row and layer."""

    is_recordable = True

    def __call__(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions, row: Row, context: Context
    ) -> Tensor:
        """Attention output `[T, N, W]` of the row's new tokens, whose KV `context` already holds."""
        num_tokens, num_heads, _ = q_TNH.shape
        assert num_tokens == row.plan.num_tokens, (num_tokens, row.plan.num_tokens)
        within = None if row.runs is None else attend_within_runs(q_TNH, k_TKH, v_TKW, row.runs, options)
        if within is not None:
            out_TNW, lse_TN = within
        else:
            out_TNW = q_TNH.new_empty(num_tokens, num_heads, v_TKW.shape[-1])
            lse_TN = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q_TNH.device)
            for fresh in row.fresh:
                self._fresh(q_TNH, k_TKH, v_TKW, options, fresh, out_TNW, lse_TN)
        for decode in row.decode:
            self._decode(q_TNH, options, decode, context.own_log(decode), out_TNW, lse_TN)
        for span in row.ancestors:
            in_row = span.source.row_start
            if in_row is None:
                keys_values = context.ancestor(span)
            else:
                keys_values = KeysValues(k_TKH[in_row : in_row + span.num_keys], v_TKW[in_row : in_row + span.num_keys])
            _attend_to_ancestor(q_TNH, options, row, span, keys_values, out_TNW, lse_TN)
        return _sink(out_TNW, lse_TN, options)

    @staticmethod
    def _fresh(
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKW: Tensor,
        options: AttentionOptions,
        batch: FreshBatch,
        out_TNW: Tensor,
        lse_TN: Tensor,
    ) -> None:
        """Causal attention within each node; padding comes after every real token, so causality hides it."""
        num_steps = batch.index_BL.shape[1]
        mask_1LL = None
        if options.window is not None and options.window < num_steps:
            steps_L = torch.arange(num_steps, device=q_TNH.device)
            distance_LL = steps_L[:, None] - steps_L[None, :]
            mask_1LL = ((distance_LL >= 0) & (distance_LL < options.window))[None]
        partial = partial_attention(
            q_TNH[batch.index_BL].transpose(1, 2),
            k_TKH[batch.index_BL].transpose(1, 2),
            v_TKW[batch.index_BL].transpose(1, 2),
            scale=options.scale,
            is_causal=mask_1LL is None,
            mask_BQS=mask_1LL,
            softcap=options.softcap,
        )
        out_TNW[batch.token_M] = partial.out_BNQW.transpose(1, 2).flatten(0, 1)[batch.place_M]
        lse_TN[batch.token_M] = partial.lse_BNQ.transpose(1, 2).flatten(0, 1)[batch.place_M]

    @staticmethod
    def _decode(
        q_TNH: Tensor,
        options: AttentionOptions,
        batch: DecodeBatch,
        log: KVLog,
        out_TNW: Tensor,
        lse_TN: Tensor,
    ) -> None:
        """One query per sequence over its own context, read where it lies or gathered from the log."""
        tokens = slice(batch.span.start, batch.span.start + batch.num_sequences)
        if has_triton(q_TNH.device):
            from flexeval.engine.compute.decode import decode_attention

            return decode_attention(
                q_TNH[tokens],
                log,
                batch.index_BS,
                batch.lengths_B,
                out_TNW[tokens],
                lse_TN[tokens],
                max_length=batch.room,
                scale=options.scale,
                window=options.window,
                softcap=options.softcap,
            )
        mask_BS = batch.is_context_BS
        if options.window is not None:
            mask_BS = mask_BS & (batch.steps_S >= batch.lengths_B[:, None] - options.window)
        own = log.at(batch.index_BS)
        partial = partial_attention(
            q_TNH[tokens][:, :, None],
            own.keys_CKH.transpose(1, 2),
            own.values_CKW.transpose(1, 2),
            scale=options.scale,
            mask_BQS=mask_BS[:, None],
            softcap=options.softcap,
        )
        out_TNW[tokens] = partial.out_BNQW[:, :, 0]
        lse_TN[tokens] = partial.lse_BNQ[:, :, 0]


class Attended(NamedTuple):
    """What a row's tokens come to with some of what they see."""

    out_TNW: Tensor
    lse_TN: Tensor
    """Log-sum-exp of the scores, float32; -inf where a token sees none of it."""


def attend_above(q_TNH: Tensor, options: AttentionOptions, row: Row, context: Context) -> Attended:
    """Attend to the ancestors of a row that decodes, and to nothing else; it has some."""
    num_tokens, num_heads, _ = q_TNH.shape
    seen = [context.ancestor(span) for span in row.ancestors]
    above = Attended(
        q_TNH.new_zeros(num_tokens, num_heads, seen[0].values_CKW.shape[-1]),
        torch.full((num_tokens, num_heads), -torch.inf, device=q_TNH.device),
    )
    for span, keys_values in zip(row.ancestors, seen, strict=True):
        _attend_to_ancestor(q_TNH, options, row, span, keys_values, *above)
    return above


def complete(out_TNW: Tensor, lse_TN: Tensor, above: Attended | None, options: AttentionOptions) -> Tensor:
    """The output of a row that has attended to its own context, with what it sees of its ancestors; in place."""
    if above is not None:
        merge_into(out_TNW, lse_TN, *above)
    return _sink(out_TNW, lse_TN, options)


def _sink(out_TNW: Tensor, lse_TN: Tensor, options: AttentionOptions) -> Tensor:
    if options.sinks_N is not None:  # a sink adds exp(sink) to the softmax's denominator and nothing to its sum
        out_TNW *= torch.sigmoid(lse_TN - options.sinks_N.float())[..., None].to(out_TNW.dtype)
    return out_TNW


def _attend_to_ancestor(
    q_TNH: Tensor,
    options: AttentionOptions,
    row: Row,
    span: AncestorSpan,
    keys_values: KeysValues,
    out_TNW: Tensor,
    lse_TN: Tensor,
) -> None:
    """All descendants' tokens over one ancestor's KV, merged into what they have attended to so far."""
    tokens = slice(span.start, span.start + span.length)
    keys_PKH, values_PKW = keys_values
    positions_A = row.positions_1T[0, tokens]
    window = options.window
    if window is not None and span.last_position - span.first_key_position < window:
        window, options = None, replace(options, window=None)
    seen = attend_before(q_TNH[tokens], keys_PKH, values_PKW, positions_A, span.first_key_position, options)
    if seen is None:
        mask_1AP = None
        if window is not None:
            key_position_P = span.first_key_position + torch.arange(span.num_keys, device=q_TNH.device)
            mask_1AP = (positions_A[:, None] - key_position_P < window)[None]
        partial = partial_attention(
            q_TNH[tokens].transpose(0, 1)[None],
            keys_PKH.transpose(0, 1)[None],
            values_PKW.transpose(0, 1)[None],
            scale=options.scale,
            mask_BQS=mask_1AP,
            softcap=options.softcap,
        )
        seen = partial.out_BNQW[0].transpose(0, 1), partial.lse_BNQ[0].transpose(0, 1)
    merge_into(out_TNW[tokens], lse_TN[tokens], *seen)
