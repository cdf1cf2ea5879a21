"""A run from options to report, on a tiny model and tasks that HELM makes up: whole, stopped, resumed, extended."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.scenarios import simple_scenarios
from rich.console import Console
from tiny_directory import write_tiny_model

import flexeval
from flexeval.asked import RunOptions, recall
from flexeval.backends.native import Engine
from flexeval.benchmark.helm import metrics
from flexeval.benchmark.helm.metrics import Metrics
from flexeval.cli.evaluate import show
from flexeval.distributions import contexts_after
from flexeval.engine import executor
from flexeval.engine.compute.readout import Readout
from flexeval.errors import CapacityError, ConfigError, DataError, DiskError, FlexevalError, ResultsError
from flexeval.output import output_directory
from flexeval.parquet import load
from flexeval.pipeline import run_suite
from flexeval.planning.rows import RowPlan
from flexeval.progress import Update, View
from flexeval.results import RunResults
from flexeval.status import RunStatus, State

ENTRIES = ("simple_classification:model=text", "simple_mcqa:model=text")


class Silence:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def activity(self, label: str) -> Iterator[Update]:
        yield lambda num_done, num_steps: None

    @contextmanager
    def watch(self, view: View) -> Iterator[None]:
        yield
        self.last = view.read()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def options(model: Path, tmp_path: Path) -> RunOptions:
    suite = tmp_path / "small.conf"
    entries = "\n".join(f'{{description: "{entry}", priority: 1}}' for entry in ENTRIES)
    suite.write_text(f"entries: [{entries}]\nmax_eval_instances: 4\n")
    policy = "row_tokens=256,sweep_tokens=512,group_sequences=2,num_groups=1"
    return RunOptions(suite=str(suite), model=str(model), out=tmp_path / "out", dtype="float32", policy=policy)


def run(options: RunOptions) -> RunResults:
    return run_suite(options, Silence()).results


def scores(results: RunResults) -> dict[tuple[str, str, str], tuple[float, str]]:
    return {(i.task, i.setting, i.instance_id): (i.score, i.output) for i in results.instances}


def refuse_to_generate(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the engine was asked")


def test_a_run_is_whole(options: RunOptions) -> None:
    results = run(dataclasses.replace(options, settings=("none", "w4-g32")))
    assert options.out is not None
    assert flexeval.load_results(options.out).results == results
    assert re.fullmatch("[0-9a-f]{64}", results.fingerprint)
    assert [setting.setting for setting in results.settings] == ["none", "w4-g32"]
    assert len(results.tasks) == 2 and len(results.instances) == 2 * 8
    by_setting = [{k[::2] for k in scores(results) if k[1] == s} for s in ("none", "w4-g32")]
    assert by_setting[0] == by_setting[1]
    for setting in results.settings:
        own = [instance for instance in results.instances if instance.setting == setting.setting]
        assert sum(instance.elapsed_s for instance in own) == pytest.approx(setting.elapsed_s)
        assert setting.num_generated_tokens == sum(instance.num_generated_tokens for instance in own) > 0
        assert 0 < setting.num_computed_prompt_tokens < setting.num_prompt_tokens
        assert setting.peak_bytes["cpu"] > 0
    assert len(list((options.out / "helm" / "runs" / "small").glob("*/stats.json"))) == 4


def test_a_run_compares_what_settings_hold_probable(options: RunOptions) -> None:
    assert options.out is not None
    results = run(dataclasses.replace(options, settings=("none", "w4-g32"), keep_top=4))
    assert [one.task for one in results.fidelity] == ["", *(task.name for task in results.tasks)]
    overall = results.fidelity[0]
    assert (overall.setting, overall.baseline, overall.num_top) == ("w4-g32", "none", 4)
    assert overall.num_positions >= 8, "the first token of each answer follows the same tokens"
    assert 0 < overall.kl < 1 and overall.num_text == 0
    rows = load(options.out / "distributions" / "none.parquet")
    asked = {request for one in results.instances for request in one.requests}
    assert {f"{request:016x}" for request in rows["request"].tolist()} == asked
    assert rows["is_drawn"].sum() == len(rows) > 8
    again = run(dataclasses.replace(options, settings=("none", "w4-g32"), keep_top=4))
    assert again.fidelity == results.fidelity, "from the journal"


def test_a_run_may_keep_answers_alone(options: RunOptions) -> None:
    assert options.out is not None
    answers_alone = dataclasses.replace(options, settings=("none", "w4-g32"), keep_top=0)
    assert run(answers_alone).fidelity == []
    assert not (options.out / "distributions").exists()
    assert run(dataclasses.replace(answers_alone, keep_top=2)).fidelity != []
    assert run(answers_alone).fidelity == [], "those of an earlier run do not count"


def test_a_run_of_fewer_questions_keeps_what_they_share_with_the_others(options: RunOptions, tmp_path: Path) -> None:
    assert options.out is not None
    suite = tmp_path / "scored.conf"
    entry = "perplexity:model=text,window_bytes=60,path=" + str(tmp_path / "text.txt")
    (tmp_path / "text.txt").write_text("A B C D E F G H I J K L M N O P Q R S T U V W X Y Z " * 20)
    suite.write_text(f'entries: [{{description: "{entry}", priority: 1}}]\n')
    options = dataclasses.replace(options, suite=str(suite), keep_top=4)
    run(options)
    every = load(options.out / "distributions" / "none.parquet")
    fewer = run(dataclasses.replace(options, max_eval_instances=2))
    rows = load(options.out / "distributions" / "none.parquet")
    assert 0 < len(rows) < len(every) and rows["is_text"].all()
    alone = run(dataclasses.replace(options, max_eval_instances=2, out=tmp_path / "alone"))
    assert scores(alone) == scores(fewer)
    fresh = load(tmp_path / "alone" / "distributions" / "none.parquet")
    assert sorted(contexts_after(fresh).tolist()) == sorted(contexts_after(rows).tolist())


def test_a_run_says_what_its_plan_saves(options: RunOptions) -> None:
    progress = Silence()
    (setting,) = run_suite(options, progress).results.settings
    (line,) = [text for text in progress.said if "prompt tokens asked" in text]
    assert line.startswith(f"none: {setting.num_prompt_tokens:,} prompt tokens asked")
    assert any(text.endswith("nothing needs to be offloaded") for text in progress.said)
    assert f"{setting.num_computed_prompt_tokens:,} computed" in line


def test_a_run_says_how_far_it_is(options: RunOptions) -> None:
    progress = Silence()
    (setting,) = run_suite(options, progress).results.settings
    last = progress.last
    assert last.num_done == last.num_requests == setting.num_requests and last.left_s == 0
    assert [(task.num_requests, task.num_done) for task in last.tasks] == [(4, 4), (4, 4)]
    assert last.elapsed_s == pytest.approx(setting.elapsed_s)
    assert last.num_planned_sweeps >= last.num_sweeps > 1
    assert last.tokens_per_s is not None and last.planned_tokens_per_s is not None
    num_tokens = last.tokens_per_s * last.elapsed_s
    num_drawn = setting.num_generated_tokens - setting.num_requests  # a prompt draws the first one of each
    assert num_tokens == pytest.approx(setting.num_computed_prompt_tokens + num_drawn)
    assert last.planned_bytes == setting.planned_bytes and last.used_bytes["cpu"] > 0
    assert options.out is not None
    found = RunStatus.load(options.out)
    assert (found.state, found.num_settings_done, found.answering) == (State.DONE, 1, last)


def test_answers_are_not_asked_for_twice(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(options)
    monkeypatch.setattr(Engine, "generate", refuse_to_generate)
    again = run(options)
    assert scores(again) == scores(first)
    assert again.settings[0].num_resumed == again.settings[0].num_requests
    assert again.settings[0].elapsed_s == pytest.approx(first.settings[0].elapsed_s)
    with pytest.raises(AssertionError, match="was asked"):
        run(dataclasses.replace(options, fresh=True))


def test_a_run_that_is_stopped_goes_on(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    assert options.out is not None
    expected = scores(run(options))
    stopped = dataclasses.replace(options, out=options.out.with_name("stopped"))
    generate = Engine.generate

    def stop_soon(self: Engine, requests: Any, *, on_completions: Any) -> Any:
        def stop(answers: Any) -> None:
            on_completions(answers)
            raise KeyboardInterrupt

        return generate(self, requests, on_completions=stop)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generate", stop_soon)
        with pytest.raises(KeyboardInterrupt):
            run(stopped)
    recalled, folder = recall(stopped.out)
    assert (recalled, folder) == (dataclasses.replace(stopped, out=stopped.out.absolute()), Path.cwd())
    results = run(recalled)
    assert scores(results) == expected
    (setting,) = results.settings
    assert 0 < setting.num_resumed < setting.num_requests
    (journal,) = (stopped.out / "journal").iterdir()
    usages = [entry["usage"] for line in journal.read_text().splitlines() if "usage" in (entry := json.loads(line))]
    assert len(usages) == 2, "of the run that was stopped, too"
    assert sum(usage["num_generated_tokens"] for usage in usages) == setting.num_generated_tokens


@pytest.mark.parametrize(
    "text", [None, "", "[]", '{"options": 3}', '{"options": {"suite": 1}}', '{"options": {"suite": "demo", "evil": 1}}']
)
def test_what_was_asked_cannot_always_be_told(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(ResultsError, match=r"cannot tell what was asked here.*run\.json.*call `flexeval run` again"):
        recall(tmp_path)


def test_a_setting_added_later_reuses_the_first(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(options)
    asked: list[str] = []
    generate = Engine.generate

    def listen(self: Engine, *args: Any, **kwargs: Any) -> Any:
        asked.append(self._opened.setting.name)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "generate", listen)
    both = run(dataclasses.replace(options, settings=("none", "w4-g32")))
    assert asked == ["w4-g32"]
    assert {key: value for key, value in scores(both).items() if key[1] == "none"} == scores(first)


def test_requests_that_fail_are_counted_and_their_questions_not_scored(
    options: RunOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither right nor wrong; said in the report and at the end. The next run asks them again, and them alone."""
    whole = scores(run(dataclasses.replace(options, out=Path(options.suite).parent / "whole")))
    read = executor.read_row

    def read_with_nan(plan: RowPlan, *args: Any, **kwargs: Any) -> Readout:
        readout = read(plan, *args, **kwargs)
        for index, (_, request) in enumerate(plan.generators):
            if request == 2:
                readout.drawn.logprobs_N[index] = np.nan
        return readout

    with monkeypatch.context() as patches:
        patches.setattr(executor, "read_row", read_with_nan)
        done = run_suite(options, Silence())
    found = scores(done.results)
    assert len(whole.keys() - found.keys()) == done.results.settings[0].num_failed == 1
    assert all(whole[key] == value for key, value in found.items()), "none is counted as wrong"
    (note,) = done.results.notes
    assert note.startswith("none: 1 of") and "the model's logits are not finite: the head makes" in note
    assert "are not scored" in (done.page.parent / "report.md").read_text()
    with pytest.raises(ResultsError, match=r"1 of .* requests failed"):
        show(done, Console())
    assert "Report:" in capsys.readouterr().out, "all is printed before"
    again = run(options)
    assert scores(again) == whole and again.notes == []
    assert again.settings[0].num_resumed == again.settings[0].num_requests - 1


def test_a_dataset_without_questions_is_named(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simple_scenarios.SimpleMCQAScenario, "get_instances", lambda self, output_path: [])
    with pytest.raises(DataError, match=r"simple_mcqa.*they hold no questions"):
        run(options)


def test_a_clock_that_goes_backwards_changes_nothing(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(2_000_000_000, -3600)
    monkeypatch.setattr("time.time", lambda: float(next(now)))
    results = run(options)
    assert len(scores(results)) == 8
    assert all(setting.elapsed_s > 0 and setting.load_s > 0 for setting in results.settings)
    assert all(one.elapsed_s >= 0 for one in results.instances)


def test_what_was_answered_survives_an_error(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    assert options.out is not None
    run(options)
    monkeypatch.setattr("flexeval.pipeline.write_report", refuse_to_generate)
    with pytest.raises(AssertionError):
        run(dataclasses.replace(options, settings=("none", "w4-g32")))
    assert len(list((options.out / "journal").glob("*.jsonl"))) == 2


def test_answers_are_thrown_away_only_when_others_can_follow(options: RunOptions) -> None:
    assert options.out is not None
    run(options)
    (journal,) = (options.out / "journal").iterdir()
    whole = journal.read_bytes()
    for change in ({"device": "tpu"}, {"model": "./nothing"}, {"dtype": "float8"}, {"suite": "nothing"}):
        with pytest.raises(FlexevalError):
            run(dataclasses.replace(options, fresh=True, **change))
    assert journal.read_bytes() == whole


def test_options_are_read_before_a_model_is_fetched(options: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexeval.pipeline.resolve", refuse_to_generate)
    for change in ({"device": "tpu"}, {"dtype": "x"}, {"policy": "x"}, {"cpu_memory": "x"}, {"settings": ("w9",)}):
        with pytest.raises(ConfigError):
            run(dataclasses.replace(options, **change))


def test_nothing_is_left_behind_beside_other_peoples_files(options: RunOptions, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    before = set(tmp_path.rglob("*"))
    for place in ("mine/new/deep", "mine"):
        with pytest.raises(CapacityError):
            run(dataclasses.replace(options, out=tmp_path / place, cpu_memory="10KB"))
    left = {path.relative_to(tmp_path).parts[:2] for path in set(tmp_path.rglob("*")) - before}
    assert left <= {("mine", "helm"), ("mine", "journal")}, "a directory that was there keeps HELM's log"
    with pytest.raises(ConfigError, match="--out"):
        run(dataclasses.replace(options, out=Path(options.suite) / "below-a-file"))


def test_two_runs_in_one_directory_do_not_mix(options: RunOptions) -> None:
    run(options)
    assert options.out is not None
    before = {path: path.read_bytes() for path in options.out.rglob("*") if path.is_file()}
    with output_directory(options.out, kept="*"), pytest.raises(ConfigError, match="another run writes here"):
        run(dataclasses.replace(options, fresh=True, settings=("w4-g32",)))
    assert before == {path: path.read_bytes() for path in options.out.rglob("*") if path.is_file()}


def test_a_disk_that_fails_in_the_middle_is_named_and_costs_no_answer(
    options: RunOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    on_disk = dataclasses.replace(options, disk=str(disk), policy=f"cpu-weights=0,disk-weights=1,{options.policy}")
    generate = Engine.generate

    def lose_the_disk(self: Engine, requests: Any, *, on_completions: Any) -> Any:
        def keep(answers: Any) -> None:
            on_completions(answers)
            shutil.rmtree(disk)

        return generate(self, requests, on_completions=keep)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generate", lose_the_disk)
        with pytest.raises(DiskError, match=f"No such file or directory.*{disk}.*--disk"):
            run(on_disk)
    (setting,) = run(on_disk).settings
    assert 0 < setting.num_resumed < setting.num_requests


def test_a_chat_template_is_applied_where_there_is_one(options: RunOptions, model: Path, tmp_path: Path) -> None:
    """A suite may ask for it; the command line insists on it, or on doing without."""
    with pytest.raises(ConfigError, match=r"has no chat template .*--chat-template"):
        run(dataclasses.replace(options, chat_template=True))
    suite = Path(options.suite)
    suite.write_text(suite.read_text() + "chat_template: true\n")
    assert "chat template" not in run(options).model_note
    chatty = tmp_path / "chatty"
    shutil.copytree(model, chatty)
    (chatty / "chat_template.jinja").write_text("{% for m in messages %}user {{ m.content }}{% endfor %} bot")
    plain, asked = (
        run(dataclasses.replace(options, model=str(chatty), chat_template=wanted, fresh=True, out=tmp_path / name))
        for wanted, name in ((False, "plain"), (None, "asked"))
    )
    assert "prompts in the model's chat template" in asked.model_note
    assert "chat template" not in plain.model_note
    tokens = [sum(setting.num_prompt_tokens for setting in results.settings) for results in (plain, asked)]
    assert tokens[0] < tokens[1]
    tags = [(tmp_path / name / "helm/prod_env/model_metadata.yaml").read_text() for name in ("plain", "asked")]
    assert ["INSTRUCTION_FOLLOWING_MODEL_TAG" in text for text in tags] == [False, True]


def test_a_task_that_cannot_be_scored_costs_itself_alone(
    options: RunOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under one setting, and then it is not compared; everything else is in the report, and said before the error."""
    make = metrics.create_metric

    def fail_under_w4(self: Metrics, spec: RunSpec, state: ScenarioState) -> Any:
        is_made_to_fail = spec.name.startswith("simple_mcqa") and "w4" in spec.name
        monkeypatch.setattr(metrics, "create_metric", (lambda spec: 1 / 0) if is_made_to_fail else make)
        return evaluate(self, spec, state)

    evaluate = Metrics.evaluate
    monkeypatch.setattr(Metrics, "evaluate", fail_under_w4)
    done = run_suite(dataclasses.replace(options, settings=("none", "w4-g32")), Silence())
    assert done.failed.keys() == {"simple_mcqa"} == done.results.skipped.keys()
    assert {one.task for one in done.results.instances} == {"simple_classification"}
    assert {one.setting for one in done.results.instances} == {"none", "w4-g32"}
    assert "ZeroDivisionError" in done.page.read_text()
    with pytest.raises(ResultsError, match=r"^1 task.* simple_mcqa: HELM's Basic\w+ failed: ZeroDivisionError"):
        show(done, Console())
    assert str(done.page) in capsys.readouterr().out
    monkeypatch.setattr(Metrics, "evaluate", evaluate)
    monkeypatch.setattr(metrics, "create_metric", make)
    monkeypatch.setattr(Engine, "generate", refuse_to_generate)
    assert len(run(dataclasses.replace(options, settings=("none", "w4-g32"))).instances) == 2 * 8, "nothing was lost"
