"""A peer held against the engine: ratios, and what a part of the work says of the whole."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from flexeval.bench.comparison import hold_against
from flexeval.bench.figures import BenchResults, PhaseFigures, SystemFigures, TokenFigures, WholeFigures
from flexeval.bench.table import print_bench
from flexeval.bench.timing import Measured
from flexeval.errors import ConfigError
from flexeval.request import Request

NUM_REQUESTS, PROMPT_LEN, GEN_LEN = 64, 512, 32
REQUESTS = [Request(prompt=(5,) * PROMPT_LEN, max_tokens=GEN_LEN, detokenize=False)] * NUM_REQUESTS
PREFILL_S, STEP_S = 9.2, 7.5
"""Of a batch of 16: Accelerate, OPT-30B in 24 GiB of an H100."""


def measured(system: str, num_requests: int, gen_len: int, seconds: tuple[float, float], num_steps: int) -> Measured:
    """A system whose answers count up from 100."""
    num_prompt, num_generated = num_requests * PROMPT_LEN, num_requests * gen_len
    num_decode = num_generated - num_requests
    phases = {
        "prefill": PhaseFigures(elapsed_s=seconds[0], num_sweeps=4, num_fresh_tokens=num_prompt, num_decode_tokens=0)
    }
    if num_steps:
        phases["decode"] = PhaseFigures(
            elapsed_s=seconds[1], num_sweeps=num_steps, num_fresh_tokens=0, num_decode_tokens=num_decode
        )
    figures = SystemFigures(
        system=system,
        setting="none",
        num_requests=num_requests,
        batch_size=16,
        load_s=1.0,
        elapsed_s=sum(seconds),
        all_elapsed_s=[sum(seconds)],
        tokens=TokenFigures(
            num_asked=num_prompt,
            num_duplicate=0,
            num_shared=0,
            num_computed=num_prompt,
            num_generated=num_generated,
        ),
        phases=phases,
        peak_bytes={},
    )
    return Measured(figures, [tuple(range(100, 100 + gen_len))] * num_requests, {})


OURS = measured("flexeval", NUM_REQUESTS, GEN_LEN, (4.0, 56.0), 31)


def accelerate(num_batches: int, gen_len: int) -> Measured:
    """Batches of 16 at Accelerate's pace."""
    seconds = (num_batches * PREFILL_S, num_batches * (gen_len - 1) * STEP_S)
    return measured("accelerate", 16 * num_batches, gen_len, seconds, num_batches * (gen_len - 1))


def test_a_part_gives_the_ratio_that_the_whole_would() -> None:
    """16 of 64 requests and 4 of 32 tokens: a 29th of the time."""
    whole = hold_against(accelerate(4, 32), [OURS], REQUESTS, asked=range(64), max_tokens=None)
    part = hold_against(accelerate(1, 4), [OURS], REQUESTS, asked=range(0, 64, 4), max_tokens=4)
    assert whole.whole is None and whole.elapsed_s == pytest.approx(4 * (PREFILL_S + 31 * STEP_S))
    assert part.whole == WholeFigures(
        num_requests=64, num_generated=64 * 32, elapsed_s=pytest.approx(whole.elapsed_s), batch_size=16
    )
    assert part.elapsed_s == pytest.approx(PREFILL_S + 3 * STEP_S), "what was measured stays what it is"
    assert part.requests_per_s == pytest.approx(whole.requests_per_s)
    assert part.generated_tokens_per_s == pytest.approx(whole.generated_tokens_per_s)
    for speedup in (whole.speedups["none"], part.speedups["none"]):
        assert speedup.requests == pytest.approx(whole.elapsed_s / 60.0)
        assert speedup.prompt_tokens == pytest.approx(4 * PREFILL_S / 4.0)
        assert speedup.decode_tokens == pytest.approx(4 * 31 * STEP_S / 56.0)
    assert whole.same_answers == part.same_answers == 1.0, "as far as they go"


def test_answers_are_compared_request_by_request() -> None:
    peer = accelerate(1, 4)
    wrong = peer._replace(answers=[(1, 2, 3, 4), *peer.answers[1:]])
    figures = hold_against(wrong, [OURS], REQUESTS, asked=range(16), max_tokens=4)
    assert figures.same_answers == 15 / 16
    whole = hold_against(peer, [OURS], REQUESTS, asked=range(16), max_tokens=None)
    assert whole.same_answers == 0.0, "a shorter answer is another one, unless it was cut"


def test_one_pass_is_estimated_by_prompt_tokens_alone() -> None:
    scored = [dataclasses.replace(request, max_tokens=0, echo=True) for request in REQUESTS]
    ours, peer = measured("flexeval", 64, 0, (4.0, 0.0), 0), measured("accelerate", 16, 0, (PREFILL_S, 0.0), 0)
    figures = hold_against(peer, [ours], scored, asked=range(16), max_tokens=None)
    assert figures.whole is not None and figures.whole.elapsed_s == pytest.approx(4 * PREFILL_S)
    assert figures.speedups["none"].decode_tokens is None
    assert figures.generated_tokens_per_s is None


def test_a_part_that_generates_nothing_says_nothing_of_decoding() -> None:
    with pytest.raises(ConfigError, match="--peer-requests"):
        hold_against(
            measured("accelerate", 16, 1, (PREFILL_S, 0.0), 0), [OURS], REQUESTS, asked=range(16), max_tokens=None
        )


def shown(peer: SystemFigures) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    names = ("model", "work", "chosen", "command", "created")
    results = BenchResults(
        **dict.fromkeys(names, "x"), machine={}, versions={}, hardware={}, systems=[OURS.figures, peer]
    )
    print_bench(results, console)
    return " ".join(console.export_text().replace("\N{MULTIPLICATION SIGN}", " times").split())


def test_the_table_says_what_was_measured_and_what_follows() -> None:
    text = shown(hold_against(accelerate(1, 4), [OURS], REQUESTS, asked=range(0, 64, 4), max_tokens=4))
    assert "accelerate: 16 of 64 requests asked, 64 of 2,048 tokens generated; ~ is all of them" in text
    assert "accelerate 16 890 7.50 ~2.12 ~0.0662" in text
    assert "flexeval none answers ~16 times the requests a second of accelerate" in text
    assert "prompt tokens 9.20 times, tokens after a first one 17 times" in text
    assert "raise --peer-requests" not in text


def test_the_table_says_where_a_batch_was_not_full() -> None:
    few = hold_against(
        measured("accelerate", 4, 4, (PREFILL_S, 3 * STEP_S), 3), [OURS], REQUESTS, asked=range(4), max_tokens=4
    )
    assert few.batch_size == 4
    assert "16 fit a batch and would be quicker: raise --peer-requests" in shown(few)


def test_what_was_measured_whole_carries_no_mark() -> None:
    text = shown(hold_against(accelerate(4, 32), [OURS], REQUESTS, asked=range(64), max_tokens=None))
    assert "~" not in text and "requests asked" not in text
    assert "flexeval none answers 16 times the requests a second of accelerate" in text


def test_the_table_says_that_memory_ran_out() -> None:
    figures = hold_against(accelerate(4, 32), [OURS], REQUESTS, asked=range(64), max_tokens=None)
    assert "memory ran out" not in shown(figures)
    split = dataclasses.replace(figures, splits=["sweeps of 512 tokens instead of 1,024"])
    assert "memory ran out, and work went on with sweeps of 512 tokens instead of 1,024" in shown(split)
