"""From sweeps to figures: which belong to prefill and which to decode, and how cost grows. Plain arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from flexeval.backends.padded_batch import BatchTrace
from flexeval.bench.figures import LaneFigures, PhaseFigures, ScalePoint
from flexeval.engine.trace import SweepTrace, add_up


def split_phases(sweeps: Sequence[SweepTrace]) -> dict[str, PhaseFigures]:
    """Sweeps that compute prompt tokens are `prefill`, the others `decode`; a phase without any is absent.

    Where prompts enter while others decode, a sweep does both and counts as prefill: its decoding is not credited.
    """
    phases = {
        "prefill": [sweep for sweep in sweeps if sweep.num_fresh_tokens],
        "decode": [sweep for sweep in sweeps if not sweep.num_fresh_tokens],
    }
    return {name: _figures(chosen) for name, chosen in phases.items() if chosen}


def _figures(sweeps: Sequence[SweepTrace]) -> PhaseFigures:
    total = add_up(sweeps)
    return PhaseFigures(
        elapsed_s=total.elapsed_s,
        num_sweeps=total.num_sweeps,
        num_fresh_tokens=total.num_fresh_tokens,
        num_decode_tokens=total.num_decode_tokens,
        lanes={
            name: LaneFigures(num_bytes=lane.num_bytes, busy_s=lane.busy_s, utilization=lane.busy_s / total.elapsed_s)
            for name, lane in total.lanes.items()
        },
    )


def peer_phases(batches: Sequence[BatchTrace]) -> dict[str, PhaseFigures]:
    """A peer's passes over prompts and, where there are any, over the tokens after them."""
    prefill = PhaseFigures(
        elapsed_s=sum(batch.prefill_s for batch in batches),
        num_sweeps=len(batches),
        num_fresh_tokens=sum(batch.num_prompt_tokens for batch in batches),
        num_decode_tokens=0,
    )
    decode = PhaseFigures(
        elapsed_s=sum(batch.decode_s for batch in batches),
        num_sweeps=sum(batch.num_steps for batch in batches),
        num_fresh_tokens=0,
        num_decode_tokens=sum(batch.num_decode_tokens for batch in batches),
    )
    return {"prefill": prefill} | ({"decode": decode} if decode.num_sweeps else {})


def fit_exponent(points: Sequence[ScalePoint]) -> float:
    """The p of seconds ~ requests^p: least squares of log seconds over log requests. Needs two different sizes."""
    xs = [log(point.num_requests) for point in points]
    ys = [log(point.elapsed_s) for point in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    assert spread > 0, [point.num_requests for point in points]
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
