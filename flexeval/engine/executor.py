"""The engine's core: token requests in, token results out.

Knows how the parts work together; neither text nor the search for a policy.

`execute` is the algorithm: while there is work, plan a sweep, run it, read off what was asked, retire what is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

import torch

from flexeval.engine.codecs.kv_format import KVCoding
from flexeval.engine.compute.channels import KeyWatch, prompts_of_random_tokens
from flexeval.engine.compute.keeping import make_keeper
from flexeval.engine.compute.readout import read_row
from flexeval.engine.compute.row import RowMaker
from flexeval.engine.failures import MOST_EXPLAINED, MOST_WITHOUT_ANSWER, NOT_FINITE, WatchedHidden
from flexeval.engine.memory.hidden import HiddenStore
from flexeval.engine.parts import EngineParts
from flexeval.engine.scheduler import Scheduler
from flexeval.errors import FailedRequestsError
from flexeval.planning.host_rows import host_rows
from flexeval.planning.summary import PlanSummary
from flexeval.request import TokenRequest, TokenResult


class Executor(EngineParts):
    """One model under one policy, ready to answer."""

    plan: PlanSummary | None = None
    """What the plan of the last batch saves."""

    @torch.inference_mode()
    def find_key_channels(self) -> None:
        """Look at keys of random tokens: from now on keys rest by channel. Takes a sweep, which counts as loading."""
        text, watch = self._anatomy.config.get_text_config(), KeyWatch()
        self._anatomy.keys = watch
        try:
            self._read(prompts_of_random_tokens(text.vocab_size, self._anatomy.context_length), coding=None)
            self._anatomy.keys = watch.found()
        except BaseException:
            self._anatomy.keys = None  # so that they are looked for when the model is loaded again
            raise

    @torch.inference_mode()
    def explain(self, failed: Mapping[int, Sequence[int]]) -> dict[int, str]:
        """Why requests failed, and at which layer, for some of them; takes a sweep for each of those.

        Args:
            failed: By request, the tokens after which logits were not finite.
        """
        reasons = dict.fromkeys(failed, NOT_FINITE)
        for request in sorted(failed)[:MOST_EXPLAINED]:
            places = [hidden.first_broken() for hidden in self._read([failed[request]], coding=self._kv_coding)]
            place = next((place for place in places if place is not None), "the head")
            reasons[request] = f"{NOT_FINITE}: {place} makes numbers that are infinite or NaN"
        return reasons

    def _read(self, prompts: Sequence[Sequence[int]], *, coding: KVCoding | None) -> list[WatchedHidden]:
        """Take prompts through all layers, and read nothing off; what was seen on the way, sweep by sweep."""
        scheduler = Scheduler(
            [TokenRequest(prompt_ids=tuple(ids), max_tokens=0) for ids in prompts], self.policy, is_apart=self._is_apart
        )
        maker, nowhere = RowMaker(self._device, is_apart=self._is_apart), [frozenset[int]()] * self._anatomy.num_layers
        cache = self._make_cache(scheduler.log_capacities, coding=coding)
        seen: list[WatchedHidden] = []
        try:
            while scheduler.has_work:
                rows = self._make_rows(maker, scheduler.plan_sweep())
                hidden = self._make_hidden(WatchedHidden, rows, prompt_tokens=scheduler.summary.num_computed_tokens)
                seen.append(hidden)
                with closing(hidden):
                    for _ in self._sweeper.sweep(
                        rows, cache, hidden, nowhere, for_later=maker.for_later, expects_more=scheduler.expects_more
                    ):
                        pass
                scheduler.finish_sweep(0.0)
        finally:
            self._end_batch(cache)
        return seen

    @torch.inference_mode()
    def execute(
        self,
        requests: Sequence[TokenRequest],
        *,
        on_results: Callable[[list[tuple[int, TokenResult]]], None] = lambda results: None,
        is_enough: Callable[[Callable[[], list[int]]], bool] = lambda find_waiting: False,
    ) -> list[TokenResult]:
        """Answer all requests; results in the same order.

        Args:
            requests: What to score or to continue.
            on_results: Told after each sweep which requests (by index) it finished, with their results.
            is_enough: Asked after each sweep, with a function that finds the requests that nothing is computed of yet.
                Once it says so those are left unanswered: what is begun is finished, and that is all.

        Raises:
            FailedRequestsError: For some, logits were not finite; they are named with the layer, all others answered.
                Where many fail before the first is answered, the rest is not tried.
        """
        results: dict[int, TokenResult] = {}
        with self.trace.phase("plan"):
            crossing = self.tiers.crossing(self.policy)
            scheduler = Scheduler(requests, self.policy, is_apart=self._is_apart, crossing=crossing)
        self.plan = scheduler.summary
        maker = RowMaker(self._device, is_apart=self._is_apart)
        sampled = {index: request for index, request in enumerate(requests) if request.temperature}
        num_top = max((request.num_top_logprobs for request in requests), default=0)
        vocab_size = self._anatomy.config.get_text_config().vocab_size
        keeper = make_keeper(requests, vocab_size, self._device)
        cache = self._make_cache(scheduler.log_capacities, coding=self._kv_coding)
        try:
            while scheduler.has_work:
                start = time.perf_counter()
                plans = scheduler.plan_sweep()
                self._begin_sweep(plans)
                on_host = host_rows(
                    plans,
                    kv_bytes=[cache.host_token_bytes(layer) for layer in range(self._anatomy.num_layers)],
                    weight_bytes=self._weights.moved_bytes(),
                    share=self.policy.host_attention,
                )
                rows = self._make_rows(maker, plans)
                with closing(
                    self._make_hidden(HiddenStore, rows, prompt_tokens=self.plan.num_computed_tokens)
                ) as hidden:
                    outcomes = self._sweeper.sweep(
                        rows,
                        cache,
                        hidden,
                        on_host,
                        for_later=maker.for_later,
                        expects_more=scheduler.expects_more,
                    )
                    for row, hidden_1TD in zip(rows, outcomes, strict=True):
                        with self.trace.phase("head"), self._watch.running():
                            readout = read_row(
                                row.plan,
                                hidden_1TD,
                                self._anatomy.head,
                                sampled=sampled,
                                num_drawn=scheduler.num_drawn,
                                vocab_size=vocab_size,
                                num_top_logprobs=num_top,
                                keeper=keeper,
                            )
                        scheduler.record(row.plan, readout)
                elapsed_s = self.trace.sweeps[-1].elapsed_s = time.perf_counter() - start
                finished = scheduler.finish_sweep(elapsed_s)
                self.trace.num_prompt_tokens += sum(len(requests[index].prompt_ids) for index, _ in finished)
                self.trace.num_generated_tokens += sum(len(result.token_ids) for _, result in finished)
                results.update(finished)
                if finished:
                    on_results(finished)
                elif not results and len(scheduler.failed) > MOST_WITHOUT_ANSWER:
                    break
                if not scheduler.is_closed and not scheduler.failed and is_enough(scheduler.find_waiting):
                    scheduler.close()
            cache.flush()
        finally:
            self._end_batch(cache)
        if scheduler.is_closed:  # what failed is asked again with the rest
            return [results[index] for index in sorted(results)]
        if scheduler.failed:
            raise FailedRequestsError(self.explain(scheduler.failed))
        return [results[index] for index in range(len(requests))]
