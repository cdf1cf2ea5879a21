"""Requests on their way through an engine: which token requests stand for which. Knows no model and no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flexeval.backends.backend import OnCompletions
from flexeval.backends.text import TextHalf
from flexeval.distributions import NewRows
from flexeval.errors import FailedRequestsError
from flexeval.request import Completion, Request, TokenRequest, TokenResult


class Batch:
    """Requests, the token requests that stand for them, and the completions so far."""

    def __init__(self, text: TextHalf, requests: Sequence[Request]):
        """Translate all requests, equal ones once. Raises `RequestError`, naming the request by its index."""
        self._text = text
        self._places: dict[Request, list[int]] = {}
        for index, request in enumerate(requests):
            self._places.setdefault(request, []).append(index)
        self._distinct = list(self._places)
        self.token_requests: list[TokenRequest] = []
        """What the engine is asked."""
        self._owner: list[int] = []
        self._waiting: list[dict[int, TokenResult | None]] = []
        for owner, request in enumerate(self._distinct):
            parts = text.to_token_requests(request, where=f"request {self._places[request][0]}")
            first = len(self.token_requests)
            self._waiting.append(dict.fromkeys(range(first, first + len(parts))))
            self.token_requests += parts
            self._owner += [owner] * len(parts)
        self._completions: dict[int, Completion] = {}
        self._new_rows = NewRows()
        self.listener_error: Exception | None = None
        """What a listener raised: none of the engine's business."""

    @property
    def asked(self) -> list[TokenRequest]:
        """`token_requests`, each as often as it was asked for."""
        owners = zip(self.token_requests, self._owner, strict=True)
        return [one for one, owner in owners for _ in self._places[self._distinct[owner]]]

    @property
    def unanswered(self) -> list[int]:
        """Indices of the `token_requests` without a result."""
        return [index for parts in self._waiting for index, result in parts.items() if result is None]

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
                places = self._places[request]
                completion = replace(completion, elapsed_s=completion.elapsed_s / len(places))
                completion = self._with_new_rows(completion)
                parts.clear()  # most probable tokens are many objects
                finished += [(place, completion) for place in places]
        self._completions.update(finished)
        return finished

    def tell(self, results: Sequence[tuple[int, TokenResult]], on_completions: OnCompletions) -> None:
        """Take results, and hand on the completions that are whole now."""
        try:
            on_completions(self.collect(results))
        except Exception as error:
            self.listener_error = error
            raise

    def _with_new_rows(self, completion: Completion) -> Completion:
        """The completion without rows that another one of the batch has: shared beginnings would fill the memory."""
        rows = completion.distributions
        return replace(
            completion,
            distributions=None if rows is None else self._new_rows.of(rows),
            alternatives=tuple(map(self._with_new_rows, completion.alternatives)),
        )

    def failures(self, error: FailedRequestsError) -> FailedRequestsError:
        """What failed, by the requests that asked for it."""
        reasons = {
            place: reason
            for index, reason in error.reasons.items()
            for place in self._places[self._distinct[self._owner[index]]]
        }
        return FailedRequestsError(reasons)

    def completions(self) -> list[Completion]:
        """All completions, in the order of the requests."""
        return [self._completions[index] for index in range(sum(map(len, self._places.values())))]
