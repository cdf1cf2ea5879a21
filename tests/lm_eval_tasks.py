"""A folder of tasks in lm-evaluation-harness's form: every feature that is imported, on a few rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

CITIES = {"France": "Paris", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo", "Cuba": "Havana"}

TASKS: dict[str, dict[str, Any]] = {
    "_base": {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": "train.jsonl", "test": "test.jsonl"}},
        "test_split": "test",
        "metadata": {"version": 1.0},
    },
    "capitals": {  # examples drawn anew for each question, from another split
        "include": "_base.yaml",
        "task": "capitals",
        "tag": "geography",
        "output_type": "multiple_choice",
        "training_split": "train",
        "description": "Capitals of {{country[0]}}...\n\n",
        "doc_to_text": "Question: What is the capital of {{country}}?\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{choices.index(city)}}",
        "num_fewshot": 2,
        "metric_list": [{"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm", "acc_bytes")],
    },
    "letters": {  # examples from the questions' own split, without the question itself; a context that ends in a space
        "include": "_base.yaml",
        "task": "letters",
        "output_type": "multiple_choice",
        "fewshot_split": "test",
        "doc_to_text": "{{country}}: {% for one in choices %}{{'ABC'[loop.index0]}}. {{one}} {% endfor %}",
        "doc_to_choice": ["A", "B", "C"],
        "doc_to_target": "letter",
        "target_delimiter": "",
        "fewshot_delimiter": "\n",
        "num_fewshot": 3,
        "should_decontaminate": True,
        "doc_to_decontamination_query": "country",
    },
    "firsts": {  # columns by name, the beginning of the answer given, several right answers, the first examples
        "include": "_base.yaml",
        "task": "firsts",
        "output_type": "multiple_choice",
        "validation_split": "train",
        "fewshot_config": {
            "sampler": "first_n",
            "split": "train",
            "doc_to_target": "letter",
            "fewshot_delimiter": "\n##\n",
        },
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "both",
        "gen_prefix": "It is",
        "num_fewshot": 2,
    },
    "written": {  # generated, through two pipelines of filters, with examples of the file's own
        "include": "_base.yaml",
        "task": "written",
        "output_type": "generate_until",
        "doc_to_text": "{{question | regex_replace('What is', 'Name')}}",
        "doc_to_target": "{{city}}",
        "num_fewshot": 1,
        "fewshot_config": {
            "sampler": "first_n",
            "samples": [{"question": "What is the capital of Chad?", "city": "N'Djamena", "country": "Chad"}],
        },
        "generation_kwargs": {"until": ["\n\n", "Question:"], "do_sample": False, "max_gen_toks": 6},
        "metric_list": [
            {
                "metric": "exact_match",
                "ignore_case": True,
                "ignore_punctuation": True,
                "regexes_to_ignore": ["e", "\\s"],
            }
        ],
        "filter_list": [
            {
                "name": "letters",
                "filter": [
                    {"function": "regex", "regex_pattern": "([A-Z])|(\\w)", "group_select": -1, "fallback": "none"},
                    {"function": "lowercase"},
                    {"function": "take_first"},
                ],
            },
            {"name": "whole", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]},
        ],
    },
    "several": {  # generated, several right answers, everything else by default
        "include": "_base.yaml",
        "task": "several",
        "doc_to_text": "{{question}} Say ",
        "doc_to_target": "{{names}}",
        "generation_kwargs": {"until": "e", "max_gen_toks": 5},
    },
}

TASKS["inputs"] = {  # each choice is a context of its own, as in Winogrande
    "include": "_base.yaml",
    "task": "inputs",
    "output_type": "multiple_choice",
    "training_split": "train",
    "description": "Which is true?\n",
    "doc_to_text": "{{letter}}",
    "doc_to_choice": "{{[choices[0] + ' is the capital', choices[1] + ' is it', choices[2] + ' is that']}}",
    "doc_to_target": "of {{country}}.",
    "num_fewshot": 2,
}
TASKS["coded"] = {  # Python beside the file, which is run where the user lets it
    "include": "_base.yaml",
    "task": "coded",
    "output_type": "multiple_choice",
    "training_split": "train",
    "process_docs": "!function utils.process_docs",
    "doc_to_text": "!function utils.text",
    "doc_to_choice": "!function utils.choices",
    "doc_to_target": "letter",
    "num_fewshot": 1,
}
UTILS = """
def process_docs(dataset):
    return dataset.map(lambda row: {"query": f"Q: {row['question']}"})

def text(row):
    return row["query"] + "\\nA:"

def choices(row):
    return [choice.upper() for choice in row["choices"]]
"""


def write_tasks(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """Write the tasks and their data; `changes` are made to the task `capitals`, None taking a key away."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, keys in TASKS.items():
        shown = {**keys, **(changes or {})} if name == "capitals" else keys
        text = yaml.safe_dump({key: value for key, value in shown.items() if value is not None}, sort_keys=False)
        (folder / f"{name}.yaml").write_text(re.sub(r"'(!function [\w.]+)'", r"\1", text))
    (folder / "utils.py").write_text(UTILS)
    rows = [_row(index) for index in range(len(CITIES))]
    for split, chosen in (("train", rows), ("test", [*rows[3:], *rows[:2]])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return folder


def _row(index: int) -> dict[str, Any]:
    names = list(CITIES.values())
    choices = [names[(index + shift) % len(names)] for shift in range(3)]
    choices = choices[index % 3 :] + choices[: index % 3]
    right = choices.index(names[index])
    return {
        "country": list(CITIES)[index],
        "city": names[index],
        "question": f"What is the capital of {list(CITIES)[index]}?",
        "choices": choices,
        "letter": right,
        "both": [right, (right + 1) % 3],
        "names": [names[index], names[index].lower()],
    }
