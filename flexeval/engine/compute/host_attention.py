"""Decode attention by the CPU, over logs where they lie in host memory. Knows rows and logs; not how they came there.

FlexGen's attention next to the KV cache (Sheng et al., ICML 2023, section 4.1), without a copy of it: what sequences
have for themselves is one call of our kernel. Where that cannot read a log, or cannot be built, its tokens are gathered
and torch attends; so it does over what many sequences share, where each key meets many queries. All parts are merged at
once, by log-sum-exp in float32.

Shapes: T new tokens of the row, C tokens of a log, N query heads, K KV heads, M = N / K of them to a KV head, H size of
a key, W size of a value, B parts of contexts in a call, S tokens of a part, A descendants' tokens, L tokens of an
ancestor, Q the descendants' queries of one KV head, P parts of all calls, Z parts of one token's context.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from flexeval.engine.codecs.kv_format import KeysValues, KVLog
from flexeval.engine.compute.attention import Context
from flexeval.engine.compute.host_decode import DecodeKernel
from flexeval.engine.compute.host_plan import Above, Gathered, HostPlan
from flexeval.engine.compute.host_team import Job, Team
from flexeval.engine.compute.partial import Partial, has_kernel, partial_attention
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import Row
from flexeval.planning.rows import RowPlan

WRITTEN_OUT_TOKENS = 1024
"""Where there is no kernel, keys and values of so many tokens are held in float32 at a time, or of one part."""


class Attending:
    """What becomes of a row."""

    def __init__(self, out_TNW: Tensor, lse_TN: Tensor, num_keys: int, busy: Job | float):
        """`busy` is how long the CPU takes, in seconds where it is done."""
        self.num_keys = num_keys
        """Tokens whose keys and values are read."""
        self.lse_TN = lse_TN
        """Log-sum-exp of the scores, float32, once the output is there."""
        self._out_TNW = out_TNW
        self._busy = busy

    def wait(self) -> Tensor:
        """The output `[T, N, W]`, once it is there."""
        self.seconds()
        return self._out_TNW

    def seconds(self) -> float:
        """How long the CPU took, without what it did before; waits for it."""
        return self._busy if isinstance(self._busy, float) else self._busy.wait()


class HostAttention:
    """Dense decode attention on the CPU; one instance serves every row and layer, from one thread at a time."""

    def __init__(self, team: Team | None, num_threads: int, *, sees_above: bool = True) -> None:
        """With our kernel, if there is a team for it; torch uses `num_threads` in the thread that calls.

        Without `sees_above` what sequences share is left to others, and attention sinks with it.
        """
        self._kernel = None if team is None else DecodeKernel(team)
        self._num_threads = num_threads
        self._sees_above = sees_above
        self._plans: dict[int, tuple[RowPlan, dict[object, HostPlan]]] = {}

    def begin(
        self,
        q_TNH: Tensor,
        options: AttentionOptions,
        row: Row,
        context: Context,
        room: tuple[Tensor, Tensor] | None = None,
    ) -> Attending:
        """Attend for the row's new tokens, whose KV `context` already holds.

        A row of which no two parts are to be merged has the CPU attend behind those that were begun before, while the
        caller goes on.

        Args:
            q_TNH: Queries; they may be overwritten when this returns.
            options: How the layer attends.
            row: Which tokens see what.
            context: Where that lies.
            room: For the output and the log-sum-exp, contiguous. None makes some.
        """
        assert row.decode and not row.fresh, "prompts are the GPU's"
        logs = [context.own_log(decode) for decode in row.decode]
        shape = logs[0].format.shape
        if room is None:
            room = q_TNH.new_empty(*q_TNH.shape[:2], shape.value_size), torch.empty(q_TNH.shape[:2])
        out_TNW, lse_TN = room
        q_TKMH = q_TNH.unflatten(1, (shape.num_heads, -1))
        plan = self._plan(
            row, options.window, self.reads(logs), num_kv_heads=q_TKMH.shape[1], heads_per_kv=q_TKMH.shape[2]
        )
        start = time.perf_counter()
        partials = [_attend(q_TKMH[part.token_B], logs[part.log], part, options) for part in plan.gathered]
        if plan.together is not None:
            assert self._kernel is not None
            is_all = plan.is_whole and not (self._sees_above and options.sinks_N is not None)
            own, job = self._kernel.begin(
                q_TKMH,
                logs,
                plan.together,
                scale=options.scale,
                softcap=options.softcap,
                rounded_PKMW=out_TNW.unflatten(1, q_TKMH.shape[1:3]) if is_all else None,
                lse_PKM=lse_TN.unflatten(1, q_TKMH.shape[1:3]) if is_all else None,
            )
            if is_all:
                return Attending(out_TNW, lse_TN, plan.num_keys, job)
            job.wait()
            partials.append(own)
        partials += [_attend_above(q_TKMH, context.ancestor(above.span), above, options) for above in plan.aboves]
        _merge(partials, plan, options.sinks_N if self._sees_above else None, out_TNW, lse_TN)
        return Attending(out_TNW, lse_TN, plan.num_keys, time.perf_counter() - start)

    def reads(self, logs: Sequence[KVLog]) -> bool:
        """Whether our kernel reads such logs."""
        return self._kernel is not None and all(map(self._kernel.takes, logs))

    def drain(self) -> None:
        """Wait for all that is under way."""
        if self._kernel is not None:
            self._kernel.team.drain()

    def _plan(self, row: Row, window: int | None, has_kernel: bool, **heads: int) -> HostPlan:
        """The row's plan at this step; layers ask again and again for the same."""
        before = self._plans.get(row.index)
        if before is None or before[0] is not row.plan:
            before = self._plans[row.index] = (row.plan, {})
        key = (window, has_kernel, *heads.values())
        if key not in before[1]:
            before[1][key] = HostPlan(
                row.plan,
                window=window,
                has_kernel=has_kernel,
                num_threads=self._num_threads,
                sees_above=self._sees_above,
                **heads,
            )
        return before[1][key]


def _attend(q_BKMH: Tensor, log: KVLog, parts: Gathered, options: AttentionOptions) -> Partial:
    """A query each for parts of contexts: in one call, if torch has a kernel."""
    k_BKSH, v_BKSW = (part_BSKX.transpose(1, 2) for part_BSKX in log.at(parts.index_BS))
    bias_B1S = parts.bias_B1S
    if has_kernel(q_BKMH, v_BKSW, options.softcap):
        return partial_attention(q_BKMH, k_BKSH, v_BKSW, scale=options.scale, bias_BQS=bias_B1S)
    at_once = max(1, WRITTEN_OUT_TOKENS // k_BKSH.shape[2])
    partials = [
        partial_attention(
            q_BKMH[few],
            k_BKSH[few],
            v_BKSW[few],
            scale=options.scale,
            bias_BQS=None if bias_B1S is None else bias_B1S[few],
            softcap=options.softcap,
        )
        for few in (slice(start, start + at_once) for start in range(0, len(q_BKMH), at_once))
    ]
    return Partial(*map(torch.cat, zip(*partials, strict=True)))


def _attend_above(q_TKMH: Tensor, keys_values: KeysValues, above: Above, options: AttentionOptions) -> Partial:
    """All descendants' queries over what they see of one ancestor, which is a part of each one's context."""
    q_AKMH = q_TKMH[above.span.start : above.span.start + above.span.length]
    out_1KQW, lse_1KQ = partial_attention(
        q_AKMH.transpose(0, 1).flatten(1, 2)[None],
        keys_values.keys_CKH[above.first :].transpose(0, 1)[None],
        keys_values.values_CKW[above.first :].transpose(0, 1)[None],
        scale=options.scale,
        mask_BQS=above.mask_1QL,
        softcap=options.softcap,
    )
    out_KAMW, lse_KAM = (part[0].unflatten(1, (len(q_AKMH), -1)) for part in (out_1KQW, lse_1KQ))
    return Partial(out_KAMW.transpose(0, 1), lse_KAM.transpose(0, 1))


def _merge(
    partials: Sequence[Partial], plan: HostPlan, sinks_N: Tensor | None, out_TNW: Tensor, lse_TN: Tensor
) -> None:
    """Fill in the output and the log-sum-exp, from all parts of all contexts."""
    out_PKMW = torch.cat([partial.out_BNQW for partial in partials])
    lse_PKM = torch.cat([partial.lse_BNQ for partial in partials])
    if plan.is_whole and sinks_N is None:
        out_TNW.copy_(out_PKMW.flatten(1, 2))
        lse_TN.copy_(lse_PKM.flatten(1, 2))
        return
    if plan.part_X is not None:
        out_PKMW, lse_PKM = out_PKMW.index_select(0, plan.part_X), lse_PKM.index_select(0, plan.part_X)
    lse_ZTKM = lse_PKM.unflatten(0, (-1, plan.num_tokens))
    if plan.is_padding_ZT11 is not None:
        lse_ZTKM.masked_fill_(plan.is_padding_ZT11, -torch.inf)
    lse_TKM = lse_ZTKM.logsumexp(0)  # finite: every token sees itself
    if sinks_N is not None:  # a sink adds exp(sink) to the softmax's denominator and nothing to its sum
        lse_TKM = torch.logaddexp(lse_TKM, sinks_N.float().view(lse_TKM.shape[1:]))
    weight_ZTKM = (lse_ZTKM - lse_TKM).exp_()
    out_ZTKMW: Tensor = out_PKMW.float().unflatten(0, (-1, plan.num_tokens)).mul_(weight_ZTKM[..., None])
    out_TNW.copy_(out_ZTKMW.sum(0).flatten(1, 2))
    lse_TN.copy_(lse_TKM.flatten(1, 2))
