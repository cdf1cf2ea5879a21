"""From hidden states to tokens and log-probabilities, against direct ones."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from flexeval.engine.compute import readout
from flexeval.engine.compute.keeping import Keeper, shifts
from flexeval.engine.compute.readout import Readout, Tokens, read_row
from flexeval.engine.compute.sampling import sample
from flexeval.planning.rows import NO_SCORES, RowPlan, Scores
from flexeval.request import TokenRequest

NUM_TOKENS, HIDDEN_SIZE, VOCAB_SIZE = 12, 8, 50
REQUESTS = [
    TokenRequest(prompt_ids=(1,), max_tokens=4),
    TokenRequest(prompt_ids=(1,), max_tokens=4, temperature=0.7, seed=5),
    TokenRequest(prompt_ids=(1,), max_tokens=4, temperature=2.0, top_p=0.8, seed=6),
    TokenRequest(prompt_ids=(1,), max_tokens=4),
]
SAMPLED = {index: request for index, request in enumerate(REQUESTS) if request.temperature}


def scores_of(*pairs: tuple[int, int]) -> Scores:
    """Token `token_id` after token `offset` of the row, for each pair."""
    offsets, token_ids = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return Scores(offsets=offsets, token_ids=token_ids, places=np.arange(len(pairs)))


def plan_of(scores: Scores, *generators: tuple[int, int]) -> RowPlan:
    return RowPlan(
        token_ids=np.arange(NUM_TOKENS) % 5,
        positions=np.arange(NUM_TOKENS),
        scores=scores,
        generators=generators,
    )


# Two children may follow one token, and a token after which one is scored may also be continued.
PLAN = plan_of(scores_of((0, 9), (7, 3), (7, 49), (11, 0)), (4, 0), (4, 1), (7, 3), (11, 2))
NUM_DRAWN = {0: 0, 1: 3, 2: 1, 3: 2}


@pytest.fixture
def hidden_1TD() -> Tensor:
    return torch.randn(1, NUM_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))


class Head:
    """A linear head that notes how many positions it was asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, token_7: float | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.weight_DV = torch.randn(HIDDEN_SIZE, VOCAB_SIZE, generator=generator).to(dtype)
        self.num_positions: list[int] = []
        self.token_7 = token_7

    def __call__(self, hidden_1RD: Tensor) -> Tensor:
        self.num_positions.append(hidden_1RD.shape[1])
        logits_1RV = hidden_1RD.to(self.weight_DV.dtype) @ self.weight_DV
        if self.token_7 is not None:
            logits_1RV[..., 7] = self.token_7
        return logits_1RV


def read(
    hidden_1TD: Tensor,
    head: Head,
    *,
    plan: RowPlan = PLAN,
    num_top_logprobs: int = 3,
    keeper: Keeper | None = None,
) -> Readout:
    return read_row(
        plan,
        hidden_1TD,
        head,
        sampled=SAMPLED,
        num_drawn=NUM_DRAWN.__getitem__,
        vocab_size=VOCAB_SIZE,
        num_top_logprobs=num_top_logprobs,
        keeper=keeper,
    )


class Slow(NamedTuple):
    """What is read of one token."""

    token_id: int
    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


def read_slowly(hidden_1TD: Tensor, head: Head, plan: RowPlan, num_top: int) -> list[Slow]:
    """Scores, then draws, one at a time from log-probabilities in double precision."""
    logits_TV = head(hidden_1TD)[0]
    logprobs_TV = logits_TV.double().log_softmax(-1)
    asked = list(zip(plan.scores.offsets.tolist(), plan.scores.token_ids.tolist(), strict=True))
    for offset, request in plan.generators:
        is_greedy = REQUESTS[request].temperature == 0
        drawn = sample(logits_TV[offset], REQUESTS[request], NUM_DRAWN[request])
        asked.append((offset, int(logits_TV[offset].argmax()) if is_greedy else drawn))
    slow = []
    for offset, token_id in asked:
        top = logprobs_TV[offset].sort(descending=True)
        logprob = logprobs_TV[offset, token_id].item()
        slow.append(Slow(token_id, logprob, top.indices[:num_top].tolist(), top.values[:num_top].tolist()))
    return slow


@pytest.mark.parametrize("num_top", [1, 2, 5])
def test_of_equal_ones_that_which_is_drawn_comes_first(hidden_1TD: Tensor, num_top: int) -> None:
    """However many are asked for: logits in bfloat16 are often equal."""
    head = Head(torch.bfloat16)
    head.weight_DV[:, 1::2] = head.weight_DV[:, ::2]  # every token has another one that is as probable
    tokens = read(hidden_1TD, head, num_top_logprobs=num_top).drawn
    greedy = [index for index, (_, request) in enumerate(PLAN.generators) if REQUESTS[request].temperature == 0]
    assert greedy
    for index in greedy:
        assert tokens.top_ids_NK[index, 0] == tokens.token_ids_N[index] and tokens.token_ids_N[index] % 2 == 0
        assert len(set(tokens.top_ids_NK[index].tolist())) == num_top
        assert tokens.top_logprobs_NK[index, 0] == tokens.logprobs_N[index]


def assert_reads(measured: Readout, expected: list[Slow], *, has_ties: bool = False) -> None:
    num_scores = len(measured.scored.token_ids_N)
    for tokens, slow in ((measured.scored, expected[:num_scores]), (measured.drawn, expected[num_scores:])):
        assert tokens.token_ids_N.tolist() == [one.token_id for one in slow]
        assert tokens.logprobs_N.tolist() == pytest.approx([one.logprob for one in slow], abs=1e-5)
        for one, top in zip(slow, tokens.tops(), strict=True):
            assert [token_id for token_id, _ in top] == one.top_ids or has_ties
            assert [logprob for _, logprob in top] == pytest.approx(one.top_logprobs, abs=1e-5)


@pytest.mark.parametrize("num_top_logprobs", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_what_the_plan_asks_in_its_order(hidden_1TD: Tensor, dtype: torch.dtype, num_top_logprobs: int) -> None:
    head = Head(dtype)
    measured = read(hidden_1TD, head, num_top_logprobs=num_top_logprobs)
    assert head.num_positions == [4], "each needed position once"
    assert_reads(measured, read_slowly(hidden_1TD, head, PLAN, num_top_logprobs), has_ties=dtype == torch.bfloat16)


OFFSETS = st.integers(0, NUM_TOKENS - 1)
SCORES = st.lists(st.tuples(OFFSETS, st.integers(0, VOCAB_SIZE - 1)), max_size=20)
GENERATORS = st.lists(st.tuples(OFFSETS, st.integers(0, len(REQUESTS) - 1)), max_size=8)
EACH_ONCE = st.just([(offset, 0) for offset in range(NUM_TOKENS)])


@settings(deadline=None)
@given(
    SCORES | EACH_ONCE,
    GENERATORS | EACH_ONCE,
    st.integers(1, NUM_TOKENS + 1),
    st.sampled_from([0, 1, 3, VOCAB_SIZE, VOCAB_SIZE + 9]),
    st.integers(0, 3),
)
def test_any_plan_in_any_chunks_reads_the_same(
    scores: list[tuple[int, int]],
    generators: list[tuple[int, int]],
    rows_per_chunk: int,
    num_top: int,
    num_filling: int,
) -> None:
    """Runs of positions and gaps; chunks that score, that draw, and that do both."""
    plan = plan_of(scores_of(*sorted(scores)), *sorted(generators))
    generator = torch.Generator().manual_seed(0)
    hidden_1TD, head = torch.randn(1, NUM_TOKENS + num_filling, HIDDEN_SIZE, generator=generator), Head()
    with patch.object(readout, "CHUNK_BYTES", 4 * VOCAB_SIZE * 2 * rows_per_chunk + 3):
        measured = read(hidden_1TD, head, plan=plan, num_top_logprobs=num_top)
    num_wanted = len({offset for offset, _ in scores + generators})
    assert max(head.num_positions, default=0) == min(rows_per_chunk, num_wanted)
    assert sum(head.num_positions) == num_wanted
    assert_reads(measured, read_slowly(hidden_1TD, head, plan, num_top))


@pytest.mark.parametrize("rows_per_chunk", [1, 3, NUM_TOKENS])
def test_distributions_are_kept_at_each_position_by_its_token_and_place(
    hidden_1TD: Tensor, rows_per_chunk: int
) -> None:
    """In chunks of as many positions as without."""
    keeper, head = Keeper(4, VOCAB_SIZE, torch.device("cpu")), Head()
    with patch.object(readout, "CHUNK_BYTES", 4 * VOCAB_SIZE * 2 * rows_per_chunk):
        measured = read(hidden_1TD, head, keeper=keeper)
    assert max(head.num_positions) == min(rows_per_chunk, 4)
    assert_reads(measured, read_slowly(hidden_1TD, head, PLAN, 3))
    offsets = [*PLAN.scores.offsets.tolist(), *(offset for offset, _ in PLAN.generators)]
    kept_ids = np.concatenate([part.kept_ids_NC for part in measured])
    kept_logprobs = np.concatenate([part.kept_logprobs_NC for part in measured])
    for offset, ids, logprobs in zip(offsets, kept_ids, kept_logprobs, strict=True):
        place = shifts(PLAN.token_ids[[offset]], PLAN.positions[[offset]])
        logprobs_1V = head(hidden_1TD[:, [offset]])[0].log_softmax(-1)
        want_ids, want_logprobs = keeper.keep(logprobs_1V, torch.from_numpy(place))
        assert ids.tolist() == want_ids[0].tolist()
        assert logprobs == pytest.approx(want_logprobs[0].numpy(), abs=1e-5)


def test_results_hold_plain_numbers(hidden_1TD: Tensor) -> None:
    (top, *_) = read(hidden_1TD, Head()).scored.tops()
    assert [(type(token_id), type(logprob)) for token_id, logprob in top] == [(int, float)] * 3


def test_a_vocabulary_larger_than_a_chunk_is_read_one_position_at_a_time(
    hidden_1TD: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readout, "CHUNK_BYTES", 1)
    head = Head()
    read(hidden_1TD, head)
    assert head.num_positions == [1] * 4


class _Logits(TorchDispatchMode):
    """Sees every tensor as wide as the vocabulary, as long as it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[StorageWeakRef] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = operation(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim == 2 and out.shape[-1] == VOCAB_SIZE:
            self.seen.append(StorageWeakRef(out.untyped_storage()))
        return out


@pytest.mark.parametrize("num_top_logprobs", [0, 3])
@pytest.mark.parametrize("num_kept", [0, 4])
def test_what_was_read_of_a_chunk_does_not_hold_on_to_its_logits(
    hidden_1TD: Tensor, monkeypatch: pytest.MonkeyPatch, num_top_logprobs: int, num_kept: int
) -> None:
    """A row's wanted positions may have many times the logits of a chunk, which memory has room for."""
    monkeypatch.setattr(readout, "CHUNK_BYTES", 1)
    keeper = Keeper(num_kept, VOCAB_SIZE, torch.device("cpu")) if num_kept else None
    head, logits, fetch = Head(), _Logits(), readout._fetch
    num_held: list[int] = []

    def count(readings: Any) -> Any:
        num_held.append(sum(not seen.expired() for seen in logits.seen))
        return fetch(readings)

    monkeypatch.setattr(readout, "_fetch", count)
    with logits:
        read(hidden_1TD, head, num_top_logprobs=num_top_logprobs, keeper=keeper)
    assert len(head.num_positions) == 4 and len(logits.seen) >= 4
    assert num_held == [0]


def test_nothing_asked_runs_no_head(hidden_1TD: Tensor) -> None:
    head = Head()
    measured = read(hidden_1TD, head, plan=plan_of(NO_SCORES))
    assert [len(part.logprobs_N) for part in measured] == [0, 0] and head.num_positions == []


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["scores", "generators"])
@pytest.mark.parametrize("request_index", [0, 1])
def test_logits_that_are_not_finite_are_told(hidden_1TD: Tensor, bad: float, part: str, request_index: int) -> None:
    generators = ((4, request_index),) if part == "generators" else ()
    scores = scores_of((4, 3)) if part == "scores" else NO_SCORES
    measured = read(hidden_1TD, Head(token_7=bad), plan=plan_of(scores, *generators))
    assert [tokens.are_finite().tolist() for tokens in measured] == (
        [[False], []] if part == "scores" else [[], [False]]
    )


def test_a_ruled_out_token_is_no_failure_unless_it_is_the_one_scored(hidden_1TD: Tensor) -> None:
    plan = plan_of(scores_of((4, 3), (4, 7)), *PLAN.generators)
    measured = read(hidden_1TD, Head(token_7=-torch.inf), plan=plan)
    assert measured.scored.are_finite().tolist() == [True, False]
    assert measured.drawn.are_finite().tolist() == [True] * 4


def test_an_order_that_does_not_ascend_is_our_bug(hidden_1TD: Tensor) -> None:
    with pytest.raises(AssertionError):
        read(hidden_1TD, Head(), plan=plan_of(scores_of((7, 3), (0, 9))))


def test_tops_of_nobody_are_empty() -> None:
    assert Tokens.zeros(2, 0).tops() == [(), ()] and Tokens.zeros(0, 3).tops() == []
