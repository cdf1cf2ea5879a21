"""The command line: a module for each group of commands. Knows options and exit codes; not how anything is done.

Exit codes: 0 success; 2 something the user can mend, said in one line; 1 our own bug, with its traceback, or a run
that `check` found to be worse.
"""

from __future__ import annotations

import codecs
import errno
import io
import locale
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, NoReturn

import typer

import flexeval
from flexeval.cli import bench, check, data, evaluate, new_task, plan, prepare, profile, remote, schema, status
from flexeval.errors import CapacityError, ConfigError, DiskError, FlexevalError

_INTERRUPTED = 130
_UNREAD = 141
"""As the shell says of a program that `head` has read enough of: 128 + SIGPIPE."""
_is_debugging = False
"""Whether a mistake of the user's is shown with its traceback."""
_ELSEWHERE = "Make room there, or name another place"
_IN_THE_WAY = "Move what is there away, or name another place"
_MENDS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _ELSEWHERE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Change who may write there, or name another place"),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP), _IN_THE_WAY),
    **dict.fromkeys((errno.ENOENT, errno.ESTALE), "Somebody may have taken it away meanwhile: run the command again"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Allow for more open files (ulimit -n), or end other programs"),
    **dict.fromkeys((errno.EAGAIN, errno.ENOMEM), "Allow for more processes and memory, or end other programs"),
    **dict.fromkeys((errno.EIO, errno.ENXIO, errno.ENODEV, errno.EBUSY), "Check the disk, or name another place"),
    errno.ENAMETOOLONG: "Name a shorter path",
}
"""Errors of files that are no bug of ours, and how they are mended."""
_ENDINGS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a command as Ctrl-C does: what was begun is put in order first."""

app = typer.Typer(
    help="How good a language model is on HELM, how fast this machine evaluates it, and what compression costs.",
    epilog="To begin with: flexeval run --suite demo --setting none --setting w4",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for command in (
    evaluate.run,
    evaluate.resume,
    status.status,
    evaluate.compare,
    evaluate.report,
    check.check,
    plan.plan,
    profile.profile,
    remote.prepare,
    remote.execute,
    remote.score,
    bench.bench,
    prepare.prepare_model,
    new_task.new_task,
    schema.schema,
):
    app.command()(command)
app.add_typer(data.app, name="data")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"flexeval {flexeval.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the program a mistake was found.")] = False,
) -> None:
    """Options of every command."""
    global _is_debugging
    _is_debugging = debug


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that wait give way: beside other work, 4x as fast
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # ragged rows fragment a GPU's memory
    _speak_utf8()
    _stand_in_for_closed_files()
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack letters that a path or an answer has
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):
                stream.reconfigure(errors="backslashreplace")
    try:
        with _ended_by_signals():
            code = app(standalone_mode=False)
    except SystemExit as error:  # typer's, whose 1 is for a pipe that nobody reads any more
        sys.exit(_UNREAD if isinstance(error.__context__, BrokenPipeError) else error.code)
    except KeyboardInterrupt:  # while the command line is put together
        code = _INTERRUPTED
    except FlexevalError as error:
        _fail(str(error), error.code)
    except typer.TyperException as error:  # an option that there is not, a value that cannot be read
        if not error.format_message():  # no command at all: the help has been shown
            sys.exit(error.exit_code)
        _fail(f"{error.format_message().rstrip('.')}. See flexeval --help", ConfigError.code)
    except OSError as error:
        if error.errno not in _MENDS:
            raise
        path = str(error.filename2 or error.filename or "files")
        _fail(str(DiskError(str(error.strerror), where=path, mend=_MENDS[error.errno])), DiskError.code)
    except (MemoryError, ImportError) as error:
        if isinstance(error, ImportError) and "failed to map segment" not in str(error):  # as below a `ulimit -v`
            raise
        what = f"memory ran out{f': {error}' if str(error) else ''}. Ask for less at a time, or end other programs"
        _fail(what, CapacityError.code)
    if code == _INTERRUPTED:
        print("flexeval: interrupted; run the same command again to go on where it stopped", file=sys.stderr)
    sys.exit(code)


def _speak_utf8() -> None:
    """Begin again in Python's UTF-8 mode where the locale has another encoding: HELM reads its data in the locale's."""
    if codecs.lookup(locale.getencoding()).name == "utf-8" or sys.flags.utf8_mode:
        return
    streams = f"{sys.stdout.encoding if sys.stdout else 'ascii'}:backslashreplace"
    environment = {"PYTHONIOENCODING": streams} | os.environ | {"PYTHONUTF8": "1"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _stand_in_for_closed_files() -> None:
    """Open the standard files that are closed: else the next file opened takes what libraries write to those."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(file, True)
    os.close(file)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Take the signals of `_ENDINGS` for Ctrl-C, but those that somebody has arranged for, as `nohup` does."""
    if threading.current_thread() is not threading.main_thread():  # only there signals arrive
        yield
        return
    ours = [number for number in _ENDINGS if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _fail(message: str, code: str) -> NoReturn:
    if _is_debugging:
        traceback.print_exc()
    try:
        print(f"flexeval: error[{code}]:", " ".join(message.split()), file=sys.stderr)
    except OSError:  # a full disk, a pipe that nobody reads: the code says it, unless what is left fails at the end too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    sys.exit(2)
