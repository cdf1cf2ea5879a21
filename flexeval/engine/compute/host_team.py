"""Our compiled code for the CPU, and the threads that run it: built once on this machine. Knows no tensor.

Where no C compiler is at hand (Triton needs one as well), `build` gives None and torch computes everything.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

from flexeval.cache import cached_directory
from flexeval.errors import FlexevalError

FOLDER = Path(__file__).parent
SOURCES = (
    "host_team.c",
    "host_decode.c",
    "host_codes.c",
    "host_prompts.c",
    "host_softmax.c",
    "host_unpack.c",
    "host_passes.c",
    "host_products.c",
)
HEADERS = ("host_team.h", "host_decode.h", "host_codes.h", "host_bytes.h", "host_tiles.h", "host_vectors.h")

_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread")


class Job:
    """What the team has been given."""

    def __init__(self, team: Team, address: int, keeps: object):
        """Keeps what the team reads and writes; made by `Team.begin`."""
        self._team = team
        self._address = address
        self._keeps = keeps
        self._seconds: float | None = None

    def wait(self) -> float:
        """Seconds of the team that it took, once it is done."""
        if self._seconds is None:
            self._seconds = self._team.wait(self._address)
        return self._seconds

    def __del__(self) -> None:
        self.wait()


class Team:
    """Threads that go from one job to the next, and sleep where there is none."""

    def __init__(self, library: ctypes.CDLL, num_threads: int, *, borrows: bool):
        """See `build`."""
        self.library = library
        self.num_threads = num_threads
        self._team = ctypes.c_void_p(library.flexeval_gather(num_threads, _lent() if borrows else None))
        # A process that ends leaves its threads to the system: a fork of it has none to wait for.
        weakref.finalize(self, library.flexeval_dismiss, self._team).atexit = False

    def begin(self, begin: Callable[..., int | None], work: ctypes.Structure, keeps: object) -> Job:
        """Give the team some work, behind what it has been given before; threads that are borrowed do it now.

        Args:
            begin: A function of the library's that begins such work.
            work: What it takes.
            keeps: What the work points to.
        """
        address = begin(self._team, ctypes.byref(work))
        if address is None:
            raise MemoryError
        return Job(self, address, (work, keeps))

    def wait(self, job: int) -> float:
        """Seconds that the team took for a job, which is forgotten."""
        return float(self.library.flexeval_wait(self._team, job))

    def drain(self) -> None:
        """Wait until the team has done all it was given."""
        self.library.flexeval_drain(self._team)


def build(num_threads: int, *, borrows: bool = False) -> Team | None:
    """A team of so many threads; None where this machine cannot compile what it runs.

    Args:
        num_threads: Of the team.
        borrows: Whether they are torch's and the caller's, as for a thread that has torch compute all the time: torch's
            threads spin for a while after each operation, and others would wait for their cores.
    """
    found = library()
    return None if found is None else Team(found, num_threads, borrows=borrows)


@cache
def lent(num_threads: int) -> Team | None:
    """A team of so many of torch's threads, the caller's one of them; any number of callers may have it."""
    return build(num_threads, borrows=True)


def _lent() -> ctypes.c_void_p | None:
    """What runs a function in the threads of torch's OpenMP runtime; None where that is none we know."""
    run = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if run is None else ctypes.cast(run, ctypes.c_void_p)


@cache
def library() -> ctypes.CDLL | None:
    """All that is compiled; None where it cannot be."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        return None
    texts = [(FOLDER / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    identity = hashlib.sha256(repr((texts, _FLAGS, _processor())).encode()).hexdigest()[:16]

    def compile_to(directory: Path) -> None:
        sources = [str(FOLDER / name) for name in SOURCES]
        command = [*compiler.split(), *_FLAGS, "-o", str(directory / "host.so"), *sources, "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)

    try:
        found = ctypes.CDLL(str(cached_directory("kernels", identity, compile_to) / "host.so"))
    except (OSError, subprocess.SubprocessError, FlexevalError):  # torch computes, if more slowly
        return None
    pointer = ctypes.c_void_p
    for name, result, *arguments in (
        ("gather", pointer, ctypes.c_int, pointer),
        ("dismiss", None, pointer),
        ("begin_decode", pointer, pointer, pointer),
        ("begin_prompts", pointer, pointer, pointer),
        ("begin_softmax", pointer, pointer, pointer),
        ("begin_unpacking", pointer, pointer, pointer),
        ("begin_norm", pointer, pointer, pointer),
        ("begin_gate", pointer, pointer, pointer),
        ("begin_rotate", pointer, pointer, pointer),
        ("begin_turn", pointer, pointer, pointer),
        ("begin_product", pointer, pointer, pointer),
        ("has_products", ctypes.c_int),
        ("has_tiles", ctypes.c_int),
        ("prompt_rows", ctypes.c_int),
        ("wait", ctypes.c_double, pointer, pointer),
        ("drain", None, pointer),
    ):
        function = getattr(found, f"flexeval_{name}")
        function.restype, function.argtypes = result, arguments
    return found


def _processor() -> str:
    """What code for this very processor is good for: caches may be shared by machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in text.splitlines() if line.startswith(("model name", "flags"))}))
