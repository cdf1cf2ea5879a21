"""The command line as a process: what happens outside of it, how it ends, and what it never shows."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_calls import call

from flexeval.cli.options import command_line
from flexeval.errors import FlexevalError, without_secrets


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


def test_a_mistake_is_debugged_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, has_traceback in ((["--debug"], True), ([], False)):
        assert call(monkeypatch, *options, "run", "--suite", "demo", "--setting", "w3") == 2
        *above, line = capsys.readouterr().err.splitlines()
        assert line.startswith("flexeval: error[config]: unknown setting 'w3'")
        assert ("in parse" in "\n".join(above)) == has_traceback == bool(above)


def test_our_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("flexeval.pipeline.run_suite")
    with pytest.raises(ImportError):
        call(monkeypatch, "run", "--suite", "demo")
