"""The packaged tasks read a dataset that is named, in the hub's own columns, as they read their packages."""

import json
from pathlib import Path
from typing import Any

import pytest
from helm_support import build_card, build_suite, run_suite

QUESTION = {"activity_label": "Sums", "ctx": "Two and two", "endings": ["make five.", "make four."], "label": "1"}
FORMS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "hellaswag_packaged": ("validation", [{**QUESTION, "ctx": f"{QUESTION['ctx']} ({n})"} for n in range(7)]),
    "truthfulqa_packaged": (
        "validation",
        [
            {"question": f"Two and two ({n})?", "mc1_targets": {"choices": ["make four.", "No"], "labels": [1, 0]}}
            for n in range(7)
        ],
    ),
    "gsm8k_packaged": ("test", [{"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}]),
}


@pytest.mark.usefixtures("packaged_questions")
@pytest.mark.parametrize("task", FORMS)
def test_a_dataset_by_name_is_read_the_same_way(task: str, tmp_path: Path):
    split, rows = FORMS[task]
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if task != "hellaswag_packaged":  # a configuration, as the hub's data have one
        name = {"truthfulqa_packaged": "multiple_choice", "gsm8k_packaged": "main"}[task]
        header = {"configs": [{"config_name": name, "data_files": [{"split": split, "path": f"{split}.jsonl"}]}]}
        (folder / "README.md").write_text(f"---\n{json.dumps(header)}\n---\n")
    entry = f"{task}:model=text,dataset={folder}"
    requests, _, scored = run_suite(build_suite(entry), tmp_path / "run", build_card())
    (info,) = scored.tasks
    assert info.source.count(str(folder)) == 1 and info.name.startswith(f"{task}: ")
    assert len(requests) == len(scored.instances) == (1 if split == "test" else 2), "five are examples"
    assert all("Two and two" in request.prompt for request in requests)
    right = {"gsm8k_packaged": "2 + 2 = <<2+2=4>>4 The answer is 4."}.get(task, "make four.")
    assert all(result.reference.endswith(right) for result in scored.instances)
