"""From hidden states to tokens: log-probabilities against direct ones, samples against their distribution."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from flexeval.engine.compute import readout
from flexeval.engine.compute.readout import Readout, draw_tokens, read_row, sample, top_logprobs
from flexeval.errors import ModelError
from flexeval.planning.rows import RowPlan, Score
from flexeval.request import TokenRequest

NUM_TOKENS, HIDDEN_SIZE, VOCAB_SIZE = 12, 8, 50
REQUESTS = [
    TokenRequest(prompt_ids=(1,), max_tokens=4),
    TokenRequest(prompt_ids=(1,), max_tokens=4, temperature=0.7, seed=5),
    TokenRequest(prompt_ids=(1,), max_tokens=4, temperature=2.0, top_p=0.8, seed=6),
    TokenRequest(prompt_ids=(1,), max_tokens=4),
]
PLAN = RowPlan(
    token_ids=(0,) * NUM_TOKENS,
    positions=tuple(range(NUM_TOKENS)),
    scores=(  # two children may follow one token, and a token that is scored may also be continued
        Score(offset=7, token_id=3, node=1, index=0),
        Score(offset=0, token_id=9, node=0, index=1),
        Score(offset=7, token_id=49, node=2, index=0),
        Score(offset=11, token_id=0, node=3, index=4),
    ),
    generators=((11, 2), (4, 0), (4, 1), (7, 3)),
)
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


def read(hidden_1TD: Tensor, head: Head, *, plan: RowPlan = PLAN, num_top_logprobs: int = 3) -> Readout:
    return read_row(
        plan,
        hidden_1TD,
        head,
        requests=REQUESTS,
        num_drawn=NUM_DRAWN,
        vocab_size=VOCAB_SIZE,
        num_top_logprobs=num_top_logprobs,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_what_the_plan_asks_in_its_order(hidden_1TD: Tensor, dtype: torch.dtype) -> None:
    head = Head(dtype)
    logits_TV = (hidden_1TD[0].to(dtype) @ head.weight_DV).double()
    logprobs_TV = logits_TV.log_softmax(-1)
    measured = read(hidden_1TD, head)
    assert head.num_positions == [4], "each needed position once"
    assert [scored.logprob for scored in measured.scored] == pytest.approx(
        [logprobs_TV[score.offset, score.token_id].item() for score in PLAN.scores], abs=1e-5
    )
    for (offset, request), drawn in zip(PLAN.generators, measured.drawn, strict=True):
        asked = REQUESTS[request]
        greedy = int(logits_TV[offset].argmax())
        expected = sample(logits_TV[offset], asked, NUM_DRAWN[request]) if asked.temperature else greedy
        assert drawn.token_id == expected
        assert drawn.logprob == pytest.approx(logprobs_TV[offset, expected].item(), abs=1e-5), "at temperature 1"
    for offset, tops in [
        *((score.offset, scored.top_logprobs) for score, scored in zip(PLAN.scores, measured.scored, strict=True)),
        *((offset, drawn.top_logprobs) for (offset, _), drawn in zip(PLAN.generators, measured.drawn, strict=True)),
    ]:
        order = logprobs_TV[offset].argsort(descending=True)[:3].tolist()
        assert [token for token, _ in tops] == order or dtype != torch.float32  # bfloat16 has ties
        assert [logprob for _, logprob in tops] == pytest.approx(logprobs_TV[offset, order].tolist(), abs=1e-5)


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 3])
def test_reading_in_chunks_changes_nothing(
    hidden_1TD: Tensor, rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(hidden_1TD, Head())
    monkeypatch.setattr(readout, "CHUNK_BYTES", 4 * VOCAB_SIZE * rows_per_chunk + 3)
    head = Head()
    chunked = read(hidden_1TD, head)
    assert max(head.num_positions) == rows_per_chunk and sum(head.num_positions) == 4
    for name in ("scored", "drawn"):
        for one, other in zip(getattr(whole, name), getattr(chunked, name), strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert [token for token, _ in one.top_logprobs] == [token for token, _ in other.top_logprobs]
    assert [drawn.token_id for drawn in whole.drawn] == [drawn.token_id for drawn in chunked.drawn]


def test_a_vocabulary_larger_than_a_chunk_is_read_one_position_at_a_time(
    hidden_1TD: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readout, "CHUNK_BYTES", 1)
    head = Head()
    read(hidden_1TD, head)
    assert head.num_positions == [1] * 4


def test_nothing_asked_runs_no_head(hidden_1TD: Tensor) -> None:
    head = Head()
    plan = dataclasses.replace(PLAN, scores=(), generators=())
    assert read(hidden_1TD, head, plan=plan) == Readout([], []) and head.num_positions == []


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["scores", "generators"])
@pytest.mark.parametrize("request_index", [0, 1])
def test_logits_that_are_not_finite_are_refused(hidden_1TD: Tensor, bad: float, part: str, request_index: int) -> None:
    generators = ((4, request_index),) if part == "generators" else ()
    scores = (Score(offset=4, token_id=3, node=0, index=0),) if part == "scores" else ()
    with pytest.raises(ModelError, match=r"not finite.*--dtype float32"):
        read(hidden_1TD, Head(token_7=bad), plan=dataclasses.replace(PLAN, scores=scores, generators=generators))


def test_a_ruled_out_token_is_no_failure_unless_it_is_the_one_scored(hidden_1TD: Tensor) -> None:
    plan = dataclasses.replace(PLAN, scores=(Score(offset=4, token_id=3, node=0, index=0),))
    assert len(read(hidden_1TD, Head(token_7=-torch.inf), plan=plan).drawn) == 4
    plan = dataclasses.replace(PLAN, scores=(Score(offset=4, token_id=7, node=0, index=0),))
    with pytest.raises(ModelError, match="not finite"):
        read(hidden_1TD, Head(token_7=-torch.inf), plan=plan)


def test_top_logprobs_are_no_more_than_there_are() -> None:
    logprobs_RV = torch.tensor([[0.1, 0.7, 0.2]]).log()
    assert [token for token, _ in top_logprobs(logprobs_RV, 9)[0]] == [1, 2, 0]
    assert top_logprobs(logprobs_RV, 0) == [()]


# -- sampling ----------------------------------------------------------------------------------------------------------

LOGITS_V = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.5, -3.0])
NUM_SAMPLES = 1500


def distribution(temperature: float, top_p: float) -> Tensor:
    """Softmax at a temperature, cut to the smallest set that holds `top_p`, and scaled back to 1."""
    probs_V = (LOGITS_V.double() / temperature).softmax(-1)
    order = probs_V.argsort(descending=True).tolist()
    kept, total = [], 0.0
    for token in order:
        if total >= top_p:
            break
        kept.append(token)
        total += float(probs_V[token])
    out_V = torch.zeros_like(probs_V)
    out_V[kept] = probs_V[kept] / total
    return out_V


def request(**values: float) -> TokenRequest:
    return TokenRequest(prompt_ids=(1,), max_tokens=1, **values)


@pytest.mark.parametrize("stream", ["seeds", "steps"])
@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (3.0, 1.0), (1.0, 0.9), (1.0, 0.5), (2.0, 0.7)]
)
def test_samples_have_the_right_distribution(temperature: float, top_p: float, stream: str) -> None:
    """Chi-square over consecutive seeds and over the consecutive steps of one seed; both are fixed."""
    asked = request(temperature=temperature, top_p=top_p)
    places = [(draw, 0) if stream == "seeds" else (3, draw) for draw in range(NUM_SAMPLES)]
    tokens = [sample(LOGITS_V, dataclasses.replace(asked, seed=seed), step) for seed, step in places]
    counts_V = torch.bincount(torch.tensor(tokens), minlength=len(LOGITS_V))
    expected_V = distribution(temperature, top_p) * NUM_SAMPLES
    assert counts_V[expected_V == 0].sum() == 0, "nothing from outside the nucleus"
    possible = expected_V > 0
    if possible.sum() > 1:
        assert chisquare(counts_V[possible].numpy(), expected_V[possible].numpy()).pvalue > 1e-3


def test_neighbouring_seeds_and_steps_draw_independently() -> None:
    """Pairs of draws from neighbouring streams fill the square of two choices evenly."""
    logits_V = torch.zeros(4)
    for seed_step, next_step in (((1, 0), (0, 1)), ((0, 1), (1, 0)), ((1, 0), (1, 1))):
        counts = torch.zeros(4, 4)
        for draw in range(NUM_SAMPLES):
            seed, step = draw * seed_step[0], draw * seed_step[1]
            one = sample(logits_V, request(temperature=1.0, seed=seed), step)
            other = sample(logits_V, request(temperature=1.0, seed=seed + next_step[0]), step + next_step[1])
            counts[one, other] += 1
        assert chisquare(counts.flatten().numpy()).pvalue > 1e-3


def test_a_sample_does_not_depend_on_the_batch() -> None:
    logits_RV = torch.randn(40, 30, generator=torch.Generator().manual_seed(2))
    asked = [request(temperature=1.0, top_p=0.9, seed=seed) for seed in range(40)]
    together = draw_tokens(logits_RV, range(40), asked, [seed % 3 for seed in range(40)])
    alone = [draw_tokens(logits_RV[[i]], [0], [asked[i]], [i % 3])[0] for i in reversed(range(40))]
    assert together == alone[::-1]
    assert draw_tokens(logits_RV, [], [], []) == []
    global_state = torch.get_rng_state()
    sample(logits_RV[0], asked[0], 0)
    assert torch.equal(torch.get_rng_state(), global_state), "nobody else's stream is touched"


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-3])
def test_a_very_low_temperature_is_greedy(temperature: float) -> None:
    logits_V = torch.tensor([-50.0, 700.0, 699.0, -torch.inf])
    assert {sample(logits_V, request(temperature=temperature, seed=seed), 0) for seed in range(20)} == {1}


def test_a_very_high_temperature_is_uniform() -> None:
    logits_V = torch.tensor([-50.0, 700.0, 0.0, 3.0])
    tokens = [sample(logits_V, request(temperature=1e308, seed=seed), 0) for seed in range(NUM_SAMPLES)]
    assert chisquare(torch.bincount(torch.tensor(tokens), minlength=4).numpy()).pvalue > 1e-3


def test_a_very_small_nucleus_holds_the_most_probable_token_alone() -> None:
    for temperature in (1.0, 100.0):
        asked = request(temperature=temperature, top_p=5e-324)
        assert {sample(LOGITS_V, dataclasses.replace(asked, seed=seed), 0) for seed in range(20)} == {2}


def test_a_nucleus_holds_no_more_tokens_than_it_needs() -> None:
    two_equal_V = torch.zeros(2)
    for top_p, possible in ((0.5, {0}), (0.51, {0, 1})):
        asked = [request(temperature=1.0, top_p=top_p, seed=seed) for seed in range(20)]
        assert {sample(two_equal_V, one, 0) for one in asked} == possible


def test_a_token_that_is_ruled_out_is_never_drawn() -> None:
    logits_V = torch.full((1000,), -torch.inf)
    logits_V[[17, 900]] = 0.0
    assert {sample(logits_V, request(temperature=9.0, seed=seed), 0) for seed in range(50)} == {17, 900}
