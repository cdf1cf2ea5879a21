"""Hugging Face Accelerate as a backend: whole modules offloaded to host memory and disk, brought in where they run.

A peer to measure the engine against. Knows Accelerate's device map; weights are never compressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from accelerate import dispatch_model, infer_auto_device_map
from transformers import PreTrainedModel

from flexeval.backends.batching import batch_bytes, gpu_room, largest_batch, streamed_bytes
from flexeval.backends.offloaded import OffloadedBackend
from flexeval.config import format_size
from flexeval.errors import CapacityError
from flexeval.policy.memory import free_host_bytes
from flexeval.request import TokenRequest


class Share(NamedTuple):
    """What a batch and weights get of the memory."""

    batch_size: int
    """Sequences computed together."""
    max_memory: dict[int | str, int]
    """Bytes for weights by device, as Accelerate wants them."""


class AccelerateBackend(OffloadedBackend):
    """A model dispatched by a device map."""

    name = "accelerate"
    _folder: TemporaryDirectory[str] | None = None

    def close(self) -> None:
        """Forget the model and delete what it has on disk."""
        super().close()
        if self._folder is not None:
            self._folder.cleanup()

    def _spread(self, asked: Sequence[TokenRequest]) -> int:
        """Dispatch the modules: what a batch needs comes first, for more sequences a pass matter more than weights."""
        if self._device.type == "cuda":
            size, max_memory = self._share_gpu(asked)
        else:
            size, max_memory = self._share_host(asked)
        device_map = map_modules(self._model, max_memory)
        if "disk" in device_map.values():
            self._folder = self._make_folder()
        folder = None if self._folder is None else self._folder.name
        dispatch_model(self._model, device_map, offload_dir=folder, skip_keys=self._model._skip_keys_device_placement)
        return size

    def _share_gpu(self, asked: Sequence[TokenRequest]) -> Share:
        room, streamed = gpu_room(self._limits, self._device), streamed_bytes(self._shape)
        size = self._batch_size or largest_batch(self._shape, asked, room - streamed)
        batch = batch_bytes(self._shape, asked, min(size, len(asked)))
        # A batch that was asked for may be too large: it becomes smaller when it runs out of memory, not before.
        return Share(size, {self._device.index: max(streamed, room - batch), "cpu": self._weights_room()})

    def _share_host(self, asked: Sequence[TokenRequest]) -> Share:
        cpu_bytes, streamed = self._limits.cpu_bytes, streamed_bytes(self._shape)
        room = free_host_bytes() if cpu_bytes is None else cpu_bytes - min(self._num_bytes, cpu_bytes - streamed)
        size = self._batch_size or largest_batch(self._shape, asked, room)
        batch = batch_bytes(self._shape, asked, min(size, len(asked)))
        return Share(size, {"cpu": max(0, self._weights_room() - batch)})

    def _weights_room(self) -> int:
        """Host memory that weights may take; they are there already: what is free is beside them."""
        cpu_bytes = self._limits.cpu_bytes
        return self._num_bytes + free_host_bytes() if cpu_bytes is None else cpu_bytes

    def _make_folder(self) -> TemporaryDirectory[str]:
        """A folder for weights that fit nowhere else. Raises `CapacityError`."""
        folder = self._limits.disk_dir
        if folder is None:
            what = f"accelerate has no room for weights of {format_size(self._num_bytes)}"
            raise CapacityError(what, mend="Raise --cpu-memory, or name a folder with --disk")
        folder.mkdir(parents=True, exist_ok=True)
        return TemporaryDirectory(prefix="accelerate-", dir=folder)

    def _peak_bytes(self) -> dict[str, int]:
        peak = super()._peak_bytes()
        if self._folder is not None:
            peak["disk"] = sum(path.stat().st_size for path in Path(self._folder.name).rglob("*") if path.is_file())
        return peak


def map_modules(model: PreTrainedModel, max_memory: dict[int | str, int]) -> dict[str, int | str]:
    """The device of each module, GPUs first; what is brought to a GPU has room there for the largest layer."""
    device_map: dict[str, int | str] = infer_auto_device_map(
        model,
        max_memory=max_memory,
        no_split_module_classes=list(model._no_split_modules or []),
        dtype=model.dtype,
        clean_result=False,  # {"": "disk"}, the whole model at once, could not be dispatched
    )
    return device_map
