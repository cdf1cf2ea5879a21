"""The least a phase can take on this machine: what was moved and multiplied, at the rates that were measured.

Knows the policy's placement and the measured rates; nothing of how the engine works.
"""

from __future__ import annotations

from dataclasses import replace

from flexeval.bench.figures import BoundFigures, PhaseFigures
from flexeval.policy.cost import Cost, CostModel, Lane
from flexeval.policy.experts import met_part
from flexeval.policy.policy import Policy, Tier

_READS = {"weights": "weights", "kv_in": "kv", "hidden": "hidden"}
"""The engine's lanes that bring data to the compute device, and what they bring."""
_WRITES = {"kv_out": "kv", "hidden": "hidden"}
"""Those that take data away. The one for hidden states does both, equally much."""


def with_bounds(phases: dict[str, PhaseFigures], model: CostModel, policy: Policy) -> dict[str, PhaseFigures]:
    """The phases with what bounds them, beside what the cost model predicted."""
    cost = model.cost(policy)
    return {name: replace(phase, bounds=_bounds(name, phase, model, policy, cost)) for name, phase in phases.items()}


def _bounds(name: str, phase: PhaseFigures, model: CostModel, policy: Policy, cost: Cost) -> dict[str, BoundFigures]:
    hardware = model.hardware
    predicted = cost.lanes.get(name, {})
    placement = model.place(policy)

    def on_disk(lane: str, kind: str) -> float:
        """Share of the bytes moved that belong to items on disk."""
        counts = placement.counts[kind]
        streamed = sum(counts[tier] for tier in Tier if tier is not hardware.home)
        if lane == "kv_in":
            streamed -= placement.host_attention
        return float(counts[Tier.DISK] / streamed) if streamed else 0.0

    def moved(lanes: dict[str, str], *, from_disk_only: bool) -> float:
        total = 0.0
        for lane, kind in lanes.items():
            num_bytes = phase.lanes[lane].num_bytes / (2 if lane == "hidden" else 1)
            total += num_bytes * (on_disk(lane, kind) if from_disk_only else 1)
        return total

    amounts: dict[Lane, tuple[float, float]] = {}
    if hardware.home is Tier.GPU:
        amounts[Lane.TO_GPU] = (moved(_READS, from_disk_only=False), hardware.to_gpu_bytes_per_s)
        amounts[Lane.FROM_GPU] = (moved(_WRITES, from_disk_only=False), hardware.from_gpu_bytes_per_s)
    if model.can_attend_on_host:
        host_bytes = float(phase.lanes["host_attention"].num_bytes)
        amounts[Lane.HOST_ATTENTION] = (host_bytes, hardware.host_attention_bytes_per_s)
    if hardware.disk_bytes:
        amounts[Lane.DISK_READ] = (moved(_READS, from_disk_only=True), hardware.disk_read_bytes_per_s)
        amounts[Lane.DISK_WRITE] = (moved(_WRITES, from_disk_only=True), hardware.disk_write_bytes_per_s)
    bounds = {
        str(lane): BoundFigures(
            amount=amount, per_s=rate, bound_s=amount / rate, predicted_s=float(predicted.get(lane, 0.0))
        )
        for lane, (amount, rate) in amounts.items()
    }
    bounds[str(Lane.COMPUTE)] = _compute_bound(phase, model, float(predicted.get(Lane.COMPUTE, 0.0)))
    return bounds


def _compute_bound(phase: PhaseFigures, model: CostModel, predicted_s: float) -> BoundFigures:
    """The layers' matrix products, or reading once a sweep the weights that tokens meet, whichever takes longer."""
    shape, hardware = model.shape, model.hardware
    num_tokens = phase.num_fresh_tokens + phase.num_decode_tokens
    flops = 2 * shape.layer_params * shape.num_layers * num_tokens
    layer_bytes = min(shape.layer_bytes, shape.layer_compute_bytes) * met_part(shape, num_tokens / phase.num_sweeps)
    weight_bytes = shape.num_layers * layer_bytes * phase.num_sweeps
    bound_s = max(flops / hardware.flops_per_s, weight_bytes / hardware.memory_bytes_per_s)
    return BoundFigures(amount=flops, per_s=hardware.flops_per_s, bound_s=bound_s, predicted_s=predicted_s)
