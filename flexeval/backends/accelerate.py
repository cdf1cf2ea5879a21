"""Hugging Face Accelerate as a backend: whole modules offloaded to host memory and disk, brought in where they run.

A peer to measure the engine against. Knows Accelerate's device map; weights are never compressed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import dispatch_model, infer_auto_device_map

from flexeval.backends.backend import OnCompletions, Usage
from flexeval.backends.batching import batch_bytes, gpu_room, largest_batch, streamed_bytes
from flexeval.backends.generation import Generator
from flexeval.backends.loading import open_model
from flexeval.backends.transformers import load_whole
from flexeval.config import Limits, format_size
from flexeval.engine.sizes import model_shape
from flexeval.errors import CapacityError
from flexeval.models import ModelSource
from flexeval.policy.memory import free_host_bytes
from flexeval.request import Completion, Request


class AccelerateBackend:
    """A model dispatched by a device map; its KV cache stays on the compute device."""

    name = "accelerate"

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
            batch_size: Sequences computed together; None is the largest power of two that fits.

        Raises:
            FlexevalError: The model cannot be used.
        """
        start = time.perf_counter()
        opened = open_model(model, setting="none", device=device, dtype=dtype)
        self.text = opened.text
        self._device = opened.device
        self._limits = limits or Limits()
        self._batch_size = batch_size
        self._shape = model_shape(opened.anatomy, None, opened.device)
        self._model = load_whole(opened, attention=None)
        self._num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self._model.parameters())
        self._folder: TemporaryDirectory[str] | None = None
        self._generator: Generator | None = None
        self._load_s = time.perf_counter() - start

    def place(self, requests: Sequence[Request]) -> Generator:
        """Choose a batch size for these requests and spread the modules over the tiers; `generate` does so by itself.

        On a GPU what a batch needs comes first: more sequences a pass matter more than weights that stay.

        Raises:
            RequestError: A request cannot be answered as asked.
            CapacityError: The model does not fit.
        """
        if self._generator is not None:
            return self._generator
        start = time.perf_counter()
        asked = [part for request in requests for part in self.text.to_token_requests(request)]
        is_on_gpu = self._device.type == "cuda"
        streamed = streamed_bytes(self._shape)
        cpu_bytes = self._limits.cpu_bytes
        if is_on_gpu:
            room = gpu_room(self._limits, self._device)
        else:
            room = free_host_bytes() if cpu_bytes is None else cpu_bytes - min(self._num_bytes, cpu_bytes - streamed)
        size = self._batch_size or largest_batch(self._shape, asked, room - (streamed if is_on_gpu else 0))
        batch = batch_bytes(self._shape, asked, size)
        # The weights are in host memory already: what is free is beside them.
        weights_room = self._num_bytes + free_host_bytes() if cpu_bytes is None else cpu_bytes
        max_memory: dict[int | str, int] = {"cpu": weights_room if is_on_gpu else max(0, weights_room - batch)}
        if is_on_gpu:
            max_memory[self._device.index] = max(0, room - batch)
        self._dispatch(max_memory)
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
        peak = {}
        if self._folder is not None:
            peak["disk"] = sum(path.stat().st_size for path in Path(self._folder.name).rglob("*") if path.is_file())
        if self._device.type == "cuda":
            peak["gpu"] = torch.cuda.max_memory_allocated(self._device)
        assert self._generator is not None, "nothing was placed"
        return self._generator.usage(self._load_s, peak)

    def close(self) -> None:
        """Forget the model and delete what it has on disk."""
        self._generator = None
        del self._model
        if self._folder is not None:
            self._folder.cleanup()

    def _dispatch(self, max_memory: dict[int | str, int]) -> None:
        device_map = infer_auto_device_map(
            self._model,
            max_memory=max_memory,
            no_split_module_classes=list(self._model._no_split_modules or []),
            dtype=self._model.dtype,
            clean_result=False,  # {"": "disk"}, the whole model at once, could not be dispatched
        )
        if "disk" in device_map.values():
            if self._limits.disk_dir is None:
                raise CapacityError(
                    f"accelerate has no room for weights of {format_size(self._num_bytes)}",
                    mend="Raise --cpu-memory, or name a folder with --disk",
                )
            self._limits.disk_dir.mkdir(parents=True, exist_ok=True)
            self._folder = TemporaryDirectory(prefix="accelerate-", dir=self._limits.disk_dir)
        folder = None if self._folder is None else self._folder.name
        dispatch_model(self._model, device_map, offload_dir=folder, skip_keys=self._model._skip_keys_device_placement)
