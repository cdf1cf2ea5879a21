"""Hugging Face Accelerate as a backend: whole modules offloaded to host memory and disk, brought in where they run.

A peer to measure the engine against. Knows Accelerate's device map; weights are never compressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate import dispatch_model, infer_auto_device_map

from flexeval.backends.batching import batch_bytes, gpu_room, largest_batch, streamed_bytes
from flexeval.backends.offloaded import OffloadedBackend
from flexeval.config import format_size
from flexeval.errors import CapacityError
from flexeval.policy.memory import free_host_bytes
from flexeval.request import TokenRequest


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
        """Dispatch the modules.

        On a GPU what a batch needs comes first: more sequences a pass matter more than weights that stay.
        """
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self._model.parameters())
        is_on_gpu = self._device.type == "cuda"
        streamed = streamed_bytes(self._shape)
        cpu_bytes = self._limits.cpu_bytes
        if is_on_gpu:
            room = gpu_room(self._limits, self._device)
        else:
            room = free_host_bytes() if cpu_bytes is None else cpu_bytes - min(num_bytes, cpu_bytes - streamed)
        size = self._batch_size or largest_batch(self._shape, asked, room - (streamed if is_on_gpu else 0))
        batch = batch_bytes(self._shape, asked, size)
        # The weights are in host memory already: what is free is beside them.
        weights_room = num_bytes + free_host_bytes() if cpu_bytes is None else cpu_bytes
        max_memory: dict[int | str, int] = {"cpu": weights_room if is_on_gpu else max(0, weights_room - batch)}
        if is_on_gpu:
            max_memory[self._device.index] = max(0, room - batch)
        device_map = infer_auto_device_map(
            self._model,
            max_memory=max_memory,
            no_split_module_classes=list(self._model._no_split_modules or []),
            dtype=self._model.dtype,
            clean_result=False,  # {"": "disk"}, the whole model at once, could not be dispatched
        )
        if "disk" in device_map.values():
            self._folder = self._make_folder(num_bytes)
        folder = None if self._folder is None else self._folder.name
        dispatch_model(self._model, device_map, offload_dir=folder, skip_keys=self._model._skip_keys_device_placement)
        return size

    def _make_folder(self, num_bytes: int) -> TemporaryDirectory[str]:
        """A folder for weights that fit nowhere else. Raises `CapacityError`."""
        folder = self._limits.disk_dir
        if folder is None:
            what = f"accelerate has no room for weights of {format_size(num_bytes)}"
            raise CapacityError(what, mend="Raise --cpu-memory, or name a folder with --disk")
        folder.mkdir(parents=True, exist_ok=True)
        return TemporaryDirectory(prefix="accelerate-", dir=folder)

    def _peak_bytes(self) -> dict[str, int]:
        peak = super()._peak_bytes()
        if self._folder is not None:
            peak["disk"] = sum(path.stat().st_size for path in Path(self._folder.name).rglob("*") if path.is_file())
        return peak
