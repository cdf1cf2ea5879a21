"""The command line in forked processes: everything is imported once, and each run is a process that can be killed.

A run notes in a file what it asks the engine, request by request under each setting, so that a test sees what was asked
twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_NURSERY = """
import json, os, resource, signal, sys
import flexeval.cli
from flexeval.backends.native import Engine

def child(job):
    os.chdir(job["folder"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for standard, file in enumerate((null, log, log)):
        os.dup2(file, standard)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if job["file_bytes"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if job["dies"] else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"], resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    generate = Engine.generate
    def note(self, requests, **kwargs):
        setting = self._opened.setting.name
        hashes = [f"{setting} {request.content_hash()}" for request in requests]
        asked = os.open(job["asked"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(asked, (json.dumps(hashes) + chr(10)).encode())
        return generate(self, requests, **kwargs)
    Engine.generate = note
    sys.argv = ["flexeval", *job["arguments"]]
    flexeval.cli.main()

for name in sys.argv[1:]:
    __import__(name)
print("ready", flush=True)
while line := sys.stdin.readline():
    pid = os.fork()
    if not pid:
        code = 70
        try:
            child(json.loads(line))
            code = 0
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)
    sys.stdin.readline()  # the number is the process's own until it is waited for
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

SECRET = "hf_known_to_the_runs_and_to_be_found_nowhere"


class Ended(NamedTuple):
    """A run that is over."""

    code: int
    """Its exit code; the negative number of the signal that killed it."""
    log: str
    """What it printed."""


class Started:
    """A run under way."""

    def __init__(self, nursery: subprocess.Popen[str], pid: int, log: Path):
        self.pid = pid
        self._nursery = nursery
        self._log = log

    def wait(self) -> Ended:
        """Until it is over; before that, `pid` names it even when it is."""
        assert self._nursery.stdin is not None and self._nursery.stdout is not None
        self._nursery.stdin.write("\n")
        self._nursery.stdin.flush()
        return Ended(int(self._nursery.stdout.readline()), self._log.read_text(errors="replace"))


class Nursery:
    """Starts runs, one at a time."""

    def __init__(self, process: subprocess.Popen[str], folder: Path):
        self._process = process
        self._folder = folder
        self.asked = folder / "asked.jsonl"
        """What runs have asked the engine, a line a call."""

    def start(self, *arguments: str, file_bytes: int = 0, dies: bool = True) -> Started:
        """Start `flexeval ARGUMENTS`.

        With `file_bytes`, no file takes more: within the write that passes that length it is killed, or, if it does not
        die of it, that write fails.
        """
        job = {
            "arguments": arguments,
            "folder": str(self._folder),
            "log": str(self._folder / "log"),
            "asked": str(self.asked),
            "file_bytes": file_bytes,
            "dies": dies,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Started(self._process, int(self._process.stdout.readline()), self._folder / "log")

    def run(self, *arguments: str, file_bytes: int = 0, dies: bool = True) -> Ended:
        """Run it to its end."""
        return self.start(*arguments, file_bytes=file_bytes, dies=dies).wait()


@contextmanager
def nursery(folder: Path, *modules: str) -> Iterator[Nursery]:
    """Yield a `Nursery` whose runs work in `folder` and need not import `modules`."""
    process = subprocess.Popen(
        [sys.executable, "-c", _NURSERY, *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_TOKEN": SECRET},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield Nursery(process, folder)
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()
