"""Made-up results for the tests of reports. Nothing in here was measured: the scores are seeded random numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from flexeval.results import InstanceResult, RunResults, SettingResult, TaskInfo

GIB = 2**30
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u202e\x1b[31m\x00 \ud800"

TASKS = (
    TaskInfo(name="narrative_qa", metric="f1_score", split="test", group="narrative_qa"),
    TaskInfo(name="openbookqa", metric="exact_match", split="test", group="commonsense"),
    TaskInfo(name="mmlu: abstract_algebra", metric="exact_match", split="test", group="mmlu"),
    TaskInfo(name="mmlu: computer_security", metric="exact_match", split="test", group="mmlu"),
    TaskInfo(name="mmlu: us_foreign_policy", metric="exact_match", split="test", group="mmlu"),
    TaskInfo(name="gsm", metric="final_number_exact_match", split="test", group="gsm", source="registry copy of GSM8K"),
)
HEADER = {
    "narrative_qa": "Read and answer.\n\nPassage: A ship left at dawn.\nQuestion: When?\nAnswer: at dawn\n\n",
    "gsm": "Q: Tom has 2 apples and buys 3. How many has he?\nA: Tom has 2 + 3 = 5 apples. The answer is 5.\n\n",
}
# setting: (chance to keep a right answer, chance to mend a wrong one, seconds a question, tier bytes, load seconds)
SETTINGS = {
    "none": (1.0, 0.0, 0.92, {"gpu": 20 * GIB, "cpu": 41 * GIB}, 31.0),
    "w4": (0.95, 0.05, 0.31, {"gpu": 17 * GIB, "cpu": 3 * GIB}, 58.0),
    "w4-g32": (0.97, 0.04, 0.36, {"gpu": 18 * GIB, "cpu": 4 * GIB}, 61.0),
    "w4-g128": (0.84, 0.03, 0.30, {"gpu": 16 * GIB, "cpu": 2 * GIB}, 55.0),
}


def synthetic(
    settings: Sequence[str] = tuple(SETTINGS),
    tasks: Sequence[TaskInfo] = TASKS,
    num_questions: int = 60,
    name: str = "synthetic",
    seed: int = 7,
    hostile: bool = False,
) -> RunResults:
    """A run as a pipeline would report it; `hostile` answers try to break the page."""
    truth = {
        (task.name, number): random.Random(f"{seed}/{task.name}/{number}").random() < 0.4 + 0.1 * position
        for position, task in enumerate(tasks)
        for number in range(num_questions)
    }
    instances = [
        _instance(task, setting, number, seed, truth[task.name, number], hostile)
        for setting in settings
        for task in tasks
        for number in range(num_questions)
    ]
    return RunResults(
        name=name,
        suite="synthetic-suite",
        model="opt-30b",
        model_note="random numbers, not a model",
        command=f"flexeval run --suite synthetic-suite --settings {','.join(settings)}",
        created="2026-01-02T03:04:05+00:00",
        machine={"processor": "Example CPU, 16 cores", "memory": "120 GiB", "gpu": "Example GPU, 24 GiB"},
        versions={"flexeval": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "crfm-helm": "0.5.16"},
        tasks=list(tasks),
        settings=[_setting(setting, instances) for setting in settings],
        instances=instances,
        skipped={"wmt_14: hi-en": "its data is behind a login"},
        notes=["Scores are random numbers made for a test."],
    )


def changed(change: Callable[[InstanceResult], dict[str, Any]], **arguments: Any) -> RunResults:
    """A synthetic run whose answers have the fields that `change` returns for them replaced."""
    results = synthetic(**arguments)
    return replace(results, instances=[replace(instance, **change(instance)) for instance in results.instances])


def _instance(task: TaskInfo, setting: str, number: int, seed: int, is_right: bool, hostile: bool) -> InstanceResult:
    keeps, mends, question_s, _, _ = SETTINGS[setting]
    dice = random.Random(f"{seed}/{task.name}/{setting}/{number}")
    right = dice.random() < keeps if is_right else dice.random() < mends
    graded = task.metric == "f1_score"
    answer = f" {number * 3 % 17}"
    output = answer if right else f" {(number * 3 + 1 + dice.randrange(2)) % 17}"
    score = random.Random(f"{number}/{output}").uniform(0.4, 1.0) * (1 if right else 0.4) if graded else float(right)
    if task.name == "gsm":
        output = f" First we add {number} and {number * 2}, which is {number * 3}. The answer is{output}."
    prompt = HEADER.get(task.name, "The following are multiple choice questions (with answers).\n\n")
    return InstanceResult(
        task=task.name,
        setting=setting,
        instance_id=f"id{number}",
        score=score,
        prompt=f"{prompt}Question {number}: how much is 3 times {number}, modulo 17?\nAnswer:",
        output=HOSTILE + output if hostile else output,
        reference=answer.strip(),
        num_prompt_tokens=500 + number,
        num_generated_tokens=40 if task.name == "gsm" else 3,
        elapsed_s=question_s * dice.uniform(0.9, 1.1),
    )


def _setting(setting: str, instances: Sequence[InstanceResult]) -> SettingResult:
    own = [instance for instance in instances if instance.setting == setting]
    elapsed_s = sum(instance.elapsed_s for instance in own)
    streamed = SETTINGS[setting][3]["cpu"] * len(own) / 60
    return SettingResult(
        setting=setting,
        backend="flexeval",
        elapsed_s=elapsed_s,
        load_s=SETTINGS[setting][4],
        num_requests=len(own),
        num_prompt_tokens=sum(instance.num_prompt_tokens for instance in own),
        num_computed_prompt_tokens=sum(instance.num_prompt_tokens for instance in own) // 4,
        num_generated_tokens=sum(instance.num_generated_tokens for instance in own),
        peak_bytes=SETTINGS[setting][3],
        policy={"weights": {"gpu": 0.3, "cpu": 0.7, "disk": 0.0}, "group_tokens": 8192, "groups_per_block": 6},
        lanes={
            "compute": {"num_bytes": 0.0, "busy_s": elapsed_s * 0.91},
            "load_weights": {"num_bytes": streamed, "busy_s": elapsed_s * 0.64},
            "store_hidden": {"num_bytes": streamed / 40, "busy_s": elapsed_s * 0.05},
        },
        predicted_s=elapsed_s * 1.1,
        planned_bytes={tier: 2 * num_bytes for tier, num_bytes in SETTINGS[setting][3].items()},
    )
