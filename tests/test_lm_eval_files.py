"""Task files of lm-evaluation-harness: read without running anything; what is not done is refused by name."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from helm_support import build_card, run_suite
from lm_eval_tasks import TASKS, write_tasks

from flexeval.benchmark.lm_eval.files import find_tasks, load, read_reference
from flexeval.benchmark.lm_eval.parsing import read_task
from flexeval.benchmark.lm_eval.questions import build_questions
from flexeval.benchmark.lm_eval.render import render
from flexeval.benchmark.lm_eval.rows import Rows
from flexeval.benchmark.lm_eval.scoring import Filter, MatchOptions, best_choices
from flexeval.benchmark.suites import load_suite
from flexeval.errors import ConfigError, DataError, RequestError

NAMES = sorted(name for name in TASKS if name != "_base")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


def changed(tmp_path: Path, **changes: Any) -> Path:
    return write_tasks(tmp_path / "tasks", changes)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return Rows(read_task(write_tasks(tmp_path_factory.mktemp("shared") / "tasks"), "capitals"))


def test_a_suite_is_named_on_the_command_line(folder: Path) -> None:
    suite = load_suite(f"lm-eval:{folder},task=written+capitals,num_fewshot=1,limit=3")
    assert suite.name == "lm-eval-tasks"
    assert suite.entries == tuple(
        f"lm_eval:model=text,path={folder},task={task},num_fewshot=1,limit=3" for task in ("written", "capitals")
    )
    assert read_reference(f"lm-eval:{folder}").tasks == tuple(NAMES)
    assert read_reference(f"lm-eval:{folder}/several.yaml").tasks == ("several",)


def test_it_runs_to_helms_results(folder: Path, tmp_path: Path) -> None:
    suite = load_suite(f"lm-eval:{folder},task=capitals+written,limit=4")
    requests, _, scored = run_suite(suite, tmp_path / "out", build_card())
    assert [(task.name, task.metric) for task in scored.tasks] == [
        ("lm_eval: capitals, limit=4", "acc"),
        ("lm_eval: written, limit=4", "exact_match,letters"),
    ]
    assert len(scored.instances) == 8 and len(requests) == 4 * 3 + 4
    assert str(folder) in scored.tasks[0].source


def test_num_fewshot_is_over_the_tasks(folder: Path) -> None:
    assert [read_task(folder, "capitals", num_fewshot=num).num_fewshot for num in (None, 0, 3)] == [2, 0, 3]


def test_a_task_that_fixes_zero_examples_keeps_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_fewshot: 0, which"):
        read_task(changed(tmp_path, num_fewshot=0), "capitals", num_fewshot=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{folder},fewshot=3", "'fewshot=3' cannot be read"),
        ("{folder},num_fewshot=-1", "'num_fewshot=-1' cannot be read"),
        ("{folder},limit=0", "'limit=0' cannot be read"),
        ("{folder},limit=0.5", "'limit=0.5' cannot be read"),
        ("{folder},task=rivers", "no task 'rivers'.*capitals, coded, firsts"),
        ("{folder}/nowhere", "no folder or file"),
        ("", "no folder or file"),
    ],
)
def test_a_wrong_suite_is_refused(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_reference("lm-eval:" + text.format(folder=folder))
    assert "\n" not in str(caught.value)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"output_type": "loglikelihood"}, "output_type: loglikelihood is not supported"),
    ({"doc_to_image": "image"}, "the key 'doc_to_image' is not supported"),
    ({"process_results": "x"}, "the key 'process_results' is not supported"),
    ({"use_prompt": "promptsource:x"}, "'use_prompt' is not supported"),
    ({"unsafe_code": True}, "unsafe_code"),
    ({"repeats": 4}, "repeats: 4"),
    ({"num_fewshot": "five"}, "num_fewshot: 'five' is not int"),
    ({"num_fewshot": True}, "num_fewshot: True is not int"),
    ({"num_fewshot": -1}, "negative"),
    ({"doc_to_text": 3}, "several inputs"),
    ({"doc_to_text": None}, "doc_to_text is missing"),
    ({"doc_to_target": None}, "doc_to_target is missing"),
    ({"doc_to_choice": None}, "needs doc_to_choice"),
    ({"test_split": None, "include": None, "dataset_path": "json"}, "neither test_split nor validation_split"),
    ({"metric_list": []}, "metric_list is empty"),
    ({"metric_list": [{"metric": "brier_score"}]}, "'brier_score' is not supported here, only acc, acc_norm"),
    ({"metric_list": [{"metric": "acc", "aggregation": "median"}]}, "aggregation: median"),
    ({"metric_list": [{"metric": "acc", "higher_is_better": False}]}, "higher_is_better: false"),
    ({"metric_list": [{"metric": "acc", "weight": 2}]}, "'weight' is not supported"),
    ({"fewshot_config": {"sampler": "balanced"}}, "sampler: balanced"),
    ({"fewshot_config": {"fewshot_indices": [1]}}, "'fewshot_indices' is not supported"),
    ({"fewshot_config": {"samples": "all"}}, "samples: 'all' is not list"),
    ({"dataset_kwargs": {"data_dir": "/"}}, "'data_dir' is not supported"),
    ({"output_type": "generate_until", "generation_kwargs": {"do_sample": True}}, "sampled answers"),
    ({"output_type": "generate_until", "generation_kwargs": {"temperature": 0.7}}, "sampled answers"),
    ({"output_type": "generate_until", "generation_kwargs": {"max_gen_toks": 0}}, "max_gen_toks: 0"),
    ({"output_type": "generate_until", "generation_kwargs": {"num_beams": 2}}, "'num_beams' is not supported"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[str(change)[:50] for change, _ in CHANGES])
def test_what_is_not_done_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    change = {"metric_list": None, **change} if "output_type" in change else change
    with pytest.raises(ConfigError, match=message) as caught:
        read_task(changed(tmp_path, **change), "capitals")
    assert "\n" not in str(caught.value) and "capitals" in str(caught.value)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ([{"function": "regex", "regex_pattern": "("}], "'\\(' is no regular expression"),
        ([{"function": "regex", "group_select": 2}], "group_select: 2"),
        ([{"function": "custom", "filter_fn": "x"}], "'custom' is not supported here"),
        ([{"function": "regex", "flags": 2}], "'flags' is not supported"),
        (["lowercase"], "'' is not supported here"),
    ],
)
def test_filters_are_checked(tmp_path: Path, filters: list[Any], message: str) -> None:
    pipeline = {"name": "mine", "filter": [*filters, {"function": "take_first"}]}
    folder = changed(tmp_path, output_type="generate_until", metric_list=None, filter_list=[pipeline])
    with pytest.raises(ConfigError, match=message):
        read_task(folder, "capitals")


def test_python_is_not_run(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    (folder / "utils.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\n")
    for line in ("process_docs: !function utils.clean", "metric_list: [{metric: !function utils.clean}]"):
        (folder / "mine.yaml").write_text(f"include: capitals.yaml\ntask: mine\n{line}\n")
        find_tasks.cache_clear()
        with pytest.raises(ConfigError, match=r"!function utils\.clean is Python"):
            read_task(folder, "mine")
    assert not (tmp_path / "harm").exists()


def test_python_is_run_where_the_user_lets_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="or set FLEXEVAL_ALLOW_TASK_CODE=1 if you trust"):
        read_task(folder, "coded")
    monkeypatch.setenv("FLEXEVAL_ALLOW_TASK_CODE", "1")
    task = read_task(folder, "coded", num_fewshot=0)
    first = build_questions(task, Rows(task))[0]
    assert first.context == "Q: What is the capital of Kenya?\nA:" and all(text.isupper() for text in first.choices)
    for line, message in (
        ("process_results: !function utils.text", "process_results: !function utils.text is Python, which is not run"),
        ("doc_to_text: !function utils.nothing", "no function utils.nothing"),
        ("doc_to_text: !function other.text", "there is no .*other.py"),
        ("doc_to_text: !function broken.text", "cannot import .*NameError.*broken.py"),
    ):
        (folder / "broken.py").write_text("nonsense\n")
        (folder / "mine.yaml").write_text(f"include: coded.yaml\ntask: mine\n{line}\n")
        find_tasks.cache_clear()
        with pytest.raises(ConfigError, match=message):
            read_task(folder, "mine")
    (folder / "broken.py").write_text("def text(row):\n    return row['nothing']\n")
    task = read_task(folder, "mine")
    with pytest.raises(ConfigError, match=r"broken\.text fails: KeyError: 'nothing'"):
        build_questions(task, Rows(task))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: x\na: !!python/object/apply:os.system [ls]", "not YAML"),
        ("task: [x", "not YAML"),
        ("- x", "a mapping of names"),
        ("3: x", "a mapping of names"),
        ("\0", "not YAML"),
        ("[" * 5000, "not YAML"),
        (
            "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)),
            "more than 100000 values",
        ),
        ("task: x\ny: " + "z" * (1 << 20), "larger than"),
        ("task: 'a,b'", "cannot be a task's name"),
        ("task: capitals", "two tasks are called 'capitals'"),
    ],
    ids=["object", "broken", "list", "number", "null", "nested", "laughs", "large", "comma", "twice"],
)
def test_a_bad_file_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "zz.yaml").write_text(text)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=message) as caught:
        find_tasks(folder)
    assert "zz.yaml" in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - started < 60


def test_includes_stay_in_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.yaml").write_text("description: secret\n")
    (folder / "link.yaml").symlink_to(tmp_path / "secret.yaml")
    for target in ("../secret.yaml", str(tmp_path / "secret.yaml"), "link.yaml"):
        (folder / "mine.yaml").write_text(f"include: {target}\ntask: mine\n")
        find_tasks.cache_clear()
        with pytest.raises(ConfigError, match="lies outside the folder"):
            load(folder, "mine")


def test_a_pipe_is_no_task_file(folder: Path) -> None:
    os.mkfifo(folder / "pipe.yaml")
    assert list(find_tasks(folder)) == NAMES
    (folder / "mine.yaml").write_text("include: pipe.yaml\ntask: mine\n")
    find_tasks.cache_clear()
    with pytest.raises(ConfigError, match="cannot read a task file: there is no such file"):
        load(folder, "mine")


def test_includes_end(folder: Path) -> None:
    (folder / "mine.yaml").write_text("include: mine.yaml\ntask: mine\n")
    with pytest.raises(ConfigError, match="without end"):
        load(folder, "mine")
    (folder / "mine.yaml").write_text("include: [_base.yaml, nothing.yaml]\ntask: mine\n")
    with pytest.raises(ConfigError, match="cannot read a task file"):
        load(folder, "mine")


def test_includes_lie_beneath_the_keys_of_their_own(folder: Path) -> None:
    (folder / "more.yaml").write_text("include: _base.yaml\ntest_split: other\ntask_list: [x]\n")
    (folder / "mine.yaml").write_text("include: more.yaml\ntask: mine\nmetadata: null\n")
    keys = load(folder, "mine")
    assert keys["test_split"] == "other" and keys["dataset_path"] == "json" and "task_list" not in keys


@pytest.mark.parametrize(
    "name", ["../outside.jsonl", "{outside}", "*.jsonl", "https://example.com/x.jsonl", "no.jsonl", 3]
)
def test_data_files_lie_in_the_folder(tmp_path: Path, name: Any) -> None:
    outside = tmp_path / "outside.jsonl"
    outside.write_text("{}\n")
    name = name.format(outside=outside) if isinstance(name, str) else name
    folder = changed(tmp_path, dataset_kwargs={"data_files": {"test": name}})
    with pytest.raises(DataError if name == "no.jsonl" else ConfigError, match="data"):
        Rows(read_task(folder, "capitals"))


@pytest.mark.parametrize("path", ["pandas", "webdataset", "./tasks", "/etc", "a/b/c", "json"])
def test_other_kinds_of_data_are_refused(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = changed(tmp_path, dataset_path=path, dataset_kwargs={"trust_remote_code": True})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"dataset_path: '?(\w|[./])+'? (is not supported|needs data_files)"):
        Rows(read_task(folder, "capitals"))


def test_a_dataset_of_the_hub_without_a_network_is_missing_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = changed(tmp_path, dataset_path="allenai/ai2_arc", dataset_name="ARC-Easy", dataset_kwargs={})
    with pytest.raises(DataError, match="allenai___ai2_arc/ARC-Easy for lm_eval: capitals"):
        run_suite(load_suite(f"lm-eval:{folder},task=capitals"), tmp_path / "out", build_card())


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no split 'validation'.*train, test"):
        Rows(read_task(changed(tmp_path, test_split="validation"), "capitals")).questions()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doc_to_text": "{{nothing}}"}, "UndefinedError: 'nothing' is undefined"),
        ({"doc_to_text": "{{"}, "TemplateSyntaxError"),
        ({"doc_to_text": "{{country.__class__.__mro__}}"}, "SecurityError"),
        ({"doc_to_text": "{{''.__class__}}{{cycler.__init__.__globals__.os.system('ls')}}"}, "SecurityError"),
        ({"doc_to_text": "{% include '/etc/passwd' %}"}, "TypeError|TemplateNotFound"),
        ({"doc_to_text": "{{'x' * 2000000}}"}, "more than 1048576 characters"),
        ({"doc_to_text": "{{range(10000000)}}"}, "OverflowError"),
        ({"doc_to_text": "{{'\\ud800'}}"}, "half of a surrogate pair"),
        ({"doc_to_text": "letter", "num_fewshot": 0}, "doc_to_text gives the number"),
        ({"doc_to_text": "{{letter}}", "num_fewshot": 0}, "doc_to_text gives the number"),
        (
            {"doc_to_text": "{{letter or 'x'}}", "num_fewshot": 0, "doc_to_target": "city"},
            "another kind than the first",
        ),
        ({"doc_to_text": "both"}, r"doc_to_text gives '\[0, 1\]'"),
        ({"doc_to_text": "99", "doc_to_target": "city"}, "an example is choice 99 of 3"),
        ({"doc_to_choice": "{{country}}"}, "list of texts"),
        ({"doc_to_choice": ["", "x"]}, "list of texts"),
        ({"doc_to_choice": "letter"}, "list of texts"),
        ({"doc_to_target": "both"}, "answer 0 is not a text"),
        ({"num_fewshot": 7}, "num_fewshot=7, but there are 6 rows"),
        ({"gen_prefix": "letter"}, "gen_prefix is"),
        ({"doc_to_text": "", "description": "", "num_fewshot": 0}, "nothing before the choices"),
    ],
)
def test_rows_that_make_no_question_are_refused(
    tmp_path: Path, rows: Rows, change: dict[str, Any], message: str
) -> None:
    task = read_task(changed(tmp_path, **change), "capitals")
    with pytest.raises(ConfigError, match=message) as caught:
        build_questions(task, rows)
    assert "\n" not in str(caught.value)


def test_a_row_that_makes_no_question_is_no_missing_data(tmp_path: Path) -> None:
    folder = changed(tmp_path, doc_to_choice="letter")
    with pytest.raises(ConfigError, match="doc_to_choice does not give a list"):
        run_suite(load_suite(f"lm-eval:{folder},task=capitals"), tmp_path / "out", build_card())


def test_a_template_has_so_much_time_and_memory() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    with pytest.raises(ConfigError, match="takes more than 1 s"):
        render([endless], [{}], where="here", max_seconds=1)
    with pytest.raises(ConfigError, match="too much memory"):
        render(["{{ 'x' * 9999999999 }}"], [{}], where="here", max_seconds=5)
    assert time.monotonic() - started < 60


def test_templates_are_filled_in() -> None:
    assert render(["{{a}}\n", "{{b|regex_replace('x+', 'y')}}"], [{"a": "é", "b": "axxa"}], where="") == [
        ["é\n"],
        ["aya"],
    ]
    with pytest.raises(ConfigError, match="not plain data"):
        render(["{{a}}"], [{"a": {1, 2}}], where="here")


def test_a_regular_expression_has_so_much_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexeval.benchmark.lm_eval.scoring._MAX_SECONDS", 0.1)
    slow = Filter(function="regex", pattern="(a|aa)+$")
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"takes more than 0\.1 s"):
        slow.apply("a" * 60 + "c")
    with pytest.raises(ConfigError, match=r"takes more than 0\.1 s"):
        MatchOptions(regexes_to_ignore=("(a|aa)+$",)).is_match("a" * 60 + "c", "")
    assert time.monotonic() - started < 60, "it would take hours"


def test_a_prompt_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    row = '{"question": "%s", "names": ["x"], "country": "y"}\n' % ("word " * 3000)
    (folder / "test.jsonl").write_text(row)
    with pytest.raises(RequestError, match="1 of 1 prompts are longer than the model's context"):
        run_suite(load_suite(f"lm-eval:{folder},task=several"), tmp_path / "out", build_card())


def test_the_first_of_equal_choices_is_best() -> None:
    assert best_choices([-2.0, -2.0], ["ab", "ab"]) == (0, 0, 0)
    assert best_choices([-3.0, -4.0, -5.0], ["a", "abc", "éééé"]) == (0, 2, 2)
    assert best_choices([-3.0, -4.0], ["éé", "abc"]) == (0, 1, 0)


def test_a_limit_takes_the_first_rows(folder: Path, rows: Rows) -> None:
    task = read_task(folder, "capitals")
    every = build_questions(task, rows, limit=99)
    assert len(every) == 5 and build_questions(task, rows, limit=2) == every[:2]
