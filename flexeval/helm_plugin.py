"""flexeval's engine inside stock `helm-run`: a Runner that answers each run in one batch, and a Client.

    helm-run --runner-class-name flexeval.helm_plugin.FlexevalRunner --local-path OUT/helm/prod_env
        --models-to-run flexeval/MODEL-w4 --conf-paths FILE.conf --suite NAME --max-eval-instances 10

Model and setting stand in the deployment's `client_spec` in `model_deployments.yaml`, which every flexeval run writes;
so does `apply_chat_template`, which means what it means to HELM's HuggingFaceClient.
HELM downloads all data itself here; a suite's `packaged_data` is not known to it.
A request that fails fails alone: HELM gives up the runs that ask it, for it scores none of a run without all answers.
Without `--runner-class-name`, HELM sends single requests to the Client, which can only gather those of its threads.
Knows HELM and `Engine`; must not know how the engine works.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.executor import ExecutionSpec, Executor, ExecutorError
from helm.benchmark.model_deployment_registry import get_model_deployment
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import Runner
from helm.clients.client import Client
from helm.common.request import ErrorFlags, RequestResult
from helm.common.request import Request as HelmRequest
from helm.proxy.retry import NonRetriableException

import flexeval
from flexeval.benchmark.helm.convert import Batch, from_helm, to_helm
from flexeval.benchmark.helm.models import CLIENT_CLASS
from flexeval.benchmark.resources import import_tasks
from flexeval.errors import ConfigError, FailedRequestsError, FlexevalError, ModelError, RequestError
from flexeval.request import Completion, Request

T = TypeVar("T")
_GATHER_S = 0.02  # HELM's threads send their requests at about the same time

import_tasks()  # `helm-run` imports this module, an entry point of its plug-ins, before it looks for run specs


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArguments:
    """What a deployment's `client_spec` says about the engine."""

    model: str
    """What `Engine.load` takes."""
    setting: str = "none"
    """The setting's name."""
    added_prefix: str = ""
    """Text of the token that the tokenizer puts before a prompt, if it does."""
    apply_chat_template: bool | None = None
    """Whether prompts that are answered stand in the model's chat template; None where it has one."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `Engine.load`: `{gpu_memory: 16GiB}`."""

    @classmethod
    def of_deployment(cls, name: str) -> EngineArguments:
        """Read them from HELM's registry. Raises `ConfigError` for a deployment that is not ours."""
        spec = get_model_deployment(name).client_spec
        if spec.class_name != CLIENT_CLASS:
            raise ConfigError(
                f"{name} is a deployment of {spec.class_name}",
                where="--models-to-run",
                mend=f"Name a deployment whose client is {CLIENT_CLASS}",
            )
        try:
            return cls(**spec.args)
        except TypeError as error:  # of a name that is none, or none that must be there
            raise ConfigError(
                f"the arguments of {name}'s client are not those of {CLIENT_CLASS}: {error}",
                where="model_deployments.yaml",
                mend=f"Arguments are: {', '.join(field.name for field in fields(cls))}",
            ) from error

    def load(self) -> flexeval.Engine:
        """Load the engine: a context manager."""
        return flexeval.Engine.load(self.model, setting=self.setting, **self.engine_options)

    def answer(self, engine: flexeval.Engine, requests: Sequence[HelmRequest]) -> list[RequestResult]:
        """Answer HELM's requests in one batch; equal ones share an answer, and one that fails fails alone."""
        is_chat = engine.has_chat_template if self.apply_chat_template is None else self.apply_chat_template
        asked = [_tried(from_helm, request, is_chat=is_chat) for request in requests]
        answers = _answer_apart(engine, list(dict.fromkeys(one for one in asked if isinstance(one, Request))))
        batch = Batch.of([one for one in answers.values() if isinstance(one, Completion)])
        results = []
        for request, ours in zip(requests, asked, strict=True):
            answer = answers[ours] if isinstance(ours, Request) else ours
            if isinstance(answer, FlexevalError):
                results.append(_failure(answer))
            else:
                told = _tried(to_helm, request, answer, batch=batch, added_prefix=self.added_prefix)
                results.append(_failure(told) if isinstance(told, FlexevalError) else told)
        return results


def _answer_apart(engine: flexeval.Engine, requests: Sequence[Request]) -> dict[Request, Completion | FlexevalError]:
    """What each request comes to; what is wrong with all of them is raised."""
    answers: dict[Request, Completion | FlexevalError] = {}

    def keep(told: Sequence[tuple[int, Completion]]) -> None:
        answers.update((requests[index], completion) for index, completion in told)

    try:
        answers.update(zip(requests, engine.generate(requests, on_completions=keep), strict=True))
    except FailedRequestsError as error:
        answers.update((requests[index], ModelError(reason)) for index, reason in error.reasons.items())
        answers.update((request, error) for request in requests if request not in answers)
    except RequestError as error:  # nothing was computed
        if len(requests) == 1:
            return {requests[0]: error}
        tried = {request: _tried(engine.token_requests, [request]) for request in requests}
        answers.update((request, found) for request, found in tried.items() if isinstance(found, FlexevalError))
        if not answers:
            raise
        answers.update(_answer_apart(engine, [request for request in requests if request not in answers]))
    return answers


def _tried(work: Callable[..., T], *args: Any, **kwargs: Any) -> T | FlexevalError:
    try:
        return work(*args, **kwargs)
    except FlexevalError as error:
        return error


def _failure(error: FlexevalError) -> RequestResult:
    """What HELM is told of a request without an answer: not to ask again, and not to score it as an empty one."""
    flags = ErrorFlags(is_retriable=False, is_fatal=True)
    return RequestResult(success=False, cached=False, completions=[], embedding=[], error=str(error), error_flags=flags)


class FlexevalRunner(Runner):
    """HELM's runner with our engine in the place of its executor."""

    def __init__(self, execution_spec: ExecutionSpec, *args: Any, **kwargs: Any):
        super().__init__(execution_spec, *args, **kwargs)
        self.executor: EngineExecutor = EngineExecutor(self.executor)

    def run_all(self, run_specs: list[RunSpec]) -> None:
        """Run all specs, then release the engine."""
        with self.executor.engines:
            super().run_all(run_specs)


class EngineExecutor(Executor):
    """Answers all requests of a run in one batch.

    Args:
        plain: The executor it replaces, whose context HELM's tokenizers and metrics go on using.
    """

    def __init__(self, plain: Executor):
        self.execution_spec = plain.execution_spec
        self.context = plain.context
        self.engines = ExitStack()
        """Owns the engine in use."""
        self._loaded: tuple[EngineArguments, flexeval.Engine] | None = None

    def execute(self, scenario_state: ScenarioState) -> ScenarioState:
        """Return the state with a result for each of its requests.

        Raises `ExecutorError`, as HELM's own does, where one has none: HELM cannot score a run without it.
        """
        if self.execution_spec.dry_run:
            return scenario_state
        arguments = EngineArguments.of_deployment(scenario_state.adapter_spec.model_deployment)
        requests = [state.request for state in scenario_state.request_states]
        results = arguments.answer(self._engine(arguments), requests)
        if failed := [result.error for result in results if not result.success]:
            raise ExecutorError(f"{len(failed)} of {len(results)} requests failed. The first: {failed[0]}")
        request_states = [
            replace(state, result=result) for state, result in zip(scenario_state.request_states, results, strict=True)
        ]
        return ScenarioState(scenario_state.adapter_spec, request_states, scenario_state.annotator_specs)

    def _engine(self, arguments: EngineArguments) -> flexeval.Engine:
        """Return the engine for a deployment; there is one at a time."""
        if self._loaded is None or self._loaded[0] != arguments:
            self.engines.close()
            self._loaded = arguments, self.engines.enter_context(arguments.load())
        return self._loaded[1]


class FlexevalClient(Client):
    """HELM's view of the engine as a service. The engine is loaded at the first request and kept until exit.

    Args:
        model: What `Engine.load` takes.
        setting: The setting's name.
        added_prefix: Text of the token that the tokenizer puts before a prompt, if it does.
        apply_chat_template: Whether prompts stand in the model's chat template; None where it has one.
        engine_options: Further arguments of `Engine.load`.
    """

    def __init__(
        self,
        model: str,
        setting: str = "none",
        added_prefix: str = "",
        apply_chat_template: bool | None = None,
        engine_options: dict[str, Any] | None = None,
    ):
        self._arguments = EngineArguments(
            model=model,
            setting=setting,
            added_prefix=added_prefix,
            apply_chat_template=apply_chat_template,
            engine_options=engine_options or {},
        )
        self._waiting: SimpleQueue[tuple[HelmRequest, Future[RequestResult]]] = SimpleQueue()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flexeval-client")
        self._engine: flexeval.Engine | None = None

    def make_request(self, request: HelmRequest) -> RequestResult:
        """Answer one request, together with those that other threads make at the same time."""
        future: Future[RequestResult] = Future()
        self._waiting.put((request, future))
        self._worker.submit(self._answer_waiting)
        try:
            return future.result()
        except FlexevalError as error:
            return _failure(error)
        except Exception as error:
            raise NonRetriableException(f"{type(error).__name__}: {error}") from error  # HELM would try five times

    def _answer_waiting(self) -> None:
        if self._waiting.empty():
            return  # an earlier call took everything
        time.sleep(_GATHER_S)
        waiting = _drain(self._waiting)
        try:
            if self._engine is None:
                engine = self._arguments.load()
                self._engine = engine.__enter__()
                atexit.register(engine.__exit__, None, None, None)  # HELM never closes a client
            results = self._arguments.answer(self._engine, [request for request, _ in waiting])
        except Exception as error:
            for _, future in waiting:
                future.set_exception(error)
        else:
            for (_, future), result in zip(waiting, results, strict=True):
                future.set_result(result)


def _drain(queue: SimpleQueue[Any]) -> list[Any]:
    items = []
    while True:
        try:
            items.append(queue.get_nowait())
        except Empty:
            return items
