"""`flexeval bench` as a user runs it: children, table, figures, and one line for every mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_directory import write_tiny_model
from tiny_models import tiny_config

from flexeval.bench.child import ChildFailure
from flexeval.cli import main
from flexeval.models import ModelSource

SUITE = 'entries: [{description: "simple_mcqa:model=text", priority: 1}]\nmax_eval_instances: 3\n'


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line as the shell would; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["flexeval", "bench", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


@pytest.fixture(scope="module")
def dummy(smollm2: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny dummy, whose vocabulary is the demo tokenizer's."""
    directory = tmp_path_factory.mktemp("dimensions")
    tiny_config("llama", vocab_size=49152).save_pretrained(directory)
    return f"dummy:{directory / 'config.json'}"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured without children, each of which imports everything anew."""

    def run_here(function: Any, job: Any, progress: Any, *, what: str) -> Any:
        return function(job, progress)

    monkeypatch.setattr("flexeval.bench.run.run_in_child", run_here)


def figures(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def test_a_dummy_is_measured_from_end_to_end(
    dummy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, disk = tmp_path / "figures.json", tmp_path / "disk"
    work = ["--prompt-len", 40, "--gen-len", 4, "--shared-prefix", 36, "--num-requests", 6, "--scale", "1,2"]
    place = ["--policy", "disk-weights=0.5,disk-kv=1", "--disk", disk, "--device", "cpu", "--dtype", "float32"]
    assert (
        call(monkeypatch, "--model", dummy, *work, *place, "--peer", "transformers", "--warm-up", 0, "--out", out) == 0
    )
    shown = " ".join(capsys.readouterr().out.split())
    table = shown.index("random tokens")
    for system in ("flexeval none", "transformers"):
        assert 0 < shown.index(f"{system}: prefill") < table, "told as soon as it is measured"
    for word in ("flexeval none", "transformers", "240 prompt tokens asked", "kv_out", "disk_read"):
        assert word in shown, word
    assert "to the power" in shown and "100% of the answers are equal" in shown
    data = figures(out)
    ours, peer = data["systems"]
    assert (ours["system"], ours["setting"], peer["system"]) == ("flexeval", "none", "transformers")
    assert ours["tokens"]["num_asked"] == 6 * 40 and ours["tokens"]["num_computed"] == 36 + 6 * 4
    assert ours["tokens"]["num_generated"] == peer["tokens"]["num_generated"] == 6 * 4
    assert [point["num_requests"] for point in ours["scale"]] == [6, 12]
    assert ours["phases"]["decode"]["lanes"]["weights"]["num_bytes"] > 0
    assert peer["same_answers"] == 1.0
    assert peer["whole"] is None
    assert peer["speedups"]["none"]["requests"] == pytest.approx(ours["requests_per_s"] / peer["requests_per_s"])
    assert not any(path.is_file() and "flexeval-" in str(path) for path in disk.rglob("*")), (
        "nothing of the run is left"
    )


@pytest.mark.usefixtures("in_process")
def test_a_peer_is_measured_on_a_part_of_the_work(
    dummy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    work = ["--prompt-len", 40, "--gen-len", 6, "--num-requests", 8, "--device", "cpu", "--dtype", "float32"]
    part = ["--peer", "accelerate", "--peer-requests", 2, "--peer-gen-len", 3]
    assert call(monkeypatch, "--model", dummy, *work, *part, "--warm-up", 0, "--out", out) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "accelerate: 2 of 8 requests asked, 6 of 48 tokens generated" in shown
    _, peer = figures(out)["systems"]
    assert peer["same_answers"] == 1.0
    assert (peer["num_requests"], peer["batch_size"], peer["whole"]["batch_size"]) == (2, 2, 8)
    assert peer["requests_per_s"] == pytest.approx(8 / peer["whole"]["elapsed_s"])


def test_a_peer_that_breaks_is_left_out(
    dummy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_peers(function: Any, job: Any, progress: Any, *, what: str) -> Any:
        if what == "transformers":
            raise ChildFailure("Traceback\n  ...\nRuntimeError: it broke")
        return function(job, progress)

    monkeypatch.setattr("flexeval.bench.run.run_in_child", break_peers)
    work = ["--prompt-len", 8, "--gen-len", 2, "--num-requests", 2, "--device", "cpu", "--warm-up", 0]
    assert call(monkeypatch, "--model", dummy, *work, "--peer", "transformers") == 0
    shown = capsys.readouterr().out
    assert "transformers was not measured: it failed: RuntimeError: it broke" in shown
    assert "Traceback" in shown and "flexeval none" in shown


@pytest.mark.usefixtures("in_process")
def test_a_suite_s_own_prompts_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, suite, out = write_tiny_model(tmp_path / "model"), tmp_path / "small.conf", tmp_path / "figures.json"
    suite.write_text(SUITE)
    assert call(monkeypatch, "--model", model, "--suite", suite, "--device", "cpu", "--warm-up", 0, "--out", out) == 0
    (system,) = figures(out)["systems"]
    assert system["num_requests"] == 3
    assert system["tokens"]["num_asked"] > system["tokens"]["num_computed"] > 0, "questions share their instructions"
    assert "3 requests of the suite" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--peer", "vllm"], "transformers, accelerate, deepspeed"),
        (["--peer-gen-len", "33"], "--peer-gen-len"),
        (["--peer-gen-len", "1"], "--peer-gen-len"),
        (["--setting", "w3"], "none, w8, w4"),
        (["--setting", "w4", "--setting", "w4"], "twice"),
        (["--suite", "demo", "--prompt-len", "8"], "--prompt-len"),
        (["--suite", "demo", "--scale", "1,4"], "--scale"),
        (["--scale", "four"], "--scale 1,4,16"),
        (["--gpu-memory", "lots"], "16GiB"),
        (["--gpu-memory", "16GiB", "--device", "cpu"], "computed on the CPU"),
        (["--model", "dummy:opt-31b"], "opt-30b"),
        (["--prompt-len", "0"], "--prompt-len"),
    ],
)
def test_mistakes_take_one_line(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = call(monkeypatch, *([] if "--model" in arguments else ["--model", "dummy:opt-125m"]), *arguments)
    errors = capsys.readouterr().err.splitlines()
    assert code == 2 and len(errors) == 1, errors
    assert errors[0].startswith("flexeval: ") and words in errors[0]


def test_a_mistake_in_a_child_takes_one_line_too(
    dummy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = call(monkeypatch, "--model", dummy, "--num-requests", 2, "--cpu-memory", "1MB", "--device", "cpu")
    errors = capsys.readouterr().err.splitlines()
    assert code == 2 and len(errors) == 1, errors
    assert "--cpu-memory" in errors[0]
