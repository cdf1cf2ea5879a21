"""Where a model's weights are placed for the work at hand, and placed anew when it changes or memory runs out.

Joins the search for a policy to the engine that obeys it; knows no request.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from flexeval.backends.backend import Usage, add_up
from flexeval.backends.course import Course, Moving
from flexeval.backends.loading import OpenModel, cap_gpu_memory
from flexeval.backends.placed import OnLayer, Placed, place_weights
from flexeval.backends.shortage import cannot_split, does_not_load, full_tier
from flexeval.backends.trial import try_out
from flexeval.config import Limits, format_size
from flexeval.engine.codecs.kv_format import make_format
from flexeval.engine.cpu_rates import with_our_kernels
from flexeval.engine.memory.host_rate import host_attention_rate
from flexeval.engine.sizes import model_shape
from flexeval.errors import CapacityError
from flexeval.policy.correction import NO_CORRECTION, Correction
from flexeval.policy.cost import CostModel
from flexeval.policy.hardware import Hardware, detect
from flexeval.policy.policy import Policy, Tier
from flexeval.policy.replanning import policy_for_more, rests_alike, tell_move
from flexeval.policy.search import check, choose
from flexeval.policy.splitting import split, tell_split
from flexeval.policy.work import Workload
from flexeval.request import TokenRequest

Count = Callable[[Sequence[TokenRequest]], Workload]
CONSIDERED = 16
"""Workloads that are remembered: a server's batches are without number."""
LESS, MOST_LESS = 0.1, 4
"""Where weights do not find the room that was measured, this share of it is given up; so often at most."""


class Placements:
    """The placements of one model's weights, one after another."""

    def __init__(self, opened: OpenModel, policy: Policy | None, limits: Limits, *, is_apart: bool):
        """None yet. Without a `policy`, one is searched for each workload; `is_apart` keeps requests apart."""
        self._is_apart = is_apart
        self.at_hand: Placed | None = None
        """The present one."""
        self._past: list[Usage] = []
        self._opened = opened
        self._fixed_policy = policy
        self._limits = limits
        self._shape = model_shape(
            opened.anatomy,
            opened.codec,
            opened.device,
            kv_coding=opened.kv_coding,
            sparsity=opened.sparsity,
            vocabulary_codec=opened.vocabulary_codec,
            is_apart=is_apart,
        )
        self._kv = (opened.anatomy.kv_shape(0), opened.anatomy.dtype, opened.kv_coding)
        self._hardware: Hardware | None = None
        self._tried: Correction | None = None
        self._correction = NO_CORRECTION
        self._search_s = 0.0
        self._num_less = 0  # times that less memory was counted on
        self._is_split = False  # memory ran out under a policy that should have fitted
        self._considered = deque[Workload](maxlen=CONSIDERED)  # for which the present policy has been thought about

    def close(self) -> None:
        """Give back memory, threads and files."""
        if self.at_hand is not None:
            self._past.append(self.at_hand.usage())
            self.at_hand.executor.close()
            self.at_hand = None

    def usage(self) -> Usage:
        """What all of them have used."""
        return add_up([*self._past, *([self.at_hand.usage()] if self.at_hand is not None else [])])

    def cost_model(self, workload: Workload) -> CostModel:
        """What any policy would cost for a workload on this machine, corrected by a trial where there was one."""
        correction = self._tried or NO_CORRECTION
        return CostModel(shape=self._shape, workload=workload, hardware=self._measure(), correction=correction)

    def try_out(self, model: CostModel, policy: Policy, requests: Sequence[TokenRequest]) -> CostModel:
        """A cost model, corrected by a trial: made once, before the first work, where that is long enough for one.

        Args:
            model: Of the work.
            policy: Under which it will be done.
            requests: The work.
        """
        if self._tried is None:
            self._tried = self._correction = try_out(self._opened, model, policy, requests, is_apart=self._is_apart)
        return replace(model, correction=self._tried)

    def ready(
        self, workload: Workload, requests: Sequence[TokenRequest], policy: Policy | None, on_layer: OnLayer
    ) -> Placed:
        """The weights placed for this workload: anew where their old place is too small, or another pays.

        Args:
            workload: What is to be answered.
            requests: The same.
            policy: How, where that is known.
            on_layer: Told how far loading is.
        """
        opened, hardware = self._opened, self._measure()
        if (placed := self.at_hand) is not None:
            policy = self._wanted(placed, workload)
            if policy is not None and rests_alike(policy, placed.executor.policy):
                placed.executor.policy = policy
                return placed
            self.close()
        fixed = policy or self._fixed_policy
        start = time.perf_counter()
        policy = choose(self._shape, workload, hardware, fixed=fixed, is_apart=self._is_apart)
        if fixed is None:
            self._search_s = time.perf_counter() - start
        self._considered.clear()
        self._considered.append(workload)
        cap_gpu_memory(self._limits, opened.device)
        self.try_out(self.cost_model(workload), policy, requests)
        start = time.perf_counter()
        executor = place_weights(opened, policy, self._limits, on_layer, is_apart=self._is_apart)
        self.at_hand = Placed(executor, opened.anatomy.num_layers)
        if opened.setting.has_key_channels and opened.anatomy.keys is None:
            self.at_hand.executor.find_key_channels()
        self.at_hand.load_s = time.perf_counter() - start
        return self.at_hand

    def _wanted(self, placed: Placed, workload: Workload) -> Policy | None:
        """The policy for a workload, given a placement for another one; None where that is too small for it."""
        policy = placed.executor.policy
        try:
            check(policy, self._shape, workload, self._measure())
        except CapacityError:
            return None
        if self._fixed_policy is not None or self._is_apart or self._is_split or workload in self._considered:
            return policy
        model = replace(self.cost_model(workload), correction=self._correction)
        better = policy_for_more(model, policy, search_s=self._search_s, load_s=placed.load_s)
        if better is not None:
            self._considered.clear()
        self._considered.append(workload)
        return better or policy

    def begin(self, workload: Workload, requests: Sequence[TokenRequest], *, count: Count, is_again: bool) -> Course:
        """Follow a batch on the present placement.

        A policy that was set by hand stays, and so does one under which answers must not depend on it to the bit.

        Args:
            workload: The batch, counted.
            requests: The same.
            count: Counts a part of it.
            is_again: Whether it is the rest of a batch that another placement has begun.
        """
        assert self.at_hand is not None
        stays = self._fixed_policy is not None or self._is_apart
        moving = None if stays else Moving(count=count, search_s=self._search_s, load_s=self.at_hand.load_s)
        model = self.cost_model(workload)
        return self.at_hand.begin_batch(model, requests, is_again=is_again, known=self._correction, moving=moving)

    def end(self) -> Policy | None:
        """The batch at hand has ended; the policy for its rest, everything given back, if that is to be placed anew."""
        placed = self.at_hand
        assert placed is not None and placed.course is not None
        self._correction, better = placed.course.correction, placed.course.better
        if better is not None:
            placed.move(tell_move(placed.executor.policy, better))
            self.close()
        return better

    def split(self, error: Exception, workload: Workload) -> Policy | None:
        """Give everything back where memory ran out; the policy to go on with.

        A policy that was set by hand is split for good. None where one is to be searched for: weights did not find the
        room that was measured, and less is counted on from now on.

        Args:
            error: What was raised; raised again, where it is about anything else.
            workload: At which it was raised.

        Raises:
            CapacityError: Weights alone do not fit, or nothing is left to split.
        """
        placed = self.at_hand
        full = full_tier(error, Tier.GPU if self._opened.device.type == "cuda" else Tier.CPU)
        if full is None:
            raise error
        if placed is None:
            if self._fixed_policy is not None or self._num_less == MOST_LESS:
                raise error if isinstance(error, CapacityError) else does_not_load(error, full) from error
            self._count_on_less(full)
            return None
        policy = placed.executor.policy
        smaller = split(policy, self.cost_model(workload), full, keeps_rows=self._is_apart)
        if smaller is None:
            self.close()
            raise cannot_split(error, full, policy) from error
        placed.split(tell_split(policy, smaller))
        self.close()
        self._is_split = True
        if self._fixed_policy is not None:
            self._fixed_policy = smaller
        return smaller

    def _count_on_less(self, full: Tier) -> None:
        """Something else has taken memory, or holds it in pieces, since it was measured."""
        before = self._measure()
        after = int((1 - LESS) * before.capacity_bytes(full))
        room: dict[str, Any] = {f"{full}_bytes": after}
        self._hardware = replace(before, **room)
        self._num_less += 1
        words = f"{format_size(after)} of {full} memory used instead of {format_size(before.capacity_bytes(full))}"
        self._past.append(replace(add_up([]), splits=[words]))

    def _measure(self) -> Hardware:
        """The machine, measured once: before the engine itself fills the memory."""
        if self._hardware is None:
            opened, is_gpu = self._opened, self._opened.device.type == "cuda"
            self._hardware = detect("cuda" if is_gpu else "cpu", self._limits, opened.anatomy.dtype)
            num_heads, fixed = self._shape.num_query_heads, self._fixed_policy
            may_attend_on_host = opened.sparsity is None if fixed is None else fixed.host_attention > 0
            if is_gpu and may_attend_on_host:
                host = host_attention_rate(make_format(*self._kv), num_heads, is_link_busy=True)
                self._hardware = replace(
                    self._hardware, host_attention_bytes_per_s=host.bytes_per_s, attended_link_share=host.link_share
                )
            elif not is_gpu:
                self._hardware = with_our_kernels(self._hardware, self._shape, self._kv, opened.codec)
        return self._hardware
