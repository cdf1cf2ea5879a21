"""Our compiled decode attention for the CPU: builds it once on this machine, and calls it. Knows tensors; no row.

torch's CPU attention reads a token's heads one by one and reads them again for every query head; what a token's heads
hold lies side by side in a log. `host_kernel.c` reads it in one run, with a team of threads that go from one job to the
next and sleep where there is none. Where no C compiler is at hand (Triton needs one as well), `build` gives None and
torch attends.

Shapes: T tokens of the row, C tokens of a log, B bytes of a token, K KV heads, M query heads to a KV head, H size of a
key, W size of a value, P parts of contexts.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import weakref
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flexeval.cache import cached_directory
from flexeval.engine.codecs.kv_format import CodedFormat, KVFormat, KVLog, PlainFormat
from flexeval.engine.compute.partial import Partial
from flexeval.errors import FlexevalError

SOURCE = Path(__file__).with_name("host_kernel.c")
PIECES_PER_THREAD = 16
"""Pieces of work for each thread that a call should have, so that threads end at about the same time."""

_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread")
_LANES, _MAX_SIZE = 16, 1024  # as in the source, where vectors are longest
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_CODES = {8: 3, 4: 4, 2: 5}  # by bits
_POINTERS = ("queries", "logs", "tokens", "bounds", "places", "out", "lse", "rounded")
_SIZES = ("num_parts", "num_kv_heads", "heads_per_kv", "key_size", "value_size", "heads_at_once", "rounded_kind")


class _Kind(NamedTuple):
    """What a log holds."""

    kind: int
    group_size: int = 0

    @classmethod
    def of(cls, form: KVFormat) -> _Kind | None:
        """None for what the kernel cannot read."""
        if isinstance(form, PlainFormat) and form.dtype in _KINDS:
            return cls(_KINDS[form.dtype])
        if isinstance(form, CodedFormat) and form.codec.code_bytes % _LANES == 0:
            return cls(_CODES[form.codec.bits], form.codec.group_size)
        return None


class _Work(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in (*_SIZES, *_Kind._fields)),
        ("softcap", ctypes.c_float),
    )


class Parts(NamedTuple):
    """Parts of contexts, a query each."""

    logs: list[int]
    """Which log each lies in."""
    token_P: Tensor
    """Token of the row that asks, int64."""
    bounds: Tensor
    """`[P + 1]`, int64: the places of part i are those from `bounds[i]` up to `bounds[i + 1]`."""
    places: Tensor
    """Where their tokens lie in the logs, int32."""
    num_tokens: list[int]
    """So many tokens each log has at least."""


class Job:
    """Attention that the team has been given."""

    def __init__(self, kernel: HostKernel, address: int, partial: Partial, reads: object):
        """Keeps what the team reads and writes; made by `HostKernel.begin`."""
        self._kernel = kernel
        self._address = address
        self._partial = partial
        self._reads = reads
        self._seconds: float | None = None

    def wait(self) -> float:
        """Seconds of the team that it took, once it is done."""
        if self._seconds is None:
            self._seconds = self._kernel.wait(self._address)
        return self._seconds

    @property
    def partial(self) -> Partial:
        """What came out."""
        self.wait()
        return self._partial

    def __del__(self) -> None:
        self.wait()


class HostKernel:
    """The kernel with a team of threads. Where they are borrowed, one caller at a time."""

    def __init__(self, library: ctypes.CDLL, num_threads: int, *, borrows: bool):
        """See `build`."""
        self._library = library
        self._team = ctypes.c_void_p(library.flexeval_gather(num_threads, _lent() if borrows else None))
        self._num_threads = num_threads
        # A process that ends leaves its threads to the system: a fork of it has none to wait for.
        weakref.finalize(self, library.flexeval_dismiss, self._team).atexit = False

    def takes(self, log: KVLog) -> bool:
        """Whether it can read such a log."""
        return _reads(log.format) and log.data_CB.is_contiguous()

    def __call__(
        self, q_TKMH: Tensor, logs: list[KVLog], parts: Parts, *, scale: float, softcap: float | None
    ) -> Partial:
        """Attend: output `[P, K, M, W]` and log-sum-exp `[P, K, M]`, float32. Takes what `begin` takes."""
        return self.begin(q_TKMH, logs, parts, scale=scale, softcap=softcap).partial

    def begin(
        self,
        q_TKMH: Tensor,
        logs: list[KVLog],
        parts: Parts,
        *,
        scale: float,
        softcap: float | None,
        rounded_PKMW: Tensor | None = None,
    ) -> Job:
        """Have the team attend behind what it has been given before; threads that are borrowed do it now.

        Args:
            q_TKMH: Queries of all tokens of the row.
            logs: Logs of one format.
            parts: What of them is attended to, at least one token each.
            scale: Factor on the scores.
            softcap: Scores become softcap * tanh(score / softcap).
            rounded_PKMW: Contiguous; filled with the output, rounded to its type. The output in float32 is none then.
        """
        form = logs[0].format
        kind = _Kind.of(form)
        assert kind is not None
        for log, num_tokens in zip(logs, parts.num_tokens, strict=True):
            assert (log.format.shape, len(log.data_CB) >= num_tokens) == (form.shape, True), (log, num_tokens)
        _, num_kv_heads, heads_per_kv, key_size = q_TKMH.shape
        value_size, num_parts = form.shape.value_size, len(parts.logs)
        queries = q_TKMH.float().mul(scale).contiguous()
        addresses = torch.tensor([log.data_CB.data_ptr() for log in logs])[torch.tensor(parts.logs)]
        out_PKMW = torch.empty(num_parts, num_kv_heads, heads_per_kv, value_size)
        lse_PKM = torch.empty(num_parts, num_kv_heads, heads_per_kv)
        if rounded_PKMW is not None:
            assert rounded_PKMW.shape == out_PKMW.shape and rounded_PKMW.is_contiguous(), rounded_PKMW.shape
        num_pieces = min(num_kv_heads, -(-PIECES_PER_THREAD * self._num_threads // num_parts))
        tensors = (queries, addresses, parts.token_P, parts.bounds, parts.places, out_PKMW, lse_PKM)
        work = _Work(
            *(tensor.data_ptr() for tensor in tensors),
            None if rounded_PKMW is None else rounded_PKMW.data_ptr(),
            num_parts,
            num_kv_heads,
            heads_per_kv,
            key_size,
            value_size,
            -(-num_kv_heads // num_pieces),
            0 if rounded_PKMW is None else _KINDS[rounded_PKMW.dtype],
            *kind,
            softcap or 0.0,
        )
        address = self._library.flexeval_begin(self._team, ctypes.byref(work))
        if address is None:
            raise MemoryError
        return Job(self, address, Partial(out_PKMW, lse_PKM), (tensors, logs, rounded_PKMW))

    def wait(self, job: int) -> float:
        """Seconds that the team took for a job, which is forgotten."""
        return float(self._library.flexeval_wait(self._team, job))

    def drain(self) -> None:
        """Wait until the team has done all it was given."""
        self._library.flexeval_drain(self._team)


def can_read(form: KVFormat) -> bool:
    """Whether logs of such a format are read here by the kernel, which this compiles at need."""
    return _reads(form) and _library() is not None


def build(num_threads: int, *, borrows: bool = False) -> HostKernel | None:
    """The kernel with so many threads; None where this machine cannot compile it.

    Args:
        num_threads: Of the team.
        borrows: Whether they are torch's and the caller's, as for a thread that has torch compute all the time: torch's
            threads spin for a while after each operation, and others would wait for their cores.
    """
    library = _library()
    return None if library is None else HostKernel(library, num_threads, borrows=borrows)


def _lent() -> ctypes.c_void_p | None:
    """What runs a function in the threads of torch's OpenMP runtime; None where that is none we know."""
    run = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if run is None else ctypes.cast(run, ctypes.c_void_p)


def _reads(form: KVFormat) -> bool:
    sizes = (form.shape.key_size, form.shape.value_size)
    return _Kind.of(form) is not None and all(size % _LANES == 0 and size <= _MAX_SIZE for size in sizes)


@cache
def _library() -> ctypes.CDLL | None:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        return None
    identity = hashlib.sha256(repr((SOURCE.read_bytes(), _FLAGS, _processor())).encode()).hexdigest()[:16]

    def compile_to(directory: Path) -> None:
        command = [*compiler.split(), *_FLAGS, "-o", str(directory / "host_kernel.so"), str(SOURCE), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)

    try:
        library = ctypes.CDLL(str(cached_directory("kernels", identity, compile_to) / "host_kernel.so"))
    except (OSError, subprocess.SubprocessError, FlexevalError):  # torch attends, if more slowly
        return None
    library.flexeval_gather.restype = ctypes.c_void_p
    library.flexeval_gather.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.flexeval_dismiss.argtypes = [ctypes.c_void_p]
    library.flexeval_begin.restype = ctypes.c_void_p
    library.flexeval_begin.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.flexeval_wait.restype = ctypes.c_double
    library.flexeval_wait.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.flexeval_drain.argtypes = [ctypes.c_void_p]
    return library


def _processor() -> str:
    """What code for this very processor is good for: caches may be shared by machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in text.splitlines() if line.startswith(("model name", "flags"))}))
