"""What a run would take by the cost model: policy, bytes, seconds, and what would help. Loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from flexeval.backends.native import Engine
from flexeval.errors import CapacityError
from flexeval.planning.summary import PlanSummary, summarize
from flexeval.policy.cost import Cost, CostModel
from flexeval.policy.policy import KINDS, Policy, Tier
from flexeval.policy.search import choose, search
from flexeval.request import Request

GAIN_BYTES = 2**30
"""How much more of a tier is tried."""
WORTHWHILE = 0.005
"""Share of a run's seconds that more of a tier must save to be told: less is in the noise of the search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskForecast:
    """One task's part of a run."""

    num_requests: int
    """Its requests."""
    num_prompt_tokens: int
    """Tokens of their prompts."""
    num_computed_tokens: int
    """Of these, those computed, each shared beginning once."""
    num_generated_tokens: int
    """Generated at most."""
    elapsed_s: float
    """Its share of the run: of prefill by tokens computed, of decode by tokens generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A run under one setting."""

    setting: str
    """The setting's name."""
    summary: PlanSummary
    """What is computed of the prompts."""
    policy: Policy
    """Where everything would rest, and how much would be in flight."""
    resting_bytes: Mapping[str, Mapping[str, float]]
    """Tier, kind: bytes at rest there."""
    peak_bytes: Mapping[str, float]
    """Tier: most bytes in use at once, buffers and workspace included."""
    usable_bytes: Mapping[str, int]
    """Tier: bytes that may be used."""
    num_layers: int
    """Of the model."""
    phase_s: Mapping[str, float]
    """Phase (`prefill`, `decode`): seconds, those of its busiest lane or a little more."""
    lanes: Mapping[str, Mapping[str, float]]
    """Phase, lane: busy seconds."""
    tasks: Mapping[str, TaskForecast]
    """By task."""
    gains: Mapping[str, float]
    """Tier: seconds that one GiB more of it would save; those that save any."""

    @property
    def elapsed_s(self) -> float:
        """Seconds of the whole run, without loading."""
        return sum(self.phase_s.values())

    @property
    def bound_by(self) -> dict[str, str]:
        """Phase: its busiest lane."""
        return {phase: max(lanes, key=lambda lane: lanes[lane]) for phase, lanes in self.lanes.items()}

    @property
    def is_offloaded(self) -> bool:
        """Whether anything rests elsewhere than in the compute device's memory."""
        return sum(1 for kinds in self.resting_bytes.values() if any(kinds.values())) > 1

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self) | {"policy": self.policy.to_json(), "elapsed_s": self.elapsed_s, "bound_by": self.bound_by}


def forecast(
    engine: Engine,
    setting: str,
    requests: Sequence[Request],
    tasks: Mapping[str, Sequence[Request]],
    fixed: Policy | None,
) -> Forecast:
    """Predict a run.

    Args:
        engine: The model under the setting, opened; its weights stay where they are.
        setting: The setting's name.
        requests: All different requests.
        tasks: The same by task, repeated ones included.
        fixed: A policy that is not searched for.

    Raises:
        RequestError: A request cannot be answered as asked.
        CapacityError: The work does not fit the memory given.
    """
    model = engine.cost_model(requests)
    is_apart = engine.is_deterministic
    policy = choose(model.shape, model.workload, model.hardware, fixed=fixed, is_apart=is_apart)
    asked = engine.token_requests(requests)
    model = engine.try_out(model, policy, asked)
    cost, counts = model.cost(policy), model.place(policy).counts
    item_bytes = model.room.item_bytes(policy)
    tiers = [tier for tier in Tier if model.hardware.capacity_bytes(tier)]
    return Forecast(
        setting=setting,
        summary=summarize(asked, is_apart=is_apart),
        policy=policy,
        resting_bytes={str(tier): {kind: item_bytes[kind] * counts[kind][tier] for kind in KINDS} for tier in tiers},
        peak_bytes={str(tier): cost.peak_bytes[tier] for tier in tiers},
        usable_bytes={str(tier): model.hardware.capacity_bytes(tier) for tier in tiers},
        num_layers=model.shape.num_layers,
        phase_s=cost.phase_s,
        lanes={phase: {str(lane): float(s) for lane, s in lanes.items()} for phase, lanes in cost.lanes.items()},
        tasks=_share(engine, tasks, cost.phase_s),
        gains={} if fixed or is_apart else _gains(model, cost, tiers),
    )


def _share(
    engine: Engine, tasks: Mapping[str, Sequence[Request]], phase_s: Mapping[str, float]
) -> dict[str, TaskForecast]:
    counted = {}
    for task, requests in tasks.items():
        asked = engine.token_requests(list(dict.fromkeys(requests)))
        counted[task] = summarize(asked), sum(request.max_tokens for request in asked)
    num_computed = sum(summary.num_computed_tokens for summary, _ in counted.values())
    num_generated = sum(generated for _, generated in counted.values())
    return {
        task: TaskForecast(
            num_requests=len(tasks[task]),
            num_prompt_tokens=summary.num_asked_tokens,
            num_computed_tokens=summary.num_computed_tokens,
            num_generated_tokens=generated,
            elapsed_s=phase_s["prefill"] * summary.num_computed_tokens / max(1, num_computed)
            + phase_s.get("decode", 0.0) * generated / max(1, num_generated),
        )
        for task, (summary, generated) in counted.items()
    }


def _gains(model: CostModel, cost: Cost, tiers: Sequence[Tier]) -> dict[str, float]:
    """Seconds that more of each tier would save, by searching again: shares of whole layers have no derivatives."""
    gains = {}
    for tier in tiers:
        field = f"{tier}_bytes"
        larger = replace(model.hardware, **{field: getattr(model.hardware, field) + GAIN_BYTES})
        try:
            policy = search(model.shape, model.workload, larger)
        except CapacityError:  # more room never fits less
            continue
        saved_s = cost.total_s - replace(model, hardware=larger).cost(policy).total_s
        if saved_s > WORTHWHILE * cost.total_s:
            gains[str(tier)] = saved_s
    return gains
