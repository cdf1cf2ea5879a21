"""What a policy costs: seconds of each lane and peak bytes of each tier. The one model of search, plans and reports.

FlexGen's cost model (Sheng et al., ICML 2023, section 4.3), T = T_prefill * l + T_decode * (n - 1) * l with each T the
maximum over lanes, extended by what this engine does: scoring without KV, staging buffers, launches, the memory
bandwidth of the compute device, and attention by the CPU beside it. Every formula is linear in the placement, so the
same code serves plain numbers and the variables of the linear program in `program.py`. Knows no solver and no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from flexeval.policy.computing import (
    OPERATIONS_PER_RECORDED_STEP,
    OPERATIONS_PER_STEP,
    OPERATIONS_TO_RECORD,
    compute_seconds,
    is_recorded,
)
from flexeval.policy.correction import NO_CORRECTION, Correction
from flexeval.policy.experts import fetched_part, is_by_need
from flexeval.policy.placement import Linear, Placement
from flexeval.policy.policy import KINDS, Policy, Tier
from flexeval.policy.room import RoomModel
from flexeval.policy.sparse import value_bytes
from flexeval.policy.sweeps import Sweep, plan_sweeps
from flexeval.policy.work import ModelShape, Workload

if TYPE_CHECKING:  # hardware.py measures with torch; predicting must not need it
    from flexeval.policy.hardware import Hardware

OPERATIONS_PER_LOAD = 400
"""Small operations that take as long as Python from one load of KV to the next: about 2 ms beside a GPU's lanes."""
OPERATIONS_PER_HOST_ROW = 40
"""The same for a row that the CPU attends for at a layer, beside its reading: queries come, and an output goes. On an
H200 with 16 cores 0.3 to 0.5 ms."""
HOST_WAIT_SHARE = 0.05
"""Where the CPU and the link share attention, the CPU waits for the link at rows' ends: for this part of what the link
takes. A simulation of OPT-30B's sweeps by rates that were measured came to 0.04 to 0.07."""
LEAST_HOST_ROWS = 3
"""Rows of a sweep from which on the CPU and the link have work at the same time, at every layer."""
EXPOSED_SHARE = 0.05
"""Share of every lane's time that overlap does not hide; makes the search prefer less of it among equals. Where the
link took as long as the computation, sweeps took 0.04 of that longer (OPT-30B's prompts, on an H200)."""
UNFINISHED_SHARE = 0.01
"""Chance that a run is stopped inside a sweep, whose work is then lost; makes it prefer shorter sweeps among equals."""


class Lane(StrEnum):
    """What can be busy while the others are."""

    COMPUTE = "compute"
    TO_GPU = "to_gpu"
    FROM_GPU = "from_gpu"
    DISK_READ = "disk_read"
    DISK_WRITE = "disk_write"
    HOST_ATTENTION = "host_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the model predicts for one policy."""

    total_s: float
    """Seconds of the whole run."""
    phase_s: Mapping[str, float]
    """Seconds of each phase (`prefill`, `decode`): as long as its busiest lane, or a little longer."""
    objective_s: float
    """`total_s`, the exposed share of all lanes and the unfinished share of one sweep: what the search minimizes."""
    lanes: Mapping[str, Mapping[Lane, float]]
    """Phase (`prefill`, `decode`), lane: busy seconds over the whole run."""
    peak_bytes: Mapping[Tier, float]
    """Largest use of each tier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Predicts a run of `workload` with a model of `shape` on `hardware`."""

    shape: ModelShape
    """The model under its setting."""
    workload: Workload
    """What is to be run."""
    hardware: Hardware
    """The machine."""
    correction: Correction = NO_CORRECTION
    """What was measured of a run under way, held against what this says of it."""

    def cost(self, policy: Policy) -> Cost:
        """Seconds and bytes of `policy`, feasible or not."""
        placement = self.place(policy)
        lanes, phase_s = {}, {}
        objective_s = 0.0
        for phase, sweep in plan_sweeps(policy, self.workload).items():
            seconds = self.lane_seconds(policy, sweep, placement)
            lanes[phase] = {lane: sweep.num_sweeps * seconds[lane] for lane in seconds}
            sweep_s = max(self.sweep_bounds(sweep, seconds))
            phase_s[phase] = sweep.num_sweeps * sweep_s
            objective_s += self.phase_objective(sweep, sweep_s, seconds)
        peak_bytes = self.peak_bytes(policy, placement)
        return Cost(
            total_s=sum(phase_s.values()), phase_s=phase_s, objective_s=objective_s, lanes=lanes, peak_bytes=peak_bytes
        )

    def sweep_bounds(self, sweep: Sweep, lane_s: Mapping[Lane, Linear]) -> Iterator[Linear]:
        """Seconds that a sweep takes at least whose lanes are busy for `lane_s`; it takes as long as the most."""
        waiting = self.correction.of_phase(sweep.phase)
        yield from (waiting * seconds for seconds in lane_s.values())
        if Lane.HOST_ATTENTION in lane_s:
            link_s, host_s = lane_s[Lane.TO_GPU], lane_s[Lane.HOST_ATTENTION]
            yield waiting * (link_s + (1 - self.hardware.attended_link_share) * host_s)
            yield waiting * (host_s + HOST_WAIT_SHARE * link_s)

    def phase_objective(self, sweep: Sweep, sweep_s: Linear, lane_s: Mapping[Lane, Linear]) -> Linear:
        """What the search minimizes, for one phase whose sweeps take `sweep_s` and keep each lane busy `lane_s`."""
        exposed_s = EXPOSED_SHARE * sum(lane_s.values())
        return sweep.num_sweeps * (sweep_s + exposed_s) + UNFINISHED_SHARE * sweep_s

    @property
    def room(self) -> RoomModel:
        """What a policy takes up."""
        return RoomModel(shape=self.shape, workload=self.workload, home=self.hardware.home)

    def num_items(self, policy: Policy) -> dict[str, int]:
        """Items a policy places: layers of weights and KV, rows of a full sweep's hidden states."""
        return self.room.num_items(policy)

    def place(self, policy: Policy) -> Placement:
        """The policy's fractions as whole layers, and as parts of the rows, which are placed by their tokens."""
        num_items, home = self.num_items(policy), self.hardware.home
        counts = {kind: getattr(policy, kind).counts(num_items[kind]) for kind in ("weights", "kv")}
        counts["hidden"] = {tier: getattr(policy.hidden, tier) * num_items["hidden"] for tier in Tier}
        return Placement(
            counts=counts,
            streams={kind: int(counts[kind][home] < num_items[kind]) for kind in KINDS},
            on_disk={kind: int(counts[kind][Tier.DISK] > 0) for kind in KINDS},
            is_step_in_parts=int(any(counts[kind][home] < sum(counts[kind].values()) for kind in ("weights", "kv"))),
            is_slab_ahead=int(policy.slabs_ahead > 1 and counts["weights"][home] < self.shape.num_layers),
            host_attention=policy.host_attention * counts["kv"][Tier.CPU] if self.can_attend_on_host else 0,
        )

    @property
    def can_attend_on_host(self) -> bool:
        """Whether there is a CPU beside the compute device that attends."""
        attends = self.hardware.home is Tier.GPU and self.hardware.host_attention_bytes_per_s > 0
        return attends and self.shape.sparsity is None

    def read_bytes(self, sweep: Sweep) -> dict[str, float]:
        """Bytes of a layer's weights, and of its KV, that one sweep reads where they do not lie in place."""
        return {
            "weights": sweep.weights_share * self.shape.layer_bytes * fetched_part(self.shape, sweep.num_tokens),
            "kv": sweep.num_kv_read * self.shape.kv_bytes_per_token,
        }

    def lane_seconds(self, policy: Policy, sweep: Sweep, placement: Placement) -> dict[Lane, Linear]:
        """Busy seconds of each lane in one sweep: bytes over bandwidth (FlexGen, section 4.3 and appendix A.3).

        The KV of a call is sent for when that of the one before has been taken, so that many small ones take as long as
        Python. What the CPU attends to, sequences' own contexts, does not cross the link; what they share does, once.
        Nor do values that rest in host memory and are not chosen; for the others the computation waits, once it has
        chosen.
        """
        shape, hardware = self.shape, self.hardware
        num_rows = self.num_items(policy)["hidden"]
        # Rows that decode keep their hidden states on the compute device: a few tokens would wait for the KV's copies.
        num_moved = 0 if sweep.num_kv_read else sweep.num_tokens
        hidden_bytes = shape.num_layers * num_moved * shape.hidden_bytes_per_token / num_rows
        read_bytes = self.read_bytes(sweep) | {"hidden": hidden_bytes}
        own_bytes = sweep.num_own_read * shape.kv_bytes_per_token
        written_bytes = {"kv": sweep.num_kv_written * shape.kv_bytes_per_token, "hidden": hidden_bytes}

        def moved(item_bytes: Mapping[str, float], *tiers: Tier) -> Linear:
            return sum(size * placement.counts[kind][tier] for kind, size in item_bytes.items() for tier in tiers)

        seconds = {Lane.COMPUTE: compute_seconds(shape, self.workload, hardware, sweep)}
        if hardware.home is Tier.GPU:
            if sweep.num_kv_read:
                has_recordings = is_recorded(shape, sweep)
                num_operations = OPERATIONS_PER_RECORDED_STEP if has_recordings else OPERATIONS_PER_STEP
                operation_s = shape.num_layers * sweep.num_calls * hardware.launch_s
                step_s, plain_s = num_operations * operation_s, OPERATIONS_PER_STEP * operation_s
                may_be_one = has_recordings and shape.sparsity is None
                seconds[Lane.COMPUTE] += step_s * (placement.is_step_in_parts if may_be_one else 1)
                if may_be_one:
                    record_s = OPERATIONS_TO_RECORD * operation_s / (self.workload.max_generated_tokens - 1)
                    seconds[Lane.COMPUTE] += record_s * (1 - placement.is_step_in_parts)
                if has_recordings and is_by_need(shape.num_experts, shape.experts_per_token, sweep.num_tokens):
                    seconds[Lane.COMPUTE] += placement.streams["weights"] * (plain_s - step_s)
            least_s = sweep.num_calls * OPERATIONS_PER_LOAD * hardware.launch_s if sweep.num_kv_read else 0.0
            kv_layer_s = max(read_bytes["kv"] / hardware.to_gpu_bytes_per_s, least_s)
            seconds[Lane.TO_GPU] = (moved({"kv": 1.0}, Tier.CPU, Tier.DISK) - placement.host_attention) * kv_layer_s
            num_shared = min(sweep.num_kv_read - sweep.num_own_read, self.workload.num_shared_tokens)
            shared_layer_s = num_shared * shape.kv_bytes_per_token / hardware.to_gpu_bytes_per_s
            seconds[Lane.TO_GPU] += placement.host_attention * shared_layer_s
            if shape.sparsity is not None:
                spared_bytes, chosen_bytes = value_bytes(shape, sweep)
                spared_s = kv_layer_s - max((read_bytes["kv"] - spared_bytes) / hardware.to_gpu_bytes_per_s, least_s)
                seconds[Lane.TO_GPU] -= moved({"kv": spared_s}, Tier.CPU)
                seconds[Lane.COMPUTE] += moved({"kv": chosen_bytes / hardware.to_gpu_bytes_per_s}, Tier.CPU)
            others = {kind: num_bytes for kind, num_bytes in read_bytes.items() if kind != "kv"}
            seconds[Lane.TO_GPU] += moved(others, Tier.CPU, Tier.DISK) / hardware.to_gpu_bytes_per_s
            seconds[Lane.FROM_GPU] = moved(written_bytes, Tier.CPU, Tier.DISK) / hardware.from_gpu_bytes_per_s
        if self.can_attend_on_host:
            rows_s = sweep.num_calls * OPERATIONS_PER_HOST_ROW * hardware.launch_s if read_bytes["kv"] else 0.0
            layer_s = own_bytes / hardware.host_attention_bytes_per_s + rows_s
            seconds[Lane.HOST_ATTENTION] = placement.host_attention * layer_s
        if hardware.disk_bytes:
            seconds[Lane.DISK_READ] = moved(read_bytes, Tier.DISK) / hardware.disk_read_bytes_per_s
            seconds[Lane.DISK_WRITE] = moved(written_bytes, Tier.DISK) / hardware.disk_write_bytes_per_s
        return {lane: self.correction.of_lane(sweep.phase, lane) * busy_s for lane, busy_s in seconds.items()}

    def peak_bytes(self, policy: Policy, placement: Placement) -> dict[Tier, Linear]:
        """Most bytes of each tier in use at once."""
        return self.room.peak_bytes(policy, placement)
