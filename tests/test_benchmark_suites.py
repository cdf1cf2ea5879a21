"""Suites: the shipped ones, a user's own, and what is said of a wrong file."""

from pathlib import Path

import pytest

from flexeval.benchmark.suites import load_suite, suite_names
from flexeval.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "num_entries", "num_mmlu"),
    [("helm-lite", 28, 5), ("helm-lite-full", 108, 57), ("helm-lite-instruct", 28, 5)],
)
def test_helm_lite_has_the_entries_of_its_release(name: str, num_entries: int, num_mmlu: int) -> None:
    suite = load_suite(name)
    assert len(suite.entries) == num_entries
    assert sum(entry.startswith("mmlu:") for entry in suite.entries) == num_mmlu
    assert (suite.max_eval_instances, suite.num_train_trials, suite.packaged_data) == (1000, 1, ())


def test_helm_lite_is_part_of_the_full_suite() -> None:
    assert set(load_suite("helm-lite").entries) < set(load_suite("helm-lite-full").entries)


def test_demo_needs_no_download_of_helms() -> None:
    suite = load_suite("demo")
    assert suite.packaged_data == ("mmlu",)
    scenarios = {entry.partition(":")[0] for entry in suite.entries}
    assert scenarios == {"mmlu", "hellaswag_packaged", "gsm8k_packaged", "dyck_language", "synthetic_reasoning"}


def test_an_unknown_suite_lists_those_that_exist() -> None:
    with pytest.raises(
        ConfigError,
        match=r"'helm-light'.*demo, helm-classic, helm-lite, helm-lite-full, helm-lite-instruct, perplexity",
    ):
        load_suite("helm-light")


def test_the_working_directory_adds_suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run_specs"
    folder.mkdir()
    text = 'entries: [{description: "gsm:model=text", priority: 3, groups: [mine]}]\nmax_eval_instances: 5'
    (folder / "mine.conf").write_text(text)
    (folder / "demo.conf").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert {"mine", "demo"} <= set(suite_names())
    mine = load_suite("mine")
    assert (mine.name, mine.entries, mine.max_eval_instances) == ("mine", ("gsm:model=text",), 5)
    assert mine.groups == {"gsm:model=text": ("mine",)}
    assert load_suite("demo").entries != mine.entries, "the project's own suite comes first"
    assert load_suite("run_specs/demo.conf").entries == mine.entries, "a path is taken as it is"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("entries: [", "not a suite file"),
        ("entries: " + "[" * 2000, "not a suite file"),
        ('include url("http://a b")', "not a suite file"),
        ("max_eval_instances: 3", "needs a list called entries"),
        ("entries: []", "has no entries"),
        ("entries: [{priority: 1}]", "has no description"),
        ('entries: [{description: "gsm", priority: 1, instances: 5}]', "unknown key 'instances' in an entry"),
        ('entries: [{description: "gsm"}, {description: "gsm"}]', "'gsm' stands there twice"),
        ('entries: [{description: "gsm"}]\nmax_instances: 5', "unknown key 'max_instances'"),
        ('entries: [{description: "gsm"}]\nchat_template: maybe', "chat_template='maybe' is neither true nor false"),
        ('entries: [{description: "gsm"}]\npackaged_data: [gsm]', "no packaged data for 'gsm'.*There are: mmlu"),
        ('entries: [{description: "gsm"}]\npackaged_data: mmlu', 'packaged_data="mmlu" is no list of names'),
        (
            'entries: [{description: "gsm"}]\npackaged_data: [[mmlu]]',
            r'packaged_data=\[\["mmlu"\]\] is no list of names',
        ),
        ('entries: [{description: "gsm", groups: mine}]', 'groups="mine" is no list of names'),
        ('entries: [{description: "gsm", groups: 5}]', "groups=5 is no list of names"),
        ('entries: [{description: "gsm"}]\ndescription: 5', "description=5 is no text"),
        ('entries: [{description: "gsm"}]\nmax_eval_instances: true', "max_eval_instances=True is not a positive"),
        ('entries: [{description: "gsm"}]\nmax_eval_instances: 0', "max_eval_instances=0 is not a positive number"),
        ('entries: [{description: "gsm"}]\nnum_train_trials: many', "num_train_trials='many' is not a positive number"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.conf"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_suite(str(path))
    assert caught.value.where == str(path)
    assert caught.value.mend


def test_a_file_may_include_another_beside_it(tmp_path: Path) -> None:
    (tmp_path / "limits.conf").write_text("max_eval_instances: 7")
    (tmp_path / "mine.conf").write_text('include "limits.conf"\nentries: [{description: "gsm"}]')
    assert load_suite(str(tmp_path / "mine.conf")).max_eval_instances == 7
