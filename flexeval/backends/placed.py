"""A model's weights in one placement, what was foretold of it, and what it has used. Chooses nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from flexeval.backends.backend import Usage
from flexeval.backends.gauging import phase_plans, read_gauge
from flexeval.backends.loading import OpenModel
from flexeval.config import Limits
from flexeval.engine.energy import gpu_energy_j
from flexeval.engine.executor import Executor
from flexeval.engine.memory.disk import DiskTier
from flexeval.meter import Gauge, PhasePlan
from flexeval.policy.cost import CostModel
from flexeval.policy.policy import Policy
from flexeval.policy.sweeps import plan_sweeps
from flexeval.request import TokenResult

OnLayer = Callable[[int, int], None]
"""Told (layers loaded, layers in all) while weights are loaded."""


class Placed:
    """An executor, and the account of what it does."""

    def __init__(self, executor: Executor, num_layers: int):
        """Of a model with so many layers."""
        self.executor = executor
        self.load_s = 0.0
        """Seconds that its weights took to load."""
        self._num_layers = num_layers
        self._predicted_s = 0.0
        self._energy_j: float | None = None
        self._planned_bytes: dict[str, int] = {}
        self._splits: list[str] = []
        self._lost_s = 0.0
        self._plan: dict[str, PhasePlan] = {}  # of the batch at hand
        self._first_sweep = 0  # likewise
        self._answered_s = 0.0  # likewise: seconds in the shares of what is answered

    def begin_batch(self, model: CostModel, *, is_again: bool) -> None:
        """Note what the cost model says of a batch, to be held against what is measured.

        Where it goes on with a batch (`is_again`), the whole of it was foretold before.
        """
        cost = model.cost(self.executor.policy)
        self._predicted_s += 0.0 if is_again else cost.total_s
        self._plan = phase_plans(cost, plan_sweeps(self.executor.policy, model.workload))
        for tier, peak in cost.peak_bytes.items():
            if peak:
                self._planned_bytes[str(tier)] = max(self._planned_bytes.get(str(tier), 0), math.ceil(peak))
        self._first_sweep = self.executor.trace.num_sweeps
        self._answered_s = 0.0

    @contextmanager
    def counting_energy(self, device: torch.device) -> Iterator[None]:
        """Count what the device uses in a block."""
        before_j = gpu_energy_j(device)
        try:
            yield
        finally:
            after_j = gpu_energy_j(device)
            self._energy_j = None if before_j is None or after_j is None else (self._energy_j or 0) + after_j - before_j

    def count_answered(self, results: Iterable[TokenResult]) -> None:
        """Count seconds that are in an answer's share."""
        self._answered_s += sum(result.elapsed_s for result in results)

    def split(self, words: str) -> None:
        """Note that memory ran out, and what was made smaller: work on what was not answered is to be done again."""
        self._splits.append(words)
        self._lost_s += max(0.0, self.gauge().elapsed_s - self._answered_s)

    def gauge(self) -> Gauge:
        """Where the batch at hand stands; safe while another thread works on it."""
        return read_gauge(self.executor, self._first_sweep, self._num_layers, self._plan, self._planned_bytes)

    def usage(self) -> Usage:
        """What it has used so far."""
        trace = self.executor.trace
        return Usage(
            load_s=self.load_s,
            num_prompt_tokens=trace.num_prompt_tokens,
            num_computed_prompt_tokens=trace.num_computed_prompt_tokens,
            num_generated_tokens=trace.num_generated_tokens,
            peak_bytes=self.executor.peak_bytes(),
            policy=self.executor.policy.to_json(),
            lanes={name: {"num_bytes": lane.num_bytes, "busy_s": lane.busy_s} for name, lane in trace.lanes.items()},
            phases=dict(trace.phases),
            predicted_s=self._predicted_s,
            energy_j=self._energy_j,
            planned_bytes=self._planned_bytes,
            splits=list(self._splits),
            lost_s=self._lost_s,
        )


def place_weights(opened: OpenModel, policy: Policy, limits: Limits, on_layer: OnLayer, *, is_apart: bool) -> Executor:
    """Load a model's weights to where a policy wants them. Raises `CapacityError`, and what its files raise."""
    folder = limits.disk_dir
    return Executor(
        opened.anatomy,
        opened.checkpoint,
        policy,
        codec=opened.codec,
        kv_coding=opened.kv_coding,
        sparsity=opened.sparsity,
        vocabulary_codec=opened.vocabulary_codec,
        device=opened.device,
        disk_tier=None if folder is None else DiskTier(folder, limit_bytes=limits.disk_bytes),
        on_layer=lambda layer: on_layer(layer + 1, opened.anatomy.num_layers),
        is_apart=is_apart,
    )
