"""The command line: a user's mistake is one line on standard error, exit code 2, and nothing left behind."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from tiny_directory import write_tiny_model

from flexeval.cache import cache_root
from flexeval.cli import app, main
from flexeval.cli.options import command_line
from flexeval.errors import ConfigError, FlexevalError, without_secrets

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


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line as the shell would; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["flexeval", *map(str, arguments)])
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def assert_mistake(
    code: int, capsys: pytest.CaptureFixture[str], *words: str, out: Path | None = None, lines: int = 1
) -> None:
    errors = capsys.readouterr().err.splitlines()
    assert code == 2, errors
    assert len(errors) == lines and errors[0].startswith("flexeval: error["), errors
    assert all(word.lower() in errors[0].lower() for word in words), errors
    assert out is None or not out.exists()


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


def test_commands_about_data_stay_what_they_are() -> None:
    group = typer.main.get_group(app).commands["data"]
    options = {
        name: sorted(option for parameter in command.params for option in parameter.opts)
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert options == {
        "check": ["--json", "--sizes", "--suite", "--verify"],
        "fetch": ["--suite"],
        "export": ["--out", "--suite", "-o"],
        "import": ["source"],
    }


def test_options_stay_what_they_are() -> None:
    options = {
        name: sorted(option for parameter in command.params for option in parameter.opts)
        for name, command in typer.main.get_group(app).commands.items()
    }
    assert options == {
        "run": [
            "--chat-template",
            "--cpu-memory",
            "--deterministic",
            "--device",
            "--disk",
            "--dry-run",
            "--dtype",
            "--fresh",
            "--gpu-memory",
            "--keep-top",
            "--max-eval-instances",
            "--model",
            "--out",
            "--policy",
            "--setting",
            "--skip-missing",
            "--suite",
        ],
        "bench": [
            "--cpu-memory",
            "--device",
            "--disk",
            "--dtype",
            "--gen-len",
            "--gpu-memory",
            "--max-eval-instances",
            "--model",
            "--num-requests",
            "--out",
            "--peer",
            "--peer-batch-size",
            "--peer-gen-len",
            "--peer-requests",
            "--policy",
            "--prompt-len",
            "--repeat",
            "--scale",
            "--score",
            "--seed",
            "--setting",
            "--shared-prefix",
            "--skip-missing",
            "--suite",
            "--warm-up",
        ],
        "plan": [
            "--chat-template",
            "--cpu-memory",
            "--deterministic",
            "--device",
            "--disk",
            "--dtype",
            "--gpu-memory",
            "--max-eval-instances",
            "--model",
            "--out",
            "--policy",
            "--setting",
            "--skip-missing",
            "--suite",
        ],
        "resume": ["directory"],
        "status": ["--watch", "directory"],
        "profile": ["--device", "--disk", "--dtype", "--repeat"],
        "check": [
            "--any-machine",
            "--any-model",
            "--baseline",
            "--bench",
            "--junit",
            "--markdown",
            "--setting",
            "--shared-only",
            "--speed-tolerance",
            "--strict",
            "--tolerance",
            "--update",
            "directories",
        ],
        "compare": [
            "--max-eval-instances",
            "--model",
            "--models",
            "--out",
            "--settings",
            "--shared-only",
            "--suite",
            "directories",
        ],
        "data": [],
        "prepare": ["--chat-template", "--max-eval-instances", "--model", "--out", "--skip-missing", "--suite", "-o"],
        "execute": [
            "--cpu-memory",
            "--deterministic",
            "--device",
            "--disk",
            "--dtype",
            "--fresh",
            "--gpu-memory",
            "--keep-top",
            "--model",
            "--out",
            "--policy",
            "--setting",
            "-o",
            "prompts",
        ],
        "new-task": ["--kind", "name"],
        "score": ["--out", "-o", "answers", "prompts"],
        "prepare-model": ["--device", "--dtype", "--model", "--out", "--setting"],
        "report": ["directory"],
        "schema": ["file"],
    }


def test_help_goes_to_the_screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert (call(monkeypatch, "--help"), call(monkeypatch, "--version"), call(monkeypatch)) == (0, 0, 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted; run the same command again"),
        (OSError(errno.ENOSPC, "No space left on device", "journal"), 2, "No space left on device (journal)"),
        (OSError(errno.EACCES, "Permission denied", "out"), 2, "Permission denied (out)"),
        (OSError(errno.EISDIR, "Is a directory", "new", None, "page"), 2, "Is a directory (page). Move what is there"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), 2, "No such file or directory (files). Some"),
        (OSError(errno.EMFILE, "Too many open files", "log"), 2, "Too many open files (log). Allow for more"),
        (
            ImportError("libtorch_cpu.so: failed to map segment from shared object"),
            2,
            "memory ran out: libtorch_cpu.so",
        ),
        (MemoryError("Unable to allocate 9 GiB"), 2, "error[capacity]: memory ran out: Unable to allocate 9 GiB. Ask"),
    ],
)
def test_what_happens_outside_is_said_in_one_line(
    error: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)  # where there are no reports of earlier runs

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("flexeval.pipeline.run_suite", fail)
    assert call(monkeypatch, "run", "--suite", "demo") == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("flexeval: ") and words in line


def test_ctrl_c_before_a_command_begins_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flexeval.cli.app", interrupt)
    assert call(monkeypatch, "run") == 130
    assert capsys.readouterr().err.startswith("flexeval: interrupted")


SECRET = "hf_" + "Az09" * 8


@pytest.mark.parametrize(
    "text",
    [
        f"cannot reach https://me:{SECRET}@hub.example/x",
        f"cannot reach http://{SECRET}@proxy:8080: refused",
        f"401 for https://hub.example/x?X-Amz-Signature={SECRET}&a=b",
        f"GET 'https://hub.example/x?a=b&access_token={SECRET}'",
        f"the token {SECRET} is not known",
        f"the key sk-{SECRET} is not known",
    ],
)
def test_secrets_are_neither_shown_nor_kept(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["flexeval", "run", "--model", text])
    for shown in (str(FlexevalError(text)), str(FlexevalError("x", where=text)), command_line()):
        assert SECRET not in shown and "Az09" not in shown and "***" in shown
    plain = "run tasks/hf_checkpoints_of_mine/x@y sk-learn https://hub.example/x?a=b&keep=all 'task-x' a@b://c"
    assert without_secrets(plain) == plain


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_told_to_end_ends_as_after_ctrl_c(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flexeval.pipeline.run_suite", lambda *_: signal.raise_signal(number))
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert call(monkeypatch, "run", "--suite", "demo") == 130
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert "interrupted; run the same command again" in capsys.readouterr().err


def test_a_screen_without_a_letter_shows_its_number(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert call(monkeypatch, "run", "--suite", suite, "--model", "./\udcff/\u00e9", "--out", suite.parent / "out") == 2
    sys.stdout.flush()
    assert b"preparing ./\\udcff/\\xe9" in sys.stdout.buffer.getvalue()  # type: ignore[attr-defined]


def shell(line: str, **environment: str) -> tuple[int, str]:
    """Run a line of shell that begins with `flexeval`; its exit code, and what it wrote."""
    command = ["bash", "-o", "pipefail", "-c", f"{Path(sys.executable).parent}/{line}"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True)
    return done.returncode, (done.stdout + done.stderr).decode()


def test_a_reader_that_has_read_enough_is_no_bug() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([Path(sys.executable).parent / "flexeval", "schema", "results"], stdout=writing)
    os.close(writing)
    assert done.returncode == 141


def test_a_mistake_that_cannot_be_said_has_its_exit_code() -> None:
    assert shell("flexeval compare 2> /dev/full") == (2, "")


def test_another_encoding_of_the_locale_s_reads_utf8_all_the_same() -> None:
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, text = shell("flexeval report ./\u00e9", **ascii_alone)
    assert code == 2 and "no results here (\\xe9)" in text, text


def test_no_file_takes_the_number_of_a_closed_one() -> None:
    program = "import os, flexeval.cli as cli; cli._stand_in_for_closed_files(); os._exit(os.open('/', 0))"
    assert subprocess.run(["bash", "-c", f'{sys.executable} -c "{program}" <&- >&- 2>&-']).returncode == 3


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


def test_a_mistake_is_debugged_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, has_traceback in ((["--debug"], True), ([], False)):
        assert call(monkeypatch, *options, "run", "--suite", "demo", "--setting", "w3") == 2
        *above, line = capsys.readouterr().err.splitlines()
        assert line.startswith("flexeval: error[config]: unknown setting 'w3'")
        assert ("in parse" in "\n".join(above)) == has_traceback == bool(above)


def test_every_kind_of_error_is_documented() -> None:
    def kinds(base: type[FlexevalError]) -> Iterator[type[FlexevalError]]:
        for kind in base.__subclasses__():
            if kind.__module__ == "flexeval.errors":
                yield kind
            yield from kinds(kind)

    page = (Path(__file__).parents[1] / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted({(kind.code, kind.__name__) for kind in kinds(FlexevalError)})
    assert len({code for code, _ in rows}) == len(rows) == 9


def test_our_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("flexeval.pipeline.run_suite")
    with pytest.raises(ImportError):
        call(monkeypatch, "run", "--suite", "demo")


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
