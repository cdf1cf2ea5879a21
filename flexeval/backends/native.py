"""Our engine as a backend: text in, completions out, over GPU, CPU and disk. Joins the tokenizer to the tensors.

Knows how a model is loaded and a policy chosen; the work itself is `engine/`'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from flexeval.backends.backend import OnCompletions, Usage, add_up
from flexeval.backends.batch import Batch
from flexeval.backends.gauging import phase_plans, read_gauge
from flexeval.backends.loading import (
    OpenModel,
    cap_gpu_memory,
    check_dtype,
    check_gpu_limit,
    open_model,
    pick_device,
)
from flexeval.backends.memory import memory_named
from flexeval.backends.options import read_limits, read_policy
from flexeval.config import Limits, Setting
from flexeval.engine.codecs.kv_format import make_format
from flexeval.engine.energy import gpu_energy_j
from flexeval.engine.executor import Executor
from flexeval.engine.memory.disk import DiskTier
from flexeval.engine.memory.host_rate import host_attention_rate
from flexeval.engine.sizes import measure_workload, model_shape
from flexeval.engine.trace import Trace
from flexeval.errors import CapacityError, FailedRequestsError
from flexeval.meter import Gauge, PhasePlan
from flexeval.models import ModelSource
from flexeval.planning.summary import PlanSummary, summarize
from flexeval.policy.cost import CostModel
from flexeval.policy.hardware import Hardware, detect
from flexeval.policy.policy import Policy, check_sparse
from flexeval.policy.search import check, choose
from flexeval.policy.sweeps import plan_sweeps
from flexeval.policy.work import Workload
from flexeval.request import Completion, Request, TokenRequest
from flexeval.tokenizer import has_chat_template

OnLayer = Callable[[int, int], None]
"""Told (layers loaded, layers in all) while weights are loaded."""


class Engine:
    """One model under one setting. Use it in a `with` block, or close it."""

    name = "flexeval"

    @classmethod
    def load(
        cls,
        model: str | ModelSource,
        *,
        setting: str | Setting = "none",
        policy: str | Policy = "auto",
        device: str = "auto",
        dtype: str = "auto",
        gpu_memory: str | int | None = None,
        cpu_memory: str | int | None = None,
        disk: str | Path | None = None,
        deterministic: bool = False,
    ) -> Engine:
        """Open a model. Its weights are placed when requests arrive, as the best policy for them demands.

        Args:
            model: A Hugging Face directory, a hub name, a GGUF file, `smollm2`, or `dummy:NAME`.
            setting: How the model is compressed: `none`, `w4`, ...
            policy: `auto` searches for one; a `Policy`, a policy file, or text such as `gpu-weights=0.2` sets it.
            device: `auto`, `cpu` or `cuda`.
            dtype: Type of the arithmetic: `auto`, `float32`, `bfloat16` or `float16`. `auto` is the model's own on a
                GPU; on a CPU bfloat16 where the processor multiplies it, else float32.
            gpu_memory: GPU memory to use at most, such as `16GiB`; all that is free otherwise.
            cpu_memory: Host memory to use at most; what is free otherwise.
            disk: Folder (`DIR` or `DIR:SIZE`) for what fits nowhere else; none otherwise.
            deterministic: Compute each request apart, so that its answer is the same to the bit whatever else is asked
                and wherever data rest. Rows are of one sequence each, and nothing is shared: it is slower.

        Raises:
            FlexevalError: The model, a setting or an option is not usable; the message says how to mend it.
        """
        fixed, limits = read_policy(policy), read_limits(gpu_memory, cpu_memory, disk)
        check_gpu_limit(limits, pick_device(device))
        chosen = Setting.parse(setting) if isinstance(setting, str) else setting
        if fixed is not None and chosen.sparsity is not None:
            check_sparse(fixed)
        opened = open_model(model, setting=chosen, device=device, dtype=dtype)
        return cls(opened, fixed, limits, is_deterministic=deterministic)

    @staticmethod
    def check_options(
        *,
        policy: str | Policy = "auto",
        device: str = "auto",
        dtype: str = "auto",
        gpu_memory: str | int | None = None,
        cpu_memory: str | int | None = None,
        disk: str | Path | None = None,
        deterministic: bool = False,
    ) -> None:
        """Raise `ConfigError` for options of `load` that suit no model, before one is fetched for them."""
        read_policy(policy)
        check_gpu_limit(read_limits(gpu_memory, cpu_memory, disk), pick_device(device))
        check_dtype(dtype)

    def __init__(self, opened: OpenModel, policy: Policy | None, limits: Limits, *, is_deterministic: bool = False):
        """See `load`, which reads these from text."""
        self.is_deterministic = is_deterministic
        """Whether an answer depends on nothing else that is asked."""
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
        )
        self.text = opened.text
        self._executor: Executor | None = None
        self._hardware: Hardware | None = None
        self._load_s = self._predicted_s = 0.0  # of the executor at hand
        self._energy_j: float | None = None  # likewise
        self._planned_bytes: dict[str, int] = {}
        self._plan: dict[str, PhasePlan] = {}  # of the batch at hand
        self._first_sweep = 0  # likewise
        self._past: list[Usage] = []  # of the executors before it

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back memory, threads and files."""
        if self._executor is not None:
            self._past.append(self._usage_of(self._executor))
            self._predicted_s, self._planned_bytes, self._energy_j = 0.0, {}, None
            self._executor.close()
            self._executor = None

    @property
    def context_length(self) -> int:
        """Tokens of prompt and completion that the model can hold."""
        return self._opened.anatomy.context_length

    @property
    def dtype(self) -> str:
        """Type of the arithmetic."""
        return str(self._opened.anatomy.dtype).removeprefix("torch.")

    @property
    def has_chat_template(self) -> bool:
        """Whether the model's tokenizer has one. Raises `FlexevalError` where there is no tokenizer."""
        return has_chat_template(self.text.tokenizer)

    @property
    def trace(self) -> Trace:
        """Counters of the weights' present placement."""
        return Trace() if self._executor is None else self._executor.trace

    def token_requests(self, requests: Sequence[Request]) -> list[TokenRequest]:
        """What the engine itself is asked, equal requests once. Raises `RequestError`."""
        return Batch(self.text, requests).token_requests

    def cost_model(self, requests: Sequence[Request]) -> CostModel:
        """What any policy would cost for these requests on this machine. Raises `RequestError`."""
        workload = self._count(self.token_requests(requests))
        return CostModel(shape=self._shape, workload=workload, hardware=self._measure())

    def place(self, requests: Sequence[Request], *, on_layer: OnLayer = lambda done, layers: None) -> PlanSummary:
        """Choose a policy for these requests and load the weights to where it wants them.

        `generate` does so by itself; apart, it can show its progress and be timed.

        Returns:
            What will be computed of the prompts, and why no more.

        Raises:
            RequestError: A request cannot be answered as asked.
            CapacityError: The work does not fit the memory given.
        """
        batch = Batch(self.text, requests)
        if requests:
            self._ready(self._count(batch.token_requests), on_layer)
        return summarize(batch.asked, is_apart=self.is_deterministic)

    def generate(
        self, requests: Sequence[Request], *, on_completions: OnCompletions = lambda completions: None
    ) -> list[Completion]:
        """Answer all requests, in their order; equal requests are computed once.

        Args:
            requests: What to answer.
            on_completions: Told after each sweep which requests (by index) were finished, with their completions.

        Raises:
            RequestError: A request cannot be answered as asked; nothing was computed.
            CapacityError: The work does not fit the memory given.
            FailedRequestsError: The model's numbers were none for some requests; `on_completions` was told all others.
        """
        if not requests:
            return []
        batch = Batch(self.text, requests)
        workload = self._count(batch.token_requests)
        executor = self._ready(workload, lambda num_done, num_layers: None)
        self._foretell(executor.policy, workload)
        self._first_sweep = executor.trace.num_sweeps
        before_j = gpu_energy_j(self._opened.device)
        try:
            with memory_named(self._opened.device.type):
                executor.execute(
                    batch.token_requests, on_results=lambda results: on_completions(batch.collect(results))
                )
        except FailedRequestsError as error:
            raise batch.failures(error) from error
        finally:
            after_j = gpu_energy_j(self._opened.device)
            self._energy_j = None if before_j is None or after_j is None else (self._energy_j or 0) + after_j - before_j
        return batch.completions()

    def gauge(self) -> Gauge:
        """Where the batch at hand stands; may be asked by another thread while `generate` works on it."""
        executor, num_layers = self._executor, self._opened.anatomy.num_layers
        if executor is None:
            return Gauge()
        return read_gauge(executor, self._first_sweep, num_layers, self._plan, self._planned_bytes)

    def _count(self, requests: Sequence[TokenRequest]) -> Workload:
        return measure_workload(requests, is_apart=self.is_deterministic)

    def usage(self) -> Usage:
        """What was used so far, by every placement of the weights."""
        return add_up([*self._past, *([self._usage_of(self._executor)] if self._executor is not None else [])])

    def _usage_of(self, executor: Executor) -> Usage:
        trace = executor.trace
        return Usage(
            load_s=self._load_s,
            num_prompt_tokens=trace.num_prompt_tokens,
            num_computed_prompt_tokens=trace.num_computed_prompt_tokens,
            num_generated_tokens=trace.num_generated_tokens,
            peak_bytes=executor.peak_bytes(),
            policy=executor.policy.to_json(),
            lanes={name: {"num_bytes": lane.num_bytes, "busy_s": lane.busy_s} for name, lane in trace.lanes.items()},
            phases=dict(trace.phases),
            predicted_s=self._predicted_s,
            energy_j=self._energy_j,
            planned_bytes=self._planned_bytes,
        )

    def _foretell(self, policy: Policy, workload: Workload) -> None:
        """Note what the cost model says of a batch, to be held against what is measured."""
        cost = CostModel(shape=self._shape, workload=workload, hardware=self._measure()).cost(policy)
        self._predicted_s += cost.total_s
        self._plan = phase_plans(cost, plan_sweeps(policy, workload))
        for tier, peak in cost.peak_bytes.items():
            if peak:
                self._planned_bytes[str(tier)] = max(self._planned_bytes.get(str(tier), 0), math.ceil(peak))

    def _measure(self) -> Hardware:
        """The machine, measured once: before the engine itself fills the memory."""
        if self._hardware is None:
            opened, is_gpu = self._opened, self._opened.device.type == "cuda"
            self._hardware = detect("cuda" if is_gpu else "cpu", self._limits, opened.anatomy.dtype)
            fixed = self._fixed_policy
            may_attend_on_host = opened.sparsity is None if fixed is None else fixed.host_attention > 0
            if is_gpu and may_attend_on_host:
                form = make_format(opened.anatomy.kv_shape(0), opened.anatomy.dtype, opened.kv_coding)
                rate = host_attention_rate(form, self._shape.num_query_heads, is_link_busy=True)
                self._hardware = replace(self._hardware, host_attention_bytes_per_s=rate)
        return self._hardware

    def _ready(self, workload: Workload, on_layer: OnLayer) -> Executor:
        """The executor, its weights placed for this workload, and placed anew where their old place is too small."""
        opened, hardware = self._opened, self._measure()
        if self._executor is not None:
            try:
                check(self._executor.policy, self._shape, workload, hardware)
                return self._executor
            except CapacityError:
                self.close()
        fixed, is_apart = self._fixed_policy, self.is_deterministic
        policy = choose(self._shape, workload, hardware, fixed=fixed, is_apart=is_apart)
        cap_gpu_memory(self._limits, opened.device)
        start = time.perf_counter()
        with memory_named(opened.device.type):
            self._executor = self._load(policy, on_layer)
        self._load_s = time.perf_counter() - start
        return self._executor

    def _load(self, policy: Policy, on_layer: OnLayer) -> Executor:
        opened, disk_dir = self._opened, self._limits.disk_dir
        executor = Executor(
            opened.anatomy,
            opened.checkpoint,
            policy,
            codec=opened.codec,
            kv_coding=opened.kv_coding,
            sparsity=opened.sparsity,
            vocabulary_codec=opened.vocabulary_codec,
            device=opened.device,
            disk_tier=DiskTier(disk_dir, limit_bytes=self._limits.disk_bytes) if disk_dir is not None else None,
            on_layer=lambda layer: on_layer(layer + 1, opened.anatomy.num_layers),
            is_apart=self.is_deterministic,
        )
        if opened.setting.has_key_channels and opened.anatomy.keys is None:
            try:
                executor.find_key_channels()
            except BaseException:
                executor.close()
                raise
        return executor
