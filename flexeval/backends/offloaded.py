"""What the peers that offload share: transformers' whole model, spread over memory once the requests are known.

Knows how large a batch may be; how weights are spread, and brought to where they are needed, is each library's.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from flexeval.backends.backend import OnCompletions, Usage
from flexeval.backends.generation import Generator
from flexeval.backends.loading import open_model
from flexeval.backends.transformers import load_whole
from flexeval.config import Limits, format_size
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.sizes import model_shape
from flexeval.errors import CapacityError
from flexeval.models import ModelSource
from flexeval.policy.memory import free_host_bytes
from flexeval.request import Completion, Request, TokenRequest


class OffloadedBackend(ABC):
    """A model whose weights a library spreads over the tiers; its KV cache stays where it is computed."""

    name: str

    def __init__(
        self,
        model: str | ModelSource,
        *,
        device: str = "auto",
        dtype: str = "auto",
        limits: Limits | None = None,
        batch_size: int | None = None,
    ):
        """Load the model into host memory; requests decide where it goes.

        Args:
            model: As for `Engine.load`.
            device: As for `Engine.load`.
            dtype: As for `Engine.load`.
            limits: Room on each tier.
            batch_size: Sequences computed together; None is as many as fit.

        Raises:
            FlexevalError: The model cannot be used, or this peer cannot run here.
        """
        start = time.perf_counter()
        opened = open_model(model, setting="none", device=device, dtype=dtype)
        self.text = opened.text
        self._device = opened.device
        self._limits = limits or Limits()
        self._batch_size = batch_size
        self._shape = model_shape(opened.anatomy, None, opened.device)
        self._num_bytes = _weight_bytes(opened.anatomy)
        self._check()
        self._model = load_whole(opened, attention=None)
        self._generator: Generator | None = None
        self._load_s = time.perf_counter() - start

    def place(self, requests: Sequence[Request]) -> Generator:
        """Choose a batch size for these requests and spread the weights; `generate` does so by itself.

        Raises:
            RequestError: A request cannot be answered as asked.
            CapacityError: The model, or one sequence, does not fit.
        """
        if self._generator is None:
            start = time.perf_counter()
            size = self._spread([part for request in requests for part in self.text.to_token_requests(request)])
            self._generator = Generator(self._model, self.text, device=self._device, batch_size=size)
            self._load_s += time.perf_counter() - start
        return self._generator

    def generate(
        self, requests: Sequence[Request], *, on_completions: OnCompletions = lambda completions: None
    ) -> list[Completion]:
        """Answer the requests. Raises `RequestError` before anything is computed, and `CapacityError`."""
        return self.place(requests).generate(requests, on_completions=on_completions) if requests else []

    def usage(self) -> Usage:
        """What was used so far; host memory is not measured."""
        assert self._generator is not None, "nothing was placed"
        return self._generator.usage(self._load_s, self._peak_bytes())

    def close(self) -> None:
        """Forget the model."""
        self._generator = None
        del self._model

    def _check(self) -> None:
        """Raise `FlexevalError` where this peer cannot run, before any weight is loaded."""
        free = free_host_bytes()
        if self._num_bytes > free:
            what = f"{self.name} loads all weights ({format_size(self._num_bytes)}) into host memory"
            raise CapacityError(f"{what}, of which {format_size(free)} is free", mend="Choose a smaller model")

    @abstractmethod
    def _spread(self, asked: Sequence[TokenRequest]) -> int:
        """Spread the weights; return how many sequences are to be computed together. Raises `CapacityError`."""

    def _peak_bytes(self) -> dict[str, int]:
        """The largest use of each tier that can be told."""
        return {"gpu": torch.cuda.max_memory_allocated(self._device)} if self._device.type == "cuda" else {}


def _weight_bytes(anatomy: Anatomy) -> int:
    """Bytes of all weights; tied tensors count once."""
    specs = [spec for layer in range(anatomy.num_layers) for spec in anatomy.layer_specs(layer)]
    return anatomy.resident_bytes(None) + sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)
