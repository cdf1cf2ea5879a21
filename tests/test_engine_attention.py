"""Attention over hand-made rows: every token by itself in float64, over exactly the tokens it should see.

A row's plan is written down by hand; what each token sees is derived from its path alone.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexeval.engine.codecs.kv_format import CodedFormat, KeysValues, KVCoding, KVFormat, KVLog, KVShape, make_format
from flexeval.engine.compute.attention import PackedAttention, attend_above, complete
from flexeval.engine.compute.contexts import DecodeBatch
from flexeval.engine.compute.dense import dense_attention
from flexeval.engine.compute.host_attention import HostAttention
from flexeval.engine.compute.host_plan import HostPlan
from flexeval.engine.compute.host_team import build
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import RowMaker
from flexeval.planning.rows import AncestorSpan, DecodeSpan, FreshSpan, KeySource, RowPlan

NUM_HEADS, NUM_KV_HEADS, KEY_SIZE = 4, 2, 16


class Tokens:
    """Every token there is: runs by name, each token with a query, a key and a value."""

    def __init__(self, lengths: dict[str, int], *, value_size: int, device: str):
        ends = list(accumulate(lengths.values()))
        self.runs = {name: range(end - lengths[name], end) for name, end in zip(lengths, ends, strict=True)}
        generator = torch.Generator().manual_seed(0)
        self.q_TNH = torch.randn(ends[-1], NUM_HEADS, KEY_SIZE, generator=generator).to(device)
        self.k_TKH = torch.randn(ends[-1], NUM_KV_HEADS, KEY_SIZE, generator=generator).to(device)
        self.v_TKW = torch.randn(ends[-1], NUM_KV_HEADS, value_size, generator=generator).to(device)
        self.given: KeysValues | None = None
        """What rests in logs, where that is coded: `k_TKH` and `v_TKW` are what comes back."""

    def turn(self, dtype: torch.dtype, coding: KVCoding | None) -> None:
        """Numbers of another type, and keys and values as they come back from a log."""
        self.q_TNH, self.k_TKH, self.v_TKW = (x.to(dtype) for x in (self.q_TNH, self.k_TKH, self.v_TKW))
        self.given = KeysValues(self.k_TKH, self.v_TKW)
        form = self.form(coding)
        if isinstance(form, CodedFormat):
            groups = (x.reshape(-1, form.codec.group_size).cpu() for x in self.given)
            run = [form.codec.encode_groups(group) for group in groups]
            back = [
                (affine[:, 1:].float() + affine[:, :1].float() * unpacked(codes, form.codec.bits)).to(dtype)
                for codes, affine in run
            ]
            self.k_TKH, self.v_TKW = (b.view(x.shape).to(x.device) for b, x in zip(back, self.given, strict=True))

    def form(self, coding: KVCoding | None) -> KVFormat:
        """How a log holds them."""
        shape = KVShape(NUM_KV_HEADS, KEY_SIZE, self.v_TKW.shape[-1])
        return make_format(shape, self.k_TKH.dtype, coding)

    def log(self, tokens: list[int | None], coding: KVCoding | None) -> KVLog:
        """Some tokens as they rest; NaN, which must never be read, where there is none."""
        assert self.given is not None
        index = torch.tensor([-1 if token is None else token for token in tokens])
        parts = [part[index].clone() for part in self.given]
        for part in parts:
            part[index < 0] = torch.nan
        form = self.form(coding)
        data_CB = torch.empty(len(tokens), form.token_bytes, dtype=torch.uint8, device=self.k_TKH.device)
        form.write(*parts, data_CB)
        return KVLog(form, data_CB)

    def keys_values(self, tokens: list[int | None]) -> KeysValues:
        """KV of some tokens; NaN, which must never be read, where there is none."""
        index = torch.tensor([-1 if token is None else token for token in tokens])
        keys_CKH, values_CKW = self.k_TKH[index].clone(), self.v_TKW[index].clone()
        keys_CKH[index < 0], values_CKW[index < 0] = torch.nan, torch.nan
        return KeysValues(keys_CKH, values_CKW)

    def attend(self, path: list[int], options: AttentionOptions) -> Tensor:
        """What the last token of a path sees of it, in float64."""
        first = 0 if options.window is None else max(0, len(path) - options.window)
        heads = torch.arange(NUM_HEADS) // (NUM_HEADS // NUM_KV_HEADS)
        k_SNH = self.k_TKH.cpu().double()[path[first:]][:, heads]
        scores_NS = torch.einsum("nh,snh->ns", self.q_TNH[path[-1]].cpu().double(), k_SNH) * options.scale
        if options.softcap is not None:
            scores_NS = options.softcap * (scores_NS / options.softcap).tanh()
        total_N = scores_NS.exp().sum(1)
        if options.sinks_N is not None:
            total_N += options.sinks_N.cpu().double().exp()
        weights_NS = scores_NS.exp() / total_N[:, None]
        return torch.einsum("ns,snw->nw", weights_NS, self.v_TKW.cpu().double()[path[first:]][:, heads])


class HandMadeContext:
    """KV of earlier tokens, from literal tables."""

    def __init__(
        self,
        tokens: Tokens,
        *,
        logs: dict[int, list[int | None]],
        scratch: dict[int, list[int]],
        coding: KVCoding | None = None,
    ):
        self._tokens, self._logs, self._scratch, self.coding = tokens, logs, scratch, coding

    def own_log(self, batch: DecodeBatch) -> KVLog:
        return self._tokens.log(self._logs[batch.span.group], self.coding)

    def ancestor(self, span: AncestorSpan) -> KeysValues:
        source = span.source
        if source.scratch_node is not None:
            return self._tokens.keys_values(list(self._scratch[source.scratch_node]))
        assert source.group is not None and source.row_start is None
        places = slice(source.log_start, source.log_start + span.num_keys)
        return self._tokens.log(self._logs[source.group], self.coding).at(places)


def unpacked(codes_GP: Tensor, bits: int) -> Tensor:
    """The codes themselves, one after the other."""
    return torch.cat([codes_GP >> bits * part & 2**bits - 1 for part in range(8 // bits)], dim=1)


OPTIONS = {
    "plain": {},
    "window": {"window": 4},
    "window-of-one": {"window": 1},
    "window-into-ancestor": {"window": 30},
    "softcap": {"softcap": 1.2},
    "sinks": {"sinks_N": [-1.0, 0.0, 1.0, 4.0]},
    "everything": {"window": 11, "softcap": 2.0, "sinks_N": [0.5, -3.0, 2.0, 0.0]},
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=OPTIONS)
def options(request: pytest.FixtureRequest, device: str) -> AttentionOptions:
    chosen = dict(OPTIONS[request.param])
    if "sinks_N" in chosen:
        chosen["sinks_N"] = torch.tensor(chosen["sinks_N"], device=device)
    return AttentionOptions(scale=0.4, **chosen)


def check(
    plan: RowPlan, tokens: Tokens, row: list[int], paths: list[list[int]], context: HandMadeContext, **how: object
) -> int:
    """Compare a row's attention with each of its tokens' own; how many keys the CPU read for it in host memory."""
    options, dtype = how["options"], how.get("dtype", torch.float32)
    assert isinstance(options, AttentionOptions) and isinstance(dtype, torch.dtype)
    assert [path[-1] for path in paths] == row
    index = torch.tensor(row)
    tokens.turn(dtype, context.coding)
    made = RowMaker(tokens.q_TNH.device).make(0, plan)
    q_TNH, k_TKH, v_TKW = tokens.q_TNH[index], tokens.k_TKH[index], tokens.v_TKW[index]
    expected_TNW = torch.stack([tokens.attend(path, options) for path in paths])
    attentions = (PackedAttention(), dense_attention(q_TNH.device))
    outs, num_read = [attention(q_TNH, k_TKH, v_TKW, options, made, context) for attention in attentions], 0
    if plan.decode and q_TNH.device.type == "cpu":
        for kernel in (None, build(2)):  # torch's, and ours, which reads heads of some sizes only
            attending = HostAttention(kernel, num_threads=2).begin(q_TNH, options, made, context)
            outs.append(attending.wait())
            num_read = attending.num_keys
            own = HostAttention(kernel, num_threads=2, sees_above=False).begin(q_TNH, options, made, context)
            above = attend_above(q_TNH, options, made, context) if made.ancestors else None
            outs.append(complete(own.wait(), own.lse_TN, above, options))
    tolerance = 3e-6 if dtype == torch.float32 else 0.03
    for out_TNW in outs:
        assert out_TNW.dtype == dtype
        torch.testing.assert_close(out_TNW.cpu().double(), expected_TNW, atol=tolerance, rtol=0)
    return num_read


def upto(*runs: range) -> list[list[int]]:
    """The paths of each token of the last run, after all of the runs before it."""
    *before, own = [list(run) for run in runs]
    return [[token for run in before for token in run] + own[: index + 1] for index in range(len(own))]


LENGTHS = {"header": 40, "a": 3, "b": 25, "c": 1, "alone": 60, "e": 5, "f": 2, "in_log": 5, "in_scratch": 7}
FRESH = RowPlan(
    token_ids=(0,) * 136,
    positions=(*range(40), *range(40, 43), *range(40, 65), 65, *range(60), *range(12, 17), *range(12, 14)),
    fresh=(
        FreshSpan(node=0, start=0, length=40),
        FreshSpan(node=1, start=40, length=3),
        FreshSpan(node=2, start=43, length=25),
        FreshSpan(node=3, start=68, length=1),
        FreshSpan(node=4, start=69, length=60),
        FreshSpan(node=5, start=129, length=5),
        FreshSpan(node=6, start=134, length=2),
    ),
    ancestors=(
        AncestorSpan(
            start=40, length=29, num_keys=40, first_key_position=0, last_position=65, source=KeySource(row_start=0)
        ),
        AncestorSpan(
            start=68, length=1, num_keys=25, first_key_position=40, last_position=65, source=KeySource(row_start=43)
        ),
        AncestorSpan(
            start=129,
            length=7,
            num_keys=5,
            first_key_position=0,
            last_position=16,
            source=KeySource(group=3, log_start=2),
        ),
        AncestorSpan(
            start=129, length=7, num_keys=7, first_key_position=5, last_position=16, source=KeySource(scratch_node=9)
        ),
    ),
)


@pytest.mark.parametrize("value_size", [KEY_SIZE, 12])
def test_fresh_nodes_of_ragged_lengths_under_ancestors_in_row_log_and_scratch(
    options: AttentionOptions, value_size: int, device: str
) -> None:
    check_fresh(options, value_size=value_size, device=device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fresh_nodes_in_half_precision(options: AttentionOptions, dtype: torch.dtype, device: str) -> None:
    check_fresh(options, value_size=KEY_SIZE, device=device, dtype=dtype)


def check_fresh(options: AttentionOptions, *, value_size: int, device: str, dtype: torch.dtype = torch.float32) -> None:
    tokens = Tokens(LENGTHS, value_size=value_size, device=device)
    run = tokens.runs
    paths = [
        *upto(run["header"]),
        *upto(run["header"], run["a"]),
        *upto(run["header"], run["b"]),
        *upto(run["header"], run["b"], run["c"]),
        *upto(run["alone"]),
        *upto(run["in_log"], run["in_scratch"], run["e"]),
        *upto(run["in_log"], run["in_scratch"], run["f"]),
    ]
    context = HandMadeContext(
        tokens, logs={3: [None, None, *run["in_log"], None]}, scratch={9: list(run["in_scratch"])}
    )
    check(FRESH, tokens, list(range(136)), paths, context, options=options, dtype=dtype)


DECODE = RowPlan(
    token_ids=(0, 0, 0),
    positions=(13, 14, 1),
    decode=(
        DecodeSpan(
            group=0,
            start=0,
            log_length=9,
            own_tokens=((0, 1, 2, 7, 9), (3, 4, 5, 6, 8, 10)),
            first_own_positions=(9, 9),
            version=1,
        ),
        DecodeSpan(group=2, start=2, log_length=1, own_tokens=((0, 1),), first_own_positions=(0,), version=1),
    ),
    ancestors=(
        AncestorSpan(
            start=0,
            length=2,
            num_keys=9,
            first_key_position=0,
            last_position=14,
            source=KeySource(group=1, log_start=4),
        ),
    ),
)


CODINGS = [None, KVCoding(8, 64), KVCoding(4, 64), KVCoding(4, 6), KVCoding(2, 8)]


@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_size", [KEY_SIZE, 8])
def test_sequences_that_decode_from_two_logs_under_a_shared_header(
    options: AttentionOptions, value_size: int, dtype: torch.dtype, coding: KVCoding | None, device: str
) -> None:
    """In the first log the sequences' tokens lie between each other's, as they were computed."""
    tokens = Tokens({"header": 9, "x": 5, "y": 6, "z": 2}, value_size=value_size, device=device)
    header, x, y, z = (list(run) for run in tokens.runs.values())
    logs = {0: [*x[:3], *y[:4], x[3], y[4], x[4], y[5], None], 1: [None] * 4 + header, 2: [*z, None]}
    paths = [header + x, header + y, z]
    context = HandMadeContext(tokens, logs=logs, scratch={}, coding=coding)
    check(DECODE, tokens, [x[-1], y[-1], z[-1]], paths, context, options=options, dtype=dtype)


def lived_in(*, num_steps: int) -> tuple[RowPlan, dict[str, int], list[int | None]]:
    """Three sequences under a header, their prompts one after the other and their steps by turns; one came later."""
    prompts, late = (150, 3, 70), 40
    own: list[list[int]] = [[], [], []]
    order: list[int] = []  # whose token lies at each place

    def append(sequence: int) -> None:
        own[sequence].append(len(order))
        order.append(sequence)

    for sequence in (0, 1):
        for _ in range(prompts[sequence]):
            append(sequence)
    for step in range(num_steps):
        if step == late:
            for _ in range(prompts[2]):
                append(2)
        for sequence in (0, 1, 2) if step > late else (0, 1):
            append(sequence)
    places = [np.array(tokens, dtype=np.int32) for tokens in own]
    positions = tuple(90 + len(tokens) - 1 for tokens in own)
    plan = RowPlan(
        token_ids=(0, 0, 0),
        positions=positions,
        decode=(
            DecodeSpan(
                group=0,
                start=0,
                log_length=len(order) - 3,
                own_tokens=places,
                first_own_positions=(90, 90, 90),
                version=1,
            ),
        ),
        ancestors=(
            AncestorSpan(
                start=0,
                length=3,
                num_keys=90,
                first_key_position=0,
                last_position=max(positions),
                source=KeySource(group=1, log_start=1),
            ),
        ),
    )
    lengths = {"header": 90, **{name: len(tokens) for name, tokens in zip("xyz", own, strict=True)}}
    starts = [90, 90 + lengths["x"], 90 + lengths["x"] + lengths["y"]]
    taken = [0, 0, 0]
    log: list[int | None] = []
    for sequence in order:
        log.append(starts[sequence] + taken[sequence])
        taken[sequence] += 1
    return plan, lengths, log


@pytest.mark.parametrize("coding", [None, KVCoding(4, 64)], ids=str)
@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("window", [None, 1, 100, 300])
@pytest.mark.parametrize(
    ("dtype", "value_size"), [(torch.float32, KEY_SIZE), (torch.float32, 12), (torch.float16, KEY_SIZE)]
)
def test_long_contexts_are_read_where_they_lie(
    dtype: torch.dtype,
    value_size: int,
    window: int | None,
    is_cut: bool,
    coding: KVCoding | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Contexts are cut into parts where many threads want to be busy."""
    if is_cut:
        monkeypatch.setattr("flexeval.engine.compute.host_plan.MIN_PART_TOKENS", 7)
        monkeypatch.setattr("flexeval.engine.compute.host_plan.PIECES_PER_THREAD", 100)
    plan, lengths, log = lived_in(num_steps=180)
    tokens = Tokens(lengths, value_size=value_size, device="cpu")
    header, *own = (list(run) for run in tokens.runs.values())
    context = HandMadeContext(tokens, logs={0: log, 1: [None, *header]}, scratch={}, coding=coding)
    options = AttentionOptions(scale=0.4, window=window, sinks_N=torch.tensor([0.5, -3.0, 2.0, 0.0]))
    paths = [header + run for run in own]
    num_read = check(plan, tokens, [path[-1] for path in paths], paths, context, options=options, dtype=dtype)
    num_own = sum(min(len(run), window or len(run)) for run in own)
    seen = [min(90, max(0, (window or 9999) - len(run))) for run in own]
    assert num_read == num_own + max(seen), "nothing that a window hides"


class Calls(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attends = self.num_others = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.num_attends += "attention" in operator.name()
        self.num_others += "attention" not in operator.name()
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("has_kernel", "num_attends", "most_others"), [(True, 0, 12), (False, 1, 24)])
@pytest.mark.parametrize("num_sequences", [10, 40])
def test_a_row_takes_few_calls(
    num_sequences: int, has_kernel: bool, num_attends: int, most_others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many sequences it has; layers that see as far share one plan."""
    plans: list[HostPlan] = []

    def plan_for(*args: Any, **kwargs: Any) -> HostPlan:
        plans.append(HostPlan(*args, **kwargs))
        return plans[-1]

    monkeypatch.setattr("flexeval.engine.compute.host_attention.HostPlan", plan_for)
    starts, num_prompt, num_drawn = range(0, 70 * num_sequences, 70), 70 * num_sequences, 9
    own = [
        [*range(start, start + 70), *range(num_prompt + index, num_prompt + num_sequences * num_drawn, num_sequences)]
        for index, start in enumerate(starts)
    ]
    num_tokens = num_prompt + num_sequences * num_drawn
    tokens = Tokens({"all": num_tokens}, value_size=KEY_SIZE, device="cpu")
    tokens.turn(torch.float32, None)
    span = DecodeSpan(
        group=0,
        start=0,
        log_length=num_tokens - num_sequences,
        own_tokens=own,
        first_own_positions=[0] * num_sequences,
        version=1,
    )
    positions = (69 + num_drawn,) * num_sequences
    plan = RowPlan(token_ids=(0,) * num_sequences, positions=positions, decode=(span,))
    row = RowMaker(torch.device("cpu")).make(0, plan)
    attention = HostAttention(build(2) if has_kernel else None, num_threads=2)
    context = HandMadeContext(tokens, logs={0: list(range(num_tokens))}, scratch={})
    log = context.own_log(row.decode[0])
    monkeypatch.setattr(context, "own_log", lambda batch: log)
    index = torch.tensor([places[-1] for places in own])
    for window in (None, 30, None, 30):
        options = AttentionOptions(scale=0.4, window=window)
        with Calls() as calls:
            out_TNW = attention.begin(tokens.q_TNH[index], options, row, context).wait()
        expected_TNW = torch.stack([tokens.attend(path, options) for path in own])
        torch.testing.assert_close(out_TNW.double(), expected_TNW, atol=3e-6, rtol=0)
    assert calls.num_attends == num_attends
    assert calls.num_others <= most_others
    assert len(plans) == 2
    attention.begin(tokens.q_TNH[index], options, RowMaker(torch.device("cpu")).make(0, replace(plan)), context)
    assert len(plans) == 3, "another step"


def test_spans_of_very_different_lengths_are_not_padded_to_the_longest() -> None:
    lengths = [1, 2, 16, 17, 18, *[50] * 10, 100, 200, 220]
    starts = [0, *accumulate(lengths)]
    spans = tuple(FreshSpan(node=i, start=starts[i], length=length) for i, length in enumerate(lengths))
    plan = RowPlan(token_ids=(0,) * sum(lengths), positions=(0,) * sum(lengths), fresh=spans)
    row = RowMaker(torch.device("cpu")).make(0, plan)
    held = torch.cat([batch.token_M for batch in row.fresh])
    assert sorted(held.tolist()) == list(range(sum(lengths))), "every token once"
    assert sum(batch.index_BL.numel() for batch in row.fresh) < 1.25 * sum(lengths)
