"""HumanEval's prompts: solutions scored token by token, completions parsed and never run."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from helm_support import build_card, build_suite, run_suite

from flexeval.benchmark.resources import import_tasks
from flexeval.errors import ConfigError, DataError

PROMPT = 'def add(a, b):\n    """Add them."""\n'


@pytest.fixture(scope="module")
def task():
    return next(module for module in import_tasks() if module.__name__.endswith(".humaneval_packaged"))


def test_all_problems_are_there_and_solved(task):
    instances = task.HumanEvalPackagedScenario("solution", "").get_instances("")
    assert Counter(instance.split for instance in instances) == {"test": 164}
    for instance in instances:
        solution = instance.references[0].output.text
        assert not instance.input.text.endswith("\n") and solution.startswith("\n")
        assert task.has_body(f"{instance.input.text}\n", solution[1:], instance.extra_data["entry_point"])
        assert not task.has_body(f"{instance.input.text}\n", "", instance.extra_data["entry_point"])


def test_a_solution_is_scored_by_its_own_tokens(tmp_path: Path):
    requests, completions, scored = run_suite(build_suite("humaneval_packaged:model=text"), tmp_path, build_card())
    (info,) = scored.tasks
    assert (info.name, info.metric, info.higher_is_better) == ("humaneval_packaged", "bits_per_byte", False)
    assert "MIT" in info.source
    for request, completion, result in zip(requests, completions, scored.instances, strict=True):
        assert (request.max_tokens, request.echo) == (0, True)
        solution = result.reference
        assert request.prompt.endswith(solution)
        num = next(n for n in range(1, len(completion.tokens)) if len("".join(completion.tokens[-n:])) >= len(solution))
        bits = -sum(completion.logprobs[-num:]) / math.log(2)
        assert result.score == pytest.approx(bits / len(solution.encode()))


def test_a_completion_is_asked_with_helms_stops_and_parsed(tmp_path: Path):
    entry = "humaneval_packaged:model=text,method=generation,max_tokens=32"
    requests, _, scored = run_suite(build_suite(entry), tmp_path, build_card())
    assert scored.tasks[0].metric == "is_function"
    assert all(request.stop == ("\nclass", "\ndef", "\nif", "\nprint") for request in requests)
    assert all((request.max_tokens, request.temperature) == (32, 0) for request in requests)
    assert all(request.prompt.endswith(('"""\n', "'''\n")) for request in requests)
    assert {result.score for result in scored.instances} <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("completion", "is_function"),
    [
        ("    return a + b\n", True),
        ("    return a + b\n\n# and so on", True),
        ("    pass\n", False),
        ("    ...\n", False),
        ("", False),
        ("    return a +\n", False),
        ("return a + b\n", False),
        ("    return '\0'\n", False),
        ("    return " + "(" * 5000, False),
        ("    return " + "-" * 100_000 + "1\n", False),
        ("    return a\n\ndef add(a, b):\n    pass\n", False),
    ],
)
def test_what_counts_as_a_function(task, completion: str, is_function: bool):
    assert task.has_body(PROMPT, completion, "add") is is_function


def test_nothing_is_run(task, tmp_path: Path):
    target = tmp_path / "harm"
    assert task.has_body(PROMPT, f"    return 1\n\nopen({str(target)!r}, 'w')\n", "add")
    assert not target.exists()


def test_a_dataset_by_name_is_read_the_same_way(task, tmp_path: Path):
    folder = tmp_path / "own"
    folder.mkdir()
    row = {"task_id": "Own/0", "prompt": PROMPT, "canonical_solution": "    return a + b\n", "entry_point": "add"}
    (folder / "test.jsonl").write_text(json.dumps(row) + "\n")
    entry = f"humaneval_packaged:model=text,dataset={folder}"
    requests, _, scored = run_suite(build_suite(entry), tmp_path / "run", build_card())
    assert [request.prompt for request in requests] == [PROMPT + "    return a + b\n"]
    assert str(folder) in scored.tasks[0].source


def test_a_dataset_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    entry = "humaneval_packaged:model=text,dataset=openai/openai_humaneval"
    with pytest.raises(DataError, match="openai___openai_humaneval for humaneval_packaged"):
        run_suite(build_suite(entry), tmp_path, build_card())


def test_an_unknown_method_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="unknown method 'pass'"):
        run_suite(build_suite("humaneval_packaged:model=text,method=pass"), tmp_path, build_card())
