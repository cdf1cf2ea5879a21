"""Prepared here, executed there, scored here: the same as a run in one place."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_bench_bare import ABSENT, run_bare
from test_pipeline import ENTRIES, Silence
from tiny_directory import write_tiny_model

from flexeval import remote
from flexeval.asked import RunOptions
from flexeval.errors import FlexevalError, ResultsError
from flexeval.outcomes import DETERMINISTIC_NOTE
from flexeval.pipeline import run_suite
from flexeval.portable import read_answers, read_prompts, write_prompts
from flexeval.request import Request
from flexeval.results import RunResults

ENGINE = {"dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "small.conf"
    entries = "\n".join(f'{{description: "{entry}", priority: 1}}' for entry in ENTRIES)
    path.write_text(f"entries: [{entries}]\n")
    return path


@pytest.fixture(scope="module")
def prompts(model: Path, suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared where the model has no weights."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.parquet"
    bare = path.parent / model.name
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert len(list(model.glob("*.safetensors"))) == 1
    done = remote.prepare(
        str(suite), str(bare), path, max_eval_instances=4, skip_missing=False, chat_template=None, progress=Silence()
    )
    assert done.num_requests == len(read_prompts(path).requests) > 4
    return path


def execute(prompts: Path, model: Path, setting: str, out: Path, **options: Any) -> Path:
    given = {"keep_top": 4, "fresh": False, "engine_options": ENGINE, "progress": Silence()} | options
    remote.execute(prompts, str(model), setting, out, **given)
    return out


@pytest.fixture(scope="module")
def answers(prompts: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("answers")
    return [execute(prompts, model, setting, folder / f"{setting}.parquet") for setting in ("none", "w4-g32")]


def score(prompts: Path, answers: list[Path], out: Path) -> RunResults:
    return remote.score(prompts, answers, out, command="flexeval score", progress=Silence()).results


def timeless(results: RunResults) -> dict[str, Any]:
    """What does not depend on the clock, or on where the model lay."""
    found = json.loads(json.dumps(dataclasses.asdict(results)))
    for name in ("created", "command", "model", "name", "machine", "versions"):
        del found[name]
    for setting in found["settings"]:
        for name in ("elapsed_s", "load_s", "lanes", "peak_bytes", "policy"):  # which follows measured rates
            del setting[name]
    for instance in found["instances"]:
        del instance["elapsed_s"]
    return found


def test_three_steps_give_what_a_run_gives(
    prompts: Path, answers: list[Path], model: Path, suite: Path, tmp_path: Path
) -> None:
    apart = score(prompts, answers, tmp_path / "apart")
    options = RunOptions(
        suite=str(suite),
        model=str(model),
        settings=("none", "w4-g32"),
        out=tmp_path / "whole",
        max_eval_instances=4,
        keep_top=4,
        **ENGINE,
    )
    whole = run_suite(options, Silence()).results
    assert timeless(apart) == timeless(whole)
    assert apart.fidelity and (tmp_path / "apart/index.html").is_file()
    stats = [
        sorted(p.relative_to(tmp_path / side) for p in (tmp_path / side).rglob("*.json")) for side in ("apart", "whole")
    ]
    assert [*stats[0], Path("run.json"), Path("status.json")] == stats[1], (
        "HELM's run directories too; what can be resumed was executed elsewhere"
    )


def test_a_report_says_what_was_computed_apart(prompts: Path, answers: list[Path], model: Path, tmp_path: Path) -> None:
    options = ENGINE | {"deterministic": True}
    apart = execute(prompts, model, "none", tmp_path / "apart.parquet", engine_options=options)
    assert score(prompts, [apart], tmp_path / "all").notes == [DETERMINISTIC_NOTE]
    assert score(prompts, [apart, answers[1]], tmp_path / "one").notes == [f"Under none alone: {DETERMINISTIC_NOTE}"]


def test_what_is_answered_is_not_asked_again(prompts: Path, answers: list[Path], model: Path, tmp_path: Path) -> None:
    out = execute(prompts, model, "none", tmp_path / "again.parquet")
    progress = Silence()
    execute(prompts, model, "none", out, progress=progress)
    assert any("were answered by an earlier run" in said for said in progress.said)
    again, first = read_answers(out), read_answers(answers[0])
    assert again.completions == {
        key: dataclasses.replace(answer, elapsed_s=again.completions[key].elapsed_s)
        for key, answer in first.completions.items()
    }


def test_files_that_do_not_belong_together_are_refused(
    prompts: Path, answers: list[Path], model: Path, tmp_path: Path
) -> None:
    found = read_prompts(prompts)
    fewer = tmp_path / "fewer.parquet"
    write_prompts(fewer, found.info, found.requests[:3])
    for given, what in (
        ((fewer, answers), "these answers are not to the prompts"),
        ((prompts, [answers[0], answers[0]]), "two files hold answers under 'none'"),
        ((prompts, [prompts]), "not a file of answers"),
    ):
        with pytest.raises(ResultsError, match=what):
            score(*given, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    other = write_tiny_model(tmp_path / "other", seed=1)
    foreign = execute(prompts, other, "w8-g32", tmp_path / "foreign.parquet")
    with pytest.raises(ResultsError, match=r"answered by another model than .*none\.parquet"):
        score(prompts, [answers[0], foreign], tmp_path / "out")


def test_prompts_that_the_suite_no_longer_asks_are_refused(prompts: Path, model: Path, tmp_path: Path) -> None:
    found = read_prompts(prompts)
    changed = tmp_path / "changed.parquet"
    write_prompts(changed, found.info, [*found.requests[:-1], Request(prompt="Something else")])
    answered = execute(changed, model, "none", tmp_path / "answers.parquet")
    with pytest.raises(ResultsError, match="the suite no longer asks what the prompts ask"):
        score(changed, [answered], tmp_path / "out")


def test_another_tokenizer_is_refused(prompts: Path, model: Path, tmp_path: Path) -> None:
    found = read_prompts(prompts)
    other = tmp_path / "other.parquet"
    write_prompts(other, dataclasses.replace(found.info, vocabulary=1), found.requests)
    with pytest.raises(FlexevalError, match="cut to length with the tokenizer of"):
        execute(other, model, "none", tmp_path / "out.parquet")


def test_a_bare_machine_executes(prompts: Path, answers: list[Path], model: Path, tmp_path: Path) -> None:
    """No HELM, no datasets, no pandas; torch, transformers and what writes Parquet."""
    out = tmp_path / "answers.parquet"
    done = run_bare(
        tmp_path,
        ABSENT,
        "flexeval",
        "execute",
        prompts,
        "--model",
        model,
        "--dtype",
        "float32",
        "--keep-top",
        4,
        "-o",
        out,
    )
    assert done.returncode == 0, done.stderr
    assert "answers in" in done.stdout
    assert {key: answer.text for key, answer in read_answers(out).completions.items()} == {
        key: answer.text for key, answer in read_answers(answers[0]).completions.items()
    }
