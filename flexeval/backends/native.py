"""Our engine as a backend: text in, completions out, over GPU, CPU and disk. Joins the tokenizer to the tensors.

Knows how a model is loaded and a policy chosen; the work itself is `engine/`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from flexeval.backends.backend import OnCompletions, Usage
from flexeval.backends.loading import OpenModel, open_model
from flexeval.backends.text import TextHalf
from flexeval.config import Limits, Setting, parse_disk, parse_size
from flexeval.engine.executor import Executor
from flexeval.engine.memory.tier import DiskTier
from flexeval.engine.sizes import measure_workload, model_shape
from flexeval.errors import CapacityError
from flexeval.models import ModelSource
from flexeval.policy.hardware import Hardware, detect
from flexeval.policy.policy import Policy, Workload
from flexeval.policy.search import check, search
from flexeval.request import Completion, Request, TokenRequest, TokenResult

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

        Raises:
            FlexevalError: The model, a setting or an option is not usable; the message says how to mend it.
        """
        disk_dir, disk_bytes = parse_disk(str(disk)) if disk is not None else (None, 0)
        limits = Limits(
            gpu_bytes=None if gpu_memory is None else parse_size(gpu_memory),
            cpu_bytes=None if cpu_memory is None else parse_size(cpu_memory),
            disk_bytes=disk_bytes,
            disk_dir=disk_dir,
        )
        fixed = None if policy == "auto" else _read_policy(policy)
        return cls(open_model(model, setting=setting, device=device, dtype=dtype), fixed, limits)

    def __init__(self, opened: OpenModel, policy: Policy | None, limits: Limits):
        """See `load`, which reads these from text."""
        self._opened = opened
        self._fixed_policy = policy
        self._limits = limits
        self._shape = model_shape(opened.anatomy, opened.codec)
        self.text = opened.text
        self._executor: Executor | None = None
        self._hardware: Hardware | None = None
        self._load_s = 0.0

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back memory, threads and files."""
        if self._executor is not None:
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

    def place(self, requests: Sequence[Request], *, on_layer: OnLayer = lambda num_done, num_layers: None) -> None:
        """Choose a policy for these requests and load the weights to where it wants them.

        `generate` does so by itself; apart, it can show its progress and be timed.

        Raises:
            RequestError: A request cannot be answered as asked.
            CapacityError: The work does not fit the memory given.
        """
        if requests:
            self._ready(measure_workload(_Batch(self.text, requests).token_requests), on_layer)

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
        """
        if not requests:
            return []
        batch = _Batch(self.text, requests)
        executor = self._ready(measure_workload(batch.token_requests), lambda num_done, num_layers: None)
        executor.execute(batch.token_requests, on_results=lambda results: on_completions(batch.collect(results)))
        return batch.completions()

    def usage(self) -> Usage:
        """What was used so far."""
        if self._executor is None:
            return Usage(load_s=0.0, num_prompt_tokens=0, num_computed_prompt_tokens=0, num_generated_tokens=0)
        trace = self._executor.trace
        return Usage(
            load_s=self._load_s,
            num_prompt_tokens=trace.num_prompt_tokens,
            num_computed_prompt_tokens=trace.num_computed_prompt_tokens,
            num_generated_tokens=trace.num_generated_tokens,
            peak_bytes=self._executor.peak_bytes(),
            policy=self._executor.policy.to_json(),
            lanes={name: {"num_bytes": lane.num_bytes, "busy_s": lane.busy_s} for name, lane in trace.lanes.items()},
            phases=dict(trace.phases),
        )

    def _ready(self, workload: Workload, on_layer: OnLayer) -> Executor:
        """The executor, its weights placed for this workload, and placed anew where their old place is too small."""
        opened = self._opened
        if self._hardware is None:  # measured before the engine itself fills the memory
            place: Literal["cuda", "cpu"] = "cuda" if opened.device.type == "cuda" else "cpu"
            self._hardware = detect(place, self._limits, opened.anatomy.dtype)
        if self._executor is not None:
            try:
                check(self._executor.policy, self._shape, workload, self._hardware)
                return self._executor
            except CapacityError:
                self.close()
        policy = self._fixed_policy or search(self._shape, workload, self._hardware)
        check(policy, self._shape, workload, self._hardware)
        if opened.device.type == "cuda" and self._limits.gpu_bytes is not None:  # a bound, not a wish
            total_bytes = torch.cuda.get_device_properties(opened.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self._limits.gpu_bytes / total_bytes), opened.device)
        start = time.perf_counter()
        disk_dir = self._limits.disk_dir
        self._executor = Executor(
            opened.anatomy,
            opened.checkpoint,
            policy,
            codec=opened.codec,
            device=opened.device,
            disk_tier=DiskTier(disk_dir) if disk_dir is not None else None,
            on_layer=lambda layer: on_layer(layer + 1, opened.anatomy.num_layers),
        )
        self._load_s += time.perf_counter() - start
        return self._executor


class _Batch:
    """Requests on their way through the engine: which token requests stand for which request."""

    def __init__(self, text: TextHalf, requests: Sequence[Request]):
        self._text = text
        self._places: dict[Request, list[int]] = {}
        for index, request in enumerate(requests):
            self._places.setdefault(request, []).append(index)
        self._distinct = list(self._places)
        self.token_requests: list[TokenRequest] = []
        self._owner: list[int] = []
        self._waiting: list[dict[int, TokenResult | None]] = []
        for owner, request in enumerate(self._distinct):
            parts = text.to_token_requests(request, where=f"request {self._places[request][0]}")
            first = len(self.token_requests)
            self._waiting.append(dict.fromkeys(range(first, first + len(parts))))
            self.token_requests += parts
            self._owner += [owner] * len(parts)
        self._completions: dict[int, Completion] = {}

    def collect(self, results: Sequence[tuple[int, TokenResult]]) -> list[tuple[int, Completion]]:
        """Take results; return the completions that are whole now, for every request that asked for them."""
        finished = []
        for index, result in results:
            owner = self._owner[index]
            parts = self._waiting[owner]
            parts[index] = result
            whole = [part for part in parts.values() if part is not None]
            if len(whole) == len(parts):
                request = self._distinct[owner]
                prompt_ids = self.token_requests[index].prompt_ids
                completion = self._text.to_completion(request, prompt_ids, whole)
                finished += [(place, completion) for place in self._places[request]]
        self._completions.update(finished)
        return finished

    def completions(self) -> list[Completion]:
        """All completions, in the order of the requests."""
        return [self._completions[index] for index in range(len(self._completions))]


def _read_policy(policy: str | Policy) -> Policy:
    if isinstance(policy, Policy):
        return policy
    return Policy.load(Path(policy)) if Path(policy).is_file() else Policy.parse(policy)
