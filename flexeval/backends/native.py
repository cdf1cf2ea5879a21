"""Our engine as a backend: text in, completions out, over GPU, CPU and disk. Joins the tokenizer to the tensors.

Knows how a model is loaded and a policy chosen; the work itself is `engine/`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from flexeval.backends.backend import OnCompletions, Usage
from flexeval.backends.batch import Batch
from flexeval.backends.loading import (
    OpenModel,
    check_dtype,
    check_gpu_limit,
    open_model,
    pick_device,
)
from flexeval.backends.options import read_limits, read_policy
from flexeval.backends.placed import OnLayer, Placed
from flexeval.backends.placing import Placements
from flexeval.backends.shortage import release
from flexeval.config import Limits, Setting
from flexeval.engine.sizes import measure_workload
from flexeval.engine.trace import Trace
from flexeval.errors import FailedRequestsError
from flexeval.meter import Gauge
from flexeval.models import ModelSource
from flexeval.planning.summary import PlanSummary, summarize
from flexeval.policy.cost import CostModel
from flexeval.policy.policy import Policy, check_sparse
from flexeval.policy.work import Workload
from flexeval.request import Completion, Request, TokenRequest, TokenResult
from flexeval.tokenizer import has_chat_template

Work = Callable[[Placed, Workload, bool], Policy | None]
"""Done on a placement that suits a workload; True where another one has begun it. Returns the policy for what is left,
if that is to be placed anew."""


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
        self._placements = Placements(opened, policy, limits, is_apart=is_deterministic)
        self.text = opened.text

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back memory, threads and files."""
        self._placements.close()

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
    def is_offloaded(self) -> bool:
        """Whether the weights' present placement puts anything elsewhere than where it is computed."""
        placed = self._placements.at_hand
        if placed is None:
            return False
        policy, tiers = placed.executor.policy, placed.executor.tiers
        return not all(tiers.is_home(split) for split in (policy.weights, policy.kv, policy.hidden))

    @property
    def trace(self) -> Trace:
        """Counters of the weights' present placement."""
        placed = self._placements.at_hand
        return Trace() if placed is None else placed.executor.trace

    def token_requests(self, requests: Sequence[Request]) -> list[TokenRequest]:
        """What the engine itself is asked, equal requests once. Raises `RequestError`."""
        return Batch(self.text, requests).token_requests

    def cost_model(self, requests: Sequence[Request]) -> CostModel:
        """What any policy would cost for these requests on this machine. Raises `RequestError`."""
        return self._placements.cost_model(self._count(self.token_requests(requests)))

    def try_out(self, model: CostModel, policy: Policy, requests: Sequence[TokenRequest]) -> CostModel:
        """The cost model, corrected by a trial under a policy where the work is long enough for one.

        Args:
            model: What `cost_model` says of the work.
            policy: Under which it will be done.
            requests: The work.
        """
        return self._placements.try_out(model, policy, requests)

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
        self._work(batch, lambda *_: None, on_layer)
        return summarize(batch.asked, is_apart=self.is_deterministic)

    def generate(
        self, requests: Sequence[Request], *, on_completions: OnCompletions = lambda completions: None
    ) -> list[Completion]:
        """Answer all requests, in their order; equal requests are computed once.

        Where memory runs out on the way, what is answered stays answered, and the rest goes on with less in flight at
        once: `Usage.splits` tells. Where measurements show that another placement is so much faster that moving the
        weights pays, what is begun is finished, and the rest goes on there: `Usage.moves` tells.

        Args:
            requests: What to answer.
            on_completions: Told after each sweep which requests (by index) were finished, with their completions.

        Raises:
            RequestError: A request cannot be answered as asked; nothing was computed.
            CapacityError: The work does not fit the memory given.
            FailedRequestsError: The model's numbers were none for some requests; `on_completions` was told all others.
        """
        batch = Batch(self.text, requests)
        self._work(batch, partial(self._answer, batch, on_completions), lambda num_done, num_layers: None)
        return batch.completions()

    def gauge(self) -> Gauge:
        """Where the batch at hand stands; may be asked by another thread while `generate` works on it."""
        placed = self._placements.at_hand
        return Gauge() if placed is None else placed.gauge()

    def _count(self, requests: Sequence[TokenRequest]) -> Workload:
        return measure_workload(requests, is_apart=self.is_deterministic)

    def usage(self) -> Usage:
        """What was used so far, by every placement of the weights."""
        return self._placements.usage()

    def _work(self, batch: Batch, work: Work, on_layer: OnLayer) -> None:
        """Have `work` done on a placement for what is unanswered, and what it leaves on another one.

        That is a better one, which the work names, or a smaller one, where memory ran out.
        """
        policy: Policy | None = None
        is_again = False
        while batch.unanswered:
            requests = [batch.token_requests[index] for index in batch.unanswered]
            workload = self._count(requests)
            try:
                policy = work(self._placements.ready(workload, requests, policy, on_layer), workload, is_again)
                if policy is None:
                    return
            except Exception as error:
                if error is batch.listener_error:
                    raise
                policy = self._placements.split(error, workload)
            is_again = is_again or policy is not None
            release(self._opened.device)  # not in the `except`, whose traceback holds tensors

    def _answer(
        self, batch: Batch, on_completions: OnCompletions, placed: Placed, workload: Workload, is_again: bool
    ) -> Policy | None:
        """Answer what is unanswered, and tell as it is; or leave a part to another policy."""
        places = batch.unanswered
        requests = [batch.token_requests[index] for index in places]

        def tell(results: Sequence[tuple[int, TokenResult]]) -> None:
            placed.count_answered(results)
            batch.tell([(places[index], result) for index, result in results], on_completions)

        course = self._placements.begin(workload, requests, count=self._count, is_again=is_again)
        try:
            with placed.counting_energy(self._opened.device):
                placed.executor.execute(requests, on_results=tell, is_enough=course.is_enough)
        except FailedRequestsError as error:
            reasons = {places[index]: reason for index, reason in error.reasons.items()}
            raise batch.failures(FailedRequestsError(reasons)) from error
        return self._placements.end()
