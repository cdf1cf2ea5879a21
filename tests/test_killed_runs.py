"""A run that is killed anywhere, again and again, ends with the same results, and asks nothing twice."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked_runs import SECRET, Ended, Nursery, nursery
from tiny_directory import write_tiny_model

from flexeval.portable import PromptsInfo, read_answers, write_prompts
from flexeval.request import Request
from flexeval.results import RunResults
from flexeval.tokenizer import open_tokenizer, vocabulary_of

ENTRIES = ("simple_classification:model=text", "simple_mcqa:model=text")
SIZES = "row_tokens=256,sweep_tokens=256,group_sequences=2,num_groups=1"
ON_DISK = f"cpu-weights=0,disk-weights=1,{SIZES}"
ENGINE = ("flexeval.remote", "flexeval.answering", "transformers.models.llama.modeling_llama")
KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)
Command = Callable[[Path], list[str]]
Find = Callable[[Path], Any]


def prepare(folder: Path) -> None:
    """A model, a suite that asks it, and prompts."""
    write_tiny_model(folder / "model")
    entries = "\n".join(f'{{description: "{entry}", priority: 1}}' for entry in ENTRIES)
    (folder / "small.conf").write_text(f"entries: [{entries}]\nmax_eval_instances: 4\n")
    vocabulary = vocabulary_of(open_tokenizer(folder / "model"))
    info = PromptsInfo(
        suite="small.conf",
        model="model",
        vocabulary=vocabulary,
        context_length=2048,
        max_eval_instances=None,
        skip_missing=False,
        is_chat=False,
    )
    asked = [
        Request(prompt=f"{i} and {i + 1} are " * (1 + i % 4), max_tokens=1 + i % 7, echo=i % 3 == 0) for i in range(30)
    ]
    write_prompts(folder / "prompts.parquet", info, asked)


@pytest.fixture(scope="module")
def executing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    folder = tmp_path_factory.mktemp("executing")
    prepare(folder)
    with nursery(folder, *ENGINE) as found:
        yield found


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    folder = tmp_path_factory.mktemp("running")
    prepare(folder)
    with nursery(folder, *ENGINE, "flexeval.pipeline", "helm.benchmark.runner") as found:
        yield found


def execute(out: Path) -> list[str]:
    """Answers are compared to the bit, and company would show in roundings."""
    options = ["--model", "model", "--dtype", "float32", "--keep-top", "2", "--policy", SIZES]
    return ["execute", "prompts.parquet", "--out", str(out), *options, "--deterministic"]


def answers(out: Path) -> Any:
    found = read_answers(out).completions
    return {key: replace(one, elapsed_s=0.0) for key, one in found.items()}


def run(out: Path) -> list[str]:
    if (out / "run.json").exists() and out.stat().st_ino % 2:
        return ["resume", str(out)]
    options = ["--model", "model", "--dtype", "float32", "--keep-top", "2", "--setting", "none", "--setting", "w4-g32"]
    return ["run", "--suite", "small.conf", "--out", str(out), *options, "--policy", SIZES]


def run_on_disk(out: Path) -> list[str]:
    command = run(out)
    return command if command[0] == "resume" else [*command[:-1], ON_DISK, "--disk", f"{out}-disk"]


def scores(out: Path) -> Any:
    found = RunResults.load(out).instances
    results = {(i.task, i.setting, i.instance_id): (i.score, i.output) for i in found}
    assert len(results) == len(found), "a question was answered twice"
    return results


def journalled(out: Path) -> Counter[str]:
    """How often each request stands in its setting's journal, as whole lines."""
    paths = [*out.glob("journal/*.jsonl"), *out.parent.glob(f".{out.name}.journal/*/*.jsonl")]
    entries = [(path, json.loads(line)) for path in paths for line in path.read_bytes().split(b"\n")[:-1]]
    named = [(path.stem.rpartition("-")[0], entry["key"]) for path, entry in entries if "key" in entry]
    return Counter(f"{setting} {key}" for setting, key in named)


def asked(at: Nursery) -> set[str]:
    """What was asked since the last call, under each setting."""
    lines = at.asked.read_text().splitlines() if at.asked.exists() else []
    at.asked.unlink(missing_ok=True)
    return {name for line in lines for name in json.loads(line)}


def kill(at: Nursery, arguments: list[str], chance: random.Random, within_s: float, largest: int) -> Ended:
    """Kill a run at some time; or within the write that makes a file longer than some length up to `largest`."""
    if largest:
        return at.run(*arguments, file_bytes=chance.randrange(largest // 10, largest))
    started = at.start(*arguments)
    time.sleep(chance.uniform(0, within_s))
    os.kill(started.pid, signal.SIGKILL)
    return started.wait()


def survive(at: Nursery, folder: Path, command: Command, find: Find, *, num_kills: int, seed: int) -> Counter[int]:
    """Kill a run so often, in turns at some time and within a write, and let it end then; how its processes ended."""
    out, whole = folder / "out", folder / "whole"
    start = time.monotonic()
    done = at.run(*command(whole))
    within_s = time.monotonic() - start
    assert done.code == 0, done.log
    expected = journalled(whole)
    assert asked(at) == expected.keys() and set(expected.values()) == {1}
    largest = max(path.stat().st_size for path in folder.rglob("*.jsonl"))
    chance, ends = random.Random(seed), Counter[int]()
    is_on_disk = "--disk" in command(folder / "new")
    for turn in range(num_kills):
        before = journalled(out)
        done = kill(at, command(out), chance, within_s, largest if turn % 2 and not is_on_disk else 0)
        assert done.code in (0, *KILLED), done.log
        ends[done.code] += 1
        assert not asked(at) & before.keys(), "what is in the journal is not asked again"
        assert not before - journalled(out), "and stays there"
    done = at.run(*command(out))
    assert done.code == 0, done.log
    assert find(out) == find(whole)
    assert journalled(out) == expected, "each answer once, none missing"
    told = [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not told, "tokens are written nowhere"
    left = [path for path in folder.rglob("*") if path.suffix == ".tmp" or path.name == ".holder"]
    assert not left, left
    if is_on_disk:
        assert [path.name for path in Path(f"{out}-disk").iterdir()] == ["prepared"]
    return ends


def test_an_execution_that_is_killed_goes_on(executing: Nursery, tmp_path: Path) -> None:
    ends = survive(executing, tmp_path, execute, answers, num_kills=2, seed=2)
    assert ends[-signal.SIGXFSZ] == 1, "within a write"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_an_execution_that_is_killed_again_and_again_goes_on(executing: Nursery, tmp_path: Path, seed: int) -> None:
    ends = survive(executing, tmp_path, execute, answers, num_kills=20, seed=seed)
    print(f"\n{ends[-signal.SIGKILL]} killed, {ends[-signal.SIGXFSZ]} within a write, {ends[0]} came to their end")
    assert ends[-signal.SIGKILL] + ends[-signal.SIGXFSZ] >= 8


@pytest.mark.slow
@pytest.mark.parametrize("command", [run, run_on_disk])
@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_killed_again_and_again_goes_on(
    running: Nursery, tmp_path: Path, command: Command, seed: int
) -> None:
    ends = survive(running, tmp_path, command, scores, num_kills=8, seed=seed)
    print(f"\n{ends[-signal.SIGKILL]} killed, {ends[-signal.SIGXFSZ]} within a write, {ends[0]} came to their end")
    assert ends[-signal.SIGKILL] + ends[-signal.SIGXFSZ] >= 3


@pytest.mark.slow
def test_a_full_disk_is_said_and_costs_nothing(running: Nursery, tmp_path: Path) -> None:
    """Journal, logs, report, distributions: whichever file comes to that length first."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert running.run(*run(whole)).code == 0
    largest = max(path.stat().st_size for path in tmp_path.rglob("*"))
    chance, places = random.Random(0), Counter[str]()
    for _ in range(12):
        before = journalled(out)
        done = running.run(*run(out), file_bytes=chance.randrange(largest), dies=False)
        assert not before - journalled(out)
        if done.code:
            *_, line = done.log.splitlines()
            assert done.code == 2 and "Traceback" not in done.log, done.log
            assert line.startswith("flexeval: error["), line
            places[line[:100]] += 1
    print(f"\n{dict(places)}")
    done = running.run(*run(out))
    assert done.code == 0, done.log
    assert scores(out) == scores(whole)


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(running: Nursery, tmp_path: Path) -> None:
    out = tmp_path / "out"
    started = running.start(*run(out))
    while not any(path.stat().st_size for path in out.glob("journal/*")):
        time.sleep(0.01)
    os.kill(started.pid, signal.SIGINT)
    done = started.wait()
    assert done.code == 130, done.log
    *_, hint, line = done.log.splitlines()
    assert hint.endswith(f"flexeval resume {out} goes on") and line.startswith("flexeval: interrupted")
    assert running.run("resume", str(out)).code == 0
