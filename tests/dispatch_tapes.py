"""Tapes for the CPU: operations are recorded as torch dispatches them, and done again on the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _storages(values: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}


class DispatchTape(TorchDispatchMode):
    """What `CudaTape` does for a stream."""

    def __init__(self, tapes: DispatchTapes):
        super().__init__()
        self._tapes = tapes
        self._steps: list[tuple[Any, Any, dict[str, Any], list[torch.Tensor]]] = []
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self._before.append((args[0], args[0].clone()))
        out = func(*args, **(kwargs or {}))
        fresh = [leaf for leaf in tree_leaves(out) if not _storages(leaf) & _storages((args, kwargs))]
        if fresh or func._schema.is_mutable:  # otherwise a view, which sees what changes under it
            self._steps.append((func, args, kwargs or {}, fresh))
        return out

    def begin(self) -> None:
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)
        for tensor, value in reversed(self._before):  # a GPU does nothing yet
            tensor.copy_(value)

    def replay(self) -> None:
        self._tapes.num_replays += 1
        for func, args, kwargs, fresh in self._steps:
            again = tree_leaves(func(*args, **kwargs))
            for old, new in zip(fresh, again, strict=False):
                old.copy_(new)


class DispatchTapes:
    """What `CudaTapes` does for a GPU; `waiting` is what it says of every layer."""

    def __init__(self, waiting: tuple[str, ...] = ()):
        self.num_replays = 0
        self.num_tapes = 0
        self._waiting = waiting

    def new(self) -> DispatchTape:
        self.num_tapes += 1
        return DispatchTape(self)

    @contextmanager
    def recording(self) -> Iterator[None]:
        yield

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        found: list[str] = []
        yield found
        found += self._waiting


def let_torch_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tapes hear of torch's operations, and of nothing that is compiled for a CPU."""
    monkeypatch.setattr("flexeval.engine.compute.host_unpack.unpack", lambda *_, **__: False)
    monkeypatch.setattr("flexeval.engine.compute.fusion.has_passes", lambda: False)
    monkeypatch.setattr("flexeval.engine.compute.few_tokens.has_tiles", lambda: False)
    monkeypatch.setattr("flexeval.engine.compute.few_tokens.has_products", lambda: False)
