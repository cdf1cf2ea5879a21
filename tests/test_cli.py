"""The command line: a user's mistake is one line on standard error, exit code 2, and nothing left behind."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from cli_calls import assert_mistake, call
from safetensors.torch import load_file, save_file
from tiny_directory import write_tiny_model

from flexeval.cache import cache_root
from flexeval.errors import ConfigError

ENTRY = "simple_mcqa:model=text"
SUITE = 'entries: [{{description: "{entry}", priority: 1}}]\nmax_eval_instances: 3\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "small.conf"
    path.write_text(SUITE.format(entry=ENTRY))
    return path


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--suite", "no-such-suite", ["no-such-suite", "demo", "helm-lite"]),
        ("--setting", "w3", ["w3", "none, w8, w4"]),
        ("--suite", "lm-eval:./no-such-folder", ["no folder or file './no-such-folder'", "num_fewshot=K"]),
        ("--model", "./no-such-model", ["no-such-model"]),
        ("--model", "dummy:opt-31b", ["opt-30b"]),
        ("--device", "tpu", ["tpu", "auto, cpu, cuda"]),
        ("--dtype", "float8", ["float8", "bfloat16"]),
        ("--gpu-memory", "lots", ["lots", "16GiB"]),
        ("--gpu-memory", "16GiB", ["computed on the CPU", "--gpu-memory", "Leave it out"]),
        ("--cpu-memory", "-3GB", ["-3GB"]),
        ("--cpu-memory", "100KB", ["cpu", "lacks", "--cpu-memory"]),
        ("--policy", "gpu-weights=2", ["gpu=2"]),
        ("--policy", "wings=1", ["wings"]),
    ],
)
def test_a_bad_option_is_named(
    option: str,
    value: str,
    words: list[str],
    suite: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    options = {"--suite": suite, "--model": model, "--out": out, "--device": "cpu"} | {option: value}
    code = call(monkeypatch, "run", *(word for pair in options.items() for word in pair))
    assert_mistake(code, capsys, *words, out=out)


def test_an_unknown_task_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.conf"
    path.write_text(SUITE.format(entry="no_such_task:model=text"))
    out = tmp_path / "out"
    code = call(monkeypatch, "run", "--suite", path, "--model", model, "--out", out)
    assert_mistake(code, capsys, "no_such_task", str(path), out=out)


def test_a_task_file_that_is_refused_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "tasks", tmp_path / "out"
    folder.mkdir()
    (folder / "mine.yaml").write_text("task: mine\nprocess_docs: !function utils.clean\ntest_split: test\n")
    code = call(monkeypatch, "run", "--suite", f"lm-eval:{folder}", "--model", model, "--out", out)
    assert_mistake(code, capsys, "task mine of", "!function utils.clean is Python", out=out)


def test_missing_data_are_named_with_their_path(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLEXEVAL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "wants-data.conf"
    path.write_text(SUITE.format(entry="gsm:model=text"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # no network, at once
    out = tmp_path / "out"
    code = call(monkeypatch, "run", "--suite", path, "--model", model, "--out", out)
    assert_mistake(code, capsys, str(tmp_path / "cache" / "helm"), "gsm", "--skip-missing", out=out)


def test_a_model_that_cannot_be_read_is_named(
    suite: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    out = tmp_path / "out"
    code = call(monkeypatch, "run", "--suite", suite, "--model", broken, "--out", out)
    assert_mistake(code, capsys, "model.safetensors", out=out)


def test_a_weight_that_cannot_be_quantized_is_named(
    suite: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    weights[name][3, 5] = torch.inf
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    code = call(monkeypatch, "run", "--suite", suite, "--model", broken, "--setting", "w4-g32", "--out", out)
    assert_mistake(code, capsys, "infinite", name, "none", out=out)


@pytest.mark.parametrize("family", ["falcon", "bloom", "mamba", "t5"])
def test_a_family_that_cannot_run_is_refused(
    family: str,
    suite: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": 640}))
    out = tmp_path / "out"
    code = call(monkeypatch, "run", "--suite", suite, "--model", other, "--out", out)
    assert_mistake(code, capsys, family, out=out)


def test_an_output_that_is_a_file_stays_as_it_is(
    suite: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    code = call(monkeypatch, "run", "--suite", suite, "--model", model, "--out", out)
    assert_mistake(code, capsys, str(out), "--out")
    assert out.read_text() == "mine"


def test_a_setting_named_twice_is_refused(
    suite: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = call(monkeypatch, "run", "--suite", suite, "--model", model, "--setting", "w4", "--setting", "w4")
    assert_mistake(code, capsys, "w4", "twice")


@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_directory_without_results_is_named(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_mistake(call(monkeypatch, command, tmp_path), capsys, str(tmp_path))
    (tmp_path / "results.json").write_text("{]")
    assert_mistake(call(monkeypatch, command, tmp_path), capsys, "results.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--suit", "demo"], ["--suit", "--suite"]),
        (["run"], ["Missing option '--suite'"]),
        (["run", "--suite", "demo", "--max-eval-instances", "0"], ["--max-eval-instances", "greater"]),
        (["run", "--suite", "demo", "--max-eval-instances", "many"], ["--max-eval-instances", "integer"]),
        (["walk"], ["No such command 'walk'"]),
    ],
)
def test_usage_errors_take_one_line_too(
    arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_mistake(call(monkeypatch, *arguments), capsys, *words, "flexeval --help")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing to compare", "DIR", "--settings none,w4"]),
        (["some", "--settings", "none,w4"], ["--settings", "Name directories, or settings"]),
        (["some", "--suite", "demo"], ["--suite", "--settings"]),
        (["--model", "smollm2"], ["--model", "--settings"]),
        (["--settings", "none,w5"], ["unknown setting 'w5'"]),
        (["--settings", "none,"], ["unknown setting ''"]),
        (["--settings", "none,w4,none"], ["'none' is named twice"]),
        (["--settings", "none", "--suite", "nowhere"], ["unknown suite 'nowhere'"]),
        (["--models", "smollm2,smollm2"], ["'smollm2' does not tell one model", "--models"]),
        (["--models", "a,,b"], ["'' does not tell one model"]),
        (["--models", "a,b", "--model", "c"], ["named twice"]),
        (["reports/a", "--models", "a,b"], ["directories were run already", "--models"]),
    ],
)
def test_what_cannot_be_compared_takes_one_line(
    arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_mistake(call(monkeypatch, "compare", *arguments), capsys, *words)


def test_a_screen_without_a_letter_shows_its_number(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert call(monkeypatch, "run", "--suite", suite, "--model", "./\udcff/\u00e9", "--out", suite.parent / "out") == 2
    sys.stdout.flush()
    assert b"preparing ./\\udcff/\\xe9" in sys.stdout.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--model", "~nobody-here/x"), ("--model", "dummy:~nobody-here/x"), ("--suite", "lm-eval:~nobody-here/x")],
)
def test_the_home_of_nobody_is_a_path_that_is_not_there(
    option: str,
    value: str,
    suite: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = suite.parent / "out"
    options = {"--suite": suite, "--model": model, "--out": out} | {option: value}
    code = call(monkeypatch, "run", *(word for pair in options.items() for word in pair))
    assert_mistake(code, capsys, "~nobody-here/x", out=out)


def test_a_cache_in_the_home_of_nobody_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXEVAL_CACHE", "~nobody-here/cache")
    with pytest.raises(ConfigError, match=r"no such home.*~nobody-here/cache.*FLEXEVAL_CACHE"):
        cache_root()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", '{"model_type": "llama", "num_attention_heads": 0}', ["configuration"]),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}', ["configuration", "hidden_size"]),
        ("config.json", '{"model_type": "no-such-family"}', ["no-such-family"]),
        ("config.json", '{"model_type": "llama", "hidden_size": 64, "vocab_size": 640}', ["weights"]),
        ("generation_config.json", "{", ["generation_config.json"]),
        ("tokenizer.json", "{", ["tokenizer"]),
    ],
)
def test_a_file_of_a_model_that_makes_no_sense_is_named(
    file: str,
    content: str,
    words: list[str],
    suite: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / file).write_text(content)
    out = tmp_path / "out"
    code = call(monkeypatch, "run", "--suite", suite, "--model", broken, "--out", out)
    assert_mistake(code, capsys, *words, str(broken), out=out)


def test_a_prompt_longer_than_the_context_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = Path(shutil.copytree(model, tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    path = tmp_path / "long.conf"
    path.write_text(SUITE.format(entry="synthetic_reasoning:model=text,mode=pattern_match"))
    out = tmp_path / "out"
    code = call(monkeypatch, "run", "--suite", path, "--model", short, "--out", out)
    assert_mistake(code, capsys, "context holds 40", "max_tokens", out=out)


def test_a_run_and_its_report(
    suite: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = ("--setting", "none", "--setting", "w4-g32")
    assert call(monkeypatch, "run", "--suite", suite, "--model", model, "--out", out, *settings) == 0
    assert f"Report: {out / 'index.html'}" in capsys.readouterr().out
    assert {"index.html", "report.md", "results.csv", "results.json", "helm", "journal"} <= {
        path.name for path in out.iterdir()
    }
    (out / "index.html").unlink()
    assert call(monkeypatch, "status", out, "--watch") == 0
    assert "Done: process" in capsys.readouterr().out
    assert call(monkeypatch, "report", out) == 0
    assert (out / "index.html").is_file()
    assert call(monkeypatch, "compare", out, out, "--out", tmp_path / "both") == 0
    assert (tmp_path / "both" / "index.html").is_file()


def test_models_are_run_and_compared_on_the_same_questions_alone(
    suite: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    models = f"{model},./other"
    chosen = ("--suite", suite, "--max-eval-instances", 2)
    assert call(monkeypatch, "compare", "--models", models, *chosen, "--out", "both") == 0
    results = json.loads((tmp_path / "both/results.json").read_text())
    first, second = (setting["setting"] for setting in results["settings"])
    assert first.endswith("/none") and second == "other/none"
    run = tmp_path / "both/other"
    fewer = json.loads((run / "results.json").read_text())
    fewer["instances"].pop()
    (tmp_path / "fewer.json").write_text(json.dumps(fewer))
    capsys.readouterr()
    assert_mistake(
        call(monkeypatch, "compare", run, "fewer.json"), capsys, "1 of 2 questions", "other", "--shared-only"
    )
    assert call(monkeypatch, "compare", run, "fewer.json", "--shared-only") == 0
    assert "1 of 2 questions were not asked under all settings" in " ".join(capsys.readouterr().out.split())


def test_settings_are_run_and_compared(
    suite: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    chosen = ("--settings", "none,w4kv4-topk50", "--suite", suite, "--model", model, "--max-eval-instances", 2)
    assert call(monkeypatch, "compare", *chosen, "--out", out) == 0
    assert "w4kv4-topk50" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert [setting["setting"] for setting in results["settings"]] == ["none", "w4kv4-topk50"]
