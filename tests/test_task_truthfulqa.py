"""The packaged TruthfulQA: a hundred questions, the true answer in no particular place."""

from collections import Counter
from pathlib import Path

import pytest
from helm_support import build_card, build_suite, run_suite

from flexeval.benchmark.resources import import_tasks


@pytest.fixture(scope="module")
def instances():
    task = next(module for module in import_tasks() if module.__name__.endswith(".truthfulqa_packaged"))
    return task.TruthfulQAPackagedScenario().get_instances("")


def test_there_are_a_hundred_questions(instances):
    assert Counter(instance.split for instance in instances) == {"train": 5, "valid": 95}
    assert len({instance.input.text for instance in instances}) == 100
    assert all(len(instance.references) >= 2 for instance in instances)
    assert all(sum(reference.is_correct for reference in instance.references) == 1 for instance in instances)


def test_the_true_answer_is_in_no_particular_place(instances):
    places = Counter([r.is_correct for r in instance.references].index(True) for instance in instances)
    assert places[0] < 45 and len(places) >= 5


def test_it_is_asked_as_helm_asks(tmp_path: Path):
    requests, _, scored = run_suite(build_suite("truthfulqa_packaged:model=text"), tmp_path, build_card())
    (info,) = scored.tasks
    assert (info.name, info.metric, info.split) == ("truthfulqa_packaged", "exact_match", "valid")
    assert "Apache-2.0" in info.source
    assert all(request.prompt.startswith("Question: ") and request.prompt.endswith("\nAnswer:") for request in requests)
    assert all(request.prompt.count("Question: ") == 6 and request.max_tokens == 1 for request in requests)
