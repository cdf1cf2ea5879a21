"""Any task of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness, MIT), from its YAML files.

Prompts, answers and metrics are those of lm-evaluation-harness 0.4.13 for `multiple_choice` and `generate_until`; what
a file asks beyond that is refused by name. `path` is a folder of task files, or one, `task` a name in it; the first
`limit` rows are asked, with `num_fewshot` examples. Data and their licence are the task's own.
"""

from pathlib import Path

from helm.benchmark.adaptation.adapter_spec import (
    ADAPT_GENERATION,
    ADAPT_MULTIPLE_CHOICE_SEPARATE_ORIGINAL,
    AdapterSpec,
)
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
from helm.benchmark.window_services.window_service import WindowService
from helm.benchmark.window_services.window_service_factory import WindowServiceFactory

from flexeval.benchmark.lm_eval.parsing import read_task
from flexeval.benchmark.lm_eval.questions import Question, build_questions
from flexeval.benchmark.lm_eval.rows import Rows
from flexeval.benchmark.lm_eval.scoring import best_choices
from flexeval.benchmark.lm_eval.task import Task


class LmEvalScenario(Scenario):
    """The rows of a task, each a finished prompt."""

    name = "lm_eval"
    description = "A task of lm-evaluation-harness"
    tags = ()
    prompts_are_whole = True
    """A prompt that does not fit is refused, not shortened."""

    def __init__(self, path: str, task: str, num_fewshot: int | None, limit: int | None):
        super().__init__()
        self._task = read_task(Path(path), task, num_fewshot=num_fewshot)
        self._limit = limit
        self.description = f"{task} of lm-evaluation-harness's tasks in {path}, data: {self._task.dataset_path}"

    def get_instances(self, output_path: str) -> list[Instance]:
        """Return the questions."""
        questions = build_questions(self._task, Rows(self._task), limit=self._limit)
        return [_instance(question, f"id{index}") for index, question in enumerate(questions)]

    def get_metadata(self) -> ScenarioMetadata:
        """Declare the metric that stands for the task: the first, after the first filter."""
        return ScenarioMetadata(name=self.name, main_metric=metric_names(self._task)[0], main_split=TEST_SPLIT)


@run_spec_function("lm_eval")
def get_lm_eval_spec(path: str, task: str, num_fewshot: int | None = None, limit: int | None = None) -> RunSpec:
    """Ask a task's questions as lm-evaluation-harness does."""
    arguments = {"path": str(path), "task": str(task), "num_fewshot": num_fewshot, "limit": limit}
    read = read_task(Path(path), str(task), num_fewshot=num_fewshot)
    is_choice = read.output_type == "multiple_choice"
    metric = ChoiceMetric if is_choice else AnswerMetric
    shown = [f"{key}={value}" for key, value in arguments.items() if value is not None and key != "path"]
    return RunSpec(
        name=f"lm_eval:{','.join(shown)}",
        scenario_spec=ScenarioSpec(class_name=f"{__name__}.{LmEvalScenario.__name__}", args=arguments),
        adapter_spec=AdapterSpec(
            method=ADAPT_MULTIPLE_CHOICE_SEPARATE_ORIGINAL if is_choice else ADAPT_GENERATION,
            input_prefix="",
            input_suffix="",
            output_prefix="",
            output_suffix="",
            instance_prefix="",
            max_train_instances=0,
            max_tokens=read.max_tokens,
            temperature=0.0,
            num_outputs=1,
            stop_sequences=list(read.until),
        ),
        metric_specs=[
            MetricSpec(
                class_name=f"{__name__}.{metric.__name__}",
                args={key: arguments[key] for key in ("path", "task", "num_fewshot")},
            )
        ],
        groups=[f"lm_eval_{task}"],
    )


def metric_names(task: Task) -> list[str]:
    """Names of a task's scores as lm-evaluation-harness has them: `exact_match,strict-match` behind a named filter."""
    if task.output_type == "multiple_choice":
        return list(task.metrics)
    return [
        metric if one.name == "none" else f"{metric},{one.name}" for metric in task.metrics for one in task.pipelines
    ]


class ChoiceMetric(ReferenceMetric):
    """`acc` and its kin: is the most likely choice a right one."""

    def __init__(self, path: str, task: str, num_fewshot: int | None):
        self._task = read_task(Path(path), task, num_fewshot=num_fewshot)

    def evaluate_references(
        self,
        adapter_spec: AdapterSpec,
        reference_request_states: list[RequestState],
        metric_service: MetricService,
        eval_cache_path: str,
    ) -> list[Stat]:
        """Return the task's metrics, with HELM's figures of every request."""
        window = WindowServiceFactory.get_window_service(adapter_spec.model_deployment, metric_service)
        instance = reference_request_states[0].instance
        best = best_choices(
            [continuation_logprob(state, window) for state in reference_request_states],
            instance.extra_data["choices"],
        )
        right = [index for index, reference in enumerate(instance.references) if reference.is_correct]
        general = compute_request_state_metrics(
            EfficiencyMetric(), adapter_spec, reference_request_states[0], metric_service
        )
        return [
            *(Stat(MetricName(name)).add(getattr(best, name) in right) for name in self._task.metrics),
            Stat(MetricName("predicted_index")).add(best.acc),
            *general,
        ]


def continuation_logprob(state: RequestState, window: WindowService) -> float:
    """Log-likelihood of a choice behind its context, as lm-evaluation-harness cuts them (`TemplateLM._encode_pair`).

    Both are encoded together; the choice's tokens are those that the context has not, its trailing spaces left out.
    """
    context = state.request.prompt[: state.instance.extra_data["num_context"][state.reference_index]].rstrip()
    num_tokens = window.get_num_tokens(state.request.prompt) - window.get_num_tokens(context)
    tokens = state.result.completions[0].tokens
    assert 0 < num_tokens < len(tokens), (num_tokens, len(tokens))
    return sum(token.logprob for token in tokens[-num_tokens:])


class AnswerMetric(Metric):
    """`exact_match`: does a generated text equal a target, after each of the task's filters."""

    def __init__(self, path: str, task: str, num_fewshot: int | None):
        self._task = read_task(Path(path), task, num_fewshot=num_fewshot)

    def evaluate_generation(
        self,
        adapter_spec: AdapterSpec,
        request_state: RequestState,
        metric_service: MetricService,
        eval_cache_path: str,
    ) -> list[Stat]:
        """Return the task's metrics, with HELM's figures of every request."""
        text = request_state.result.completions[0].text
        targets = [reference.output.text for reference in request_state.instance.references]
        answers = [pipeline.apply(text) for pipeline in self._task.pipelines]
        matches = [any(self._task.match.is_match(answer, target) for target in targets) for answer in answers]
        return [
            *(Stat(MetricName(name)).add(match) for name, match in zip(metric_names(self._task), matches, strict=True)),
            *compute_request_state_metrics(EfficiencyMetric(), adapter_spec, request_state, metric_service),
        ]


def _instance(question: Question, identity: str) -> Instance:
    if question.choices:
        references = [
            Reference(Output(text=text), tags=[CORRECT_TAG] if index in question.gold else [])
            for index, text in enumerate(question.continuations)
        ]
    else:
        references = [Reference(Output(text=text), tags=[CORRECT_TAG]) for text in question.targets]
    return Instance(
        input=Input(text=question.context),
        references=references,
        split=TEST_SPLIT,
        id=identity,
        extra_data={"choices": list(question.choices), "num_context": list(question.num_context)},
    )
