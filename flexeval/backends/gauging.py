"""Reads off where an engine stands in its batch, and what sweeps took. Knows its trace; asks nothing of a device."""

from __future__ import annotations

import time
from collections.abc import Mapping

from flexeval.engine.executor import Executor
from flexeval.engine.trace import SweepTrace
from flexeval.meter import Gauge, PhasePlan
from flexeval.policy.cost import Cost
from flexeval.policy.measured import MeasuredSweep
from flexeval.policy.sweeps import Sweep


def phase_plans(cost: Cost, sweeps: Mapping[str, Sweep]) -> dict[str, PhasePlan]:
    """What a policy's cost foretells of each phase."""
    return {
        phase: PhasePlan(
            num_sweeps=sweep.num_sweeps,
            num_tokens=sweep.num_sweeps * sweep.num_tokens,
            elapsed_s=cost.phase_s[phase],
        )
        for phase, sweep in sweeps.items()
    }


def read_gauge(executor: Executor, num_layers: int) -> Gauge:
    """Where a batch stands, without its plan; safe while another thread runs it."""
    sweeps = list(executor.trace.sweeps)
    done = [sweep for sweep in sweeps if sweep.elapsed_s]
    at_work = sweeps[-1] if len(sweeps) > len(done) else None
    share = min(1.0, executor.trace.num_layers_begun / num_layers) if at_work else 0.0
    num_prompt_tokens, num_decode_tokens = (
        sum(getattr(sweep, name) for sweep in done) + (share * getattr(at_work, name) if at_work else 0.0)
        for name in ("num_fresh_tokens", "num_decode_tokens")
    )
    return Gauge(
        num_sweeps=sum(sweep.num_sweeps for sweep in done),
        sweep_share=share,
        num_prompt_tokens=num_prompt_tokens,
        num_decode_tokens=num_decode_tokens,
        elapsed_s=sum(sweep.elapsed_s for sweep in done) + (time.perf_counter() - at_work.began_s if at_work else 0.0),
        used_bytes=executor.used_bytes(),
    )


def measured_sweep(sweep: SweepTrace) -> MeasuredSweep:
    """What the engine's lanes did, as the cost model has them. The one for hidden states goes both ways, equally."""
    busy = {name: lane.busy_s for name, lane in sweep.lanes.items()}
    return MeasuredSweep(
        done=sweep.done,
        elapsed_s=sweep.elapsed_s,
        compute_s=busy["compute"],
        in_s=busy["weights"] + busy["disk"] + busy["kv_in"] + busy["hidden"] / 2,
        out_s=busy["kv_out"] + busy["hidden"] / 2,
        host_attention_s=busy["host_attention"],
    )
