"""Overlap behind one word. A lane runs work beside the caller; a transfer hands the result back.

Two ordering rules, and no other synchronization anywhere in the engine:
  submit: the lane sees everything the caller had enqueued so far.
  wait:   the caller sees everything the lane enqueued for this transfer.
And one of courtesy: a lane whose copies are many gives way to others that share the link.

Knows threads and streams; not what is moved or why.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from flexeval.engine.stopwatch import Stopwatch

T = TypeVar("T")
K = TypeVar("K")


class _Outcome(NamedTuple, Generic[T]):
    value: T
    event: torch.cuda.Event | None


def _lend(value: object, stream: torch.cuda.Stream) -> None:
    """Keep CUDA memory alive until `stream` has used it: the allocator must not recycle it early.

    Tensors are found in tuples, lists and dicts, not in other objects.
    """
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and leaf.is_cuda:
            leaf.record_stream(stream)


class Transfer(Generic[T]):
    """A result in flight on a lane."""

    def __init__(self, future: Future[_Outcome[T]]):
        self._future = future

    def wait(self) -> T:
        """The result, once the host has enqueued it; the caller's stream waits for the copy, the host does not."""
        value, event = self._future.result()
        if event is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(event)
            _lend(value, stream)
        return value


class Lane(Protocol):
    """Runs work in the order it was submitted."""

    watch: Stopwatch
    """Seconds at work: of the lane's stream where it has one, else of the host."""

    def submit(self, work: Callable[..., T], *args: Any) -> Transfer[T]:
        """Start `work(*args)`; an exception surfaces at `wait`."""
        ...

    def give_way(self) -> None:
        """Let work of lanes that go first be done where it is ready; for the lane's own work, between two copies."""
        ...

    def close(self) -> None:
        """Finish what was submitted."""
        ...


class InlineLane:
    """No overlap: the same order of work on the caller's own thread. The reference of every test."""

    def __init__(self) -> None:
        self.watch = Stopwatch(torch.device("cpu"))

    def submit(self, work: Callable[..., T], *args: Any) -> Transfer[T]:
        """Run now."""
        done: Future[_Outcome[T]] = Future()
        try:
            with self.watch.running():
                done.set_result(_Outcome(work(*args), None))
        except Exception as error:
            done.set_exception(error)
        return Transfer(done)

    def give_way(self) -> None:
        """There is nobody beside it."""

    def close(self) -> None:
        """Nothing is ever left to do."""


class _UnderWay(NamedTuple):
    """Work that was enqueued on a lane's stream."""

    seen: torch.cuda.Event
    """It can begin once this has happened, ..."""
    done: torch.cuda.Event
    """... and has ended with this."""


class ThreadLane:
    """One worker thread and, on a GPU, one CUDA stream."""

    def __init__(self, name: str, device: torch.device, *, goes_behind: Sequence[ThreadLane] = ()):
        """A lane that gives way to those that it `goes_behind`.

        A GPU serves one stream's copies until it has none left, and only then another's: whoever always has copies in
        the link's queue keeps all others waiting. (NVIDIA H200, driver 580: KV of 10 ms stood 45 ms behind two layers'
        weights that had been cut into pieces.)
        """
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._goes_behind = goes_behind
        self._under_way: tuple[_UnderWay, ...] = ()  # replaced by the lane's own thread, read by others
        self.watch = Stopwatch(device)

    def submit(self, work: Callable[..., T], *args: Any) -> Transfer[T]:
        """Queue for the worker, behind what the caller has enqueued on its own stream."""
        seen = None
        if self._stream is not None:
            seen = torch.cuda.current_stream().record_event()
            _lend(args, self._stream)
        return Transfer(self._worker.submit(self._run, seen, work, args))

    def _run(self, seen: torch.cuda.Event | None, work: Callable[..., T], args: tuple[Any, ...]) -> _Outcome[T]:
        with torch.inference_mode(), torch.cuda.stream(self._stream) if self._stream else nullcontext():
            if seen is not None and self._stream is not None:
                self._stream.wait_event(seen)
            with self.watch.running():
                value = work(*args)
            event = None
            if seen is not None and self._stream is not None:
                event = torch.cuda.Event(blocking=True)
                event.record()
                left = (work for work in self._under_way if not work.done.query())
                self._under_way = (*left, _UnderWay(seen, event))
        return _Outcome(value, event)

    def give_way(self) -> None:
        """Wait for what is under way on lanes that go first, unless it waits for something itself."""
        for lane in self._goes_behind:
            for seen, done in lane._under_way:
                if seen.query():
                    done.synchronize()

    def close(self) -> None:
        """Wait for the worker to finish and end it."""
        self._worker.shutdown()


def drain(lane: Lane) -> None:
    """Wait until the lane has done what it was given; what failed of it is somebody else's to notice."""
    lane.submit(lambda: None).wait()


def ahead(lane: Lane, load: Callable[[K], T], keys: Iterable[K], *, depth: int = 1) -> Iterator[T]:
    """Yield `load(key)` for each key, with the next `depth` loads already in flight on `lane`."""
    in_flight: deque[Transfer[T]] = deque()
    for key in keys:
        in_flight.append(lane.submit(load, key))
        if len(in_flight) > depth:
            yield in_flight.popleft().wait()
    while in_flight:
        yield in_flight.popleft().wait()
