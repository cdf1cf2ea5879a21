"""A model's weights in one placement, what was foretold of it, and what it has used. Chooses nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from flexeval.backends.backend import Usage
from flexeval.backends.course import Course, Moving
from flexeval.backends.gauging import read_gauge
from flexeval.backends.loading import OpenModel
from flexeval.config import Limits
from flexeval.engine.energy import gpu_energy_j
from flexeval.engine.executor import Executor
from flexeval.engine.memory.disk import DiskTier
from flexeval.meter import Gauge
from flexeval.policy.correction import Correction
from flexeval.policy.cost import CostModel
from flexeval.policy.policy import Policy
from flexeval.request import TokenRequest, TokenResult

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
        self.course: Course | None = None
        """Of the batch at hand; None before there is one."""
        self._predicted_s = 0.0
        self._corrected_s = 0.0  # of batches before
        self._is_any_corrected = False  # likewise
        self._is_again = False
        self._energy_j: float | None = None
        self._planned_bytes: dict[str, int] = {}
        self._splits: list[str] = []
        self._lost_s = 0.0
        self._moves: list[str] = []
        self._answered_s = 0.0  # of the batch at hand: seconds in the shares of what is answered

    def begin_batch(
        self,
        model: CostModel,
        requests: Sequence[TokenRequest],
        *,
        is_again: bool,
        known: Correction,
        moving: Moving | None,
    ) -> Course:
        """Note what the cost model says of a batch, to be held against what is measured.

        Where it goes on with a batch (`is_again`), the whole of it was foretold before. The other arguments are those
        of `Course`.
        """
        self._corrected_s, self._is_any_corrected = self._corrected()
        self._is_again = is_again
        self.course = Course(self.executor, model, requests, known=known, moving=moving)
        self._predicted_s += 0.0 if is_again else self.course.foretold_s
        for tier, peak in self.course.planned_bytes.items():
            if peak:
                self._planned_bytes[str(tier)] = max(self._planned_bytes.get(str(tier), 0), math.ceil(peak))
        self.executor.trace.begin_batch()
        self._answered_s = 0.0
        return self.course

    @contextmanager
    def counting_energy(self, device: torch.device) -> Iterator[None]:
        """Count what the device uses in a block."""
        before_j = gpu_energy_j(device)
        try:
            yield
        finally:
            after_j = gpu_energy_j(device)
            self._energy_j = None if before_j is None or after_j is None else (self._energy_j or 0) + after_j - before_j

    def count_answered(self, results: Sequence[tuple[int, TokenResult]]) -> None:
        """Count seconds that are in an answer's share, and how soon texts end."""
        self._answered_s += sum(result.elapsed_s for _, result in results)
        if self.course is not None:
            self.course.count(results)

    def split(self, words: str) -> None:
        """Note that memory ran out, and what was made smaller: work on what was not answered is to be done again."""
        self._splits.append(words)
        self._lost_s += max(0.0, self.gauge().elapsed_s - self._answered_s)

    def move(self, words: str) -> None:
        """Note that the rest of the batch at hand is placed anew, and how."""
        self._moves.append(words)

    def _corrected(self) -> tuple[float, bool]:
        """What was foretold last of each batch, or of its rest, together; and whether any was measured by then."""
        course = self.course
        if course is None or self._is_again:
            return self._corrected_s, self._is_any_corrected
        said_s = course.first_corrected_s
        total_s = self._corrected_s + (course.foretold_s if said_s is None else said_s)
        return total_s, self._is_any_corrected or said_s is not None

    def gauge(self) -> Gauge:
        """Where the batch at hand stands; safe while another thread works on it."""
        gauge, course = read_gauge(self.executor, self._num_layers), self.course
        if course is None:
            return gauge
        return replace(
            gauge,
            plan=course.plan,
            left_s=course.left_s(),
            planned_bytes=self._planned_bytes,
            foretold_s=course.foretold_s,
            corrected_s=course.first_corrected_s,
        )

    def usage(self) -> Usage:
        """What it has used so far."""
        trace = self.executor.trace
        corrected_s, is_any_corrected = self._corrected()
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
            corrected_s=corrected_s if is_any_corrected else 0.0,
            energy_j=self._energy_j,
            planned_bytes=self._planned_bytes,
            splits=list(self._splits),
            lost_s=self._lost_s,
            moves=list(self._moves),
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
