"""A function in a process of its own, its progress shown here: memory is free before it, and its peak is its own.

Knows processes and pipes; not what is run in them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from flexeval.errors import CapacityError, FlexevalError
from flexeval.progress import Progress, Update

J = TypeVar("J")
R = TypeVar("R")
_SECONDS_BETWEEN_STEPS = 0.2
_SECONDS_TO_CLEAN_UP = 20.0
_STANDARD_OUTPUT, _STANDARD_ERROR = 1, 2


class ChildFailure(RuntimeError):
    """A bug in the child; the message is its traceback."""


def run_in_child(function: Callable[[J, Progress], R], job: J, progress: Progress, *, what: str) -> R:
    """The result of `function(job, progress)`, computed in a new process.

    Args:
        function: Of a module, so that another process can import it.
        job: What it needs, plain data.
        progress: Shows the child's activities.
        what: What is run, in a user's words.

    Raises:
        FlexevalError: What the child raised; `CapacityError` if the system ended it, as it does when memory runs out.
        ChildFailure: Anything else that the child raised.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, function, job), name=what)
    process.start()
    sender.close()
    is_done = False
    try:
        with ExitStack() as shown:
            update: Update = _ignore
            while True:
                kind, *values = receiver.recv()
                if kind == "begin":
                    shown.close()
                    update = shown.enter_context(progress.activity(*values))
                elif kind == "step":
                    update(*values)
                elif kind == "end":
                    shown.close()
                elif kind == "say":
                    progress.say(*values)
                elif kind == "result":
                    result: R = values[0]
                    is_done = True
                    return result
                else:
                    is_done = True
                    raise values[0] if kind == "mistake" else ChildFailure(values[0])
    except EOFError:
        process.join()
        raise CapacityError(
            f"{what} was ended by the system (exit code {process.exitcode})",
            mend="If its memory ran out, give it less with --cpu-memory, or less to do",
        ) from None
    finally:
        if not is_done and process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGINT)
        _end(process)
        receiver.close()


def _end(process: BaseProcess) -> None:
    """Let the child take its files with it; then it must go."""
    process.join(_SECONDS_TO_CLEAN_UP)
    if process.is_alive():
        process.kill()
        process.join()


def _serve(sender: Connection, function: Callable[[J, Progress], R], job: J) -> None:
    """The child's whole life."""
    os.dup2(_STANDARD_ERROR, _STANDARD_OUTPUT)  # what a peer prints is no result of ours
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    try:
        sender.send(("result", function(job, _PipeProgress(sender))))
    except FlexevalError as error:
        sender.send(("mistake", error))
    except KeyboardInterrupt:
        pass
    except BaseException:
        sender.send(("bug", traceback.format_exc()))
    sender.close()


class _PipeProgress:
    """Progress that is shown by the parent."""

    def __init__(self, sender: Connection):
        self._sender = sender

    def say(self, text: str) -> None:
        """Print a line."""
        self._sender.send(("say", text))

    @contextmanager
    def activity(self, label: str) -> Iterator[Update]:
        """Show an activity; steps are sent now and then."""
        self._sender.send(("begin", label))
        last = 0.0

        def update(num_done: int, num_steps: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_STEPS or num_done == num_steps:
                last = now
                self._sender.send(("step", num_done, num_steps))

        yield update
        self._sender.send(("end",))


def _ignore(*_: Any) -> None:
    pass
