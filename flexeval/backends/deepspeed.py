"""DeepSpeed ZeRO-Inference as a backend: weights in page-locked host memory, gathered on the GPU layer by layer.

A peer to measure the engine against, set up as DeepSpeed's own example does (DeepSpeedExamples,
`inference/huggingface/zero_inference/run_model.py`). Needs the optional package `deepspeed` and a GPU.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

import torch

from flexeval.backends.batching import gpu_room, largest_batch, streamed_bytes
from flexeval.backends.offloaded import OffloadedBackend
from flexeval.config import format_size
from flexeval.errors import CapacityError, ConfigError
from flexeval.request import TokenRequest


class DeepSpeedBackend(OffloadedBackend):
    """A model under ZeRO stage 3 with its parameters on the CPU."""

    name = "deepspeed"

    def close(self) -> None:
        """Forget the model and leave the process group."""
        super().close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def _check(self) -> None:
        super()._check()
        check_gpu(self._device)
        if self._limits.cpu_bytes is not None and self._num_bytes > self._limits.cpu_bytes:
            what = f"deepspeed holds all weights ({format_size(self._num_bytes)}) in host memory"
            raise CapacityError(what, mend="Raise --cpu-memory")

    def _spread(self, asked: Sequence[TokenRequest]) -> int:
        """Move the parameters to page-locked host memory, one after another."""
        room = gpu_room(self._limits, self._device) - streamed_bytes(self._shape)
        size = self._batch_size or largest_batch(self._shape, asked, room)
        import deepspeed

        for module in self._model.modules():  # ZeRO moves parameters alone
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = buffer.to(self._device)
        _be_alone(self._device)
        deepspeed.init_distributed("nccl")
        config = zero_config(self._shape.hidden_size, self._model.dtype)
        deepspeed.zero.Init(module=self._model, config_dict_or_path=config)  # else it went to the GPU whole first
        deepspeed.initialize(model=self._model, config=config)[0].module.eval()
        return size


def check_gpu(device: torch.device) -> None:
    """Raise `ConfigError` where there is no GPU to compute on."""
    if device.type != "cuda":
        raise ConfigError("the peer deepspeed needs a GPU", where="--peer", mend="Leave it out")


def zero_config(hidden_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """ZeRO-Inference's configuration, with the sizes of DeepSpeed's example."""
    return {
        "fp16": {"enabled": dtype == torch.float16},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 2 * hidden_size * hidden_size,
            "stage3_param_persistence_threshold": hidden_size,
            "stage3_max_live_parameters": 2 * hidden_size * hidden_size,
            "offload_param": {"device": "cpu", "pin_memory": True},
        },
        "train_micro_batch_size_per_gpu": 1,  # must be there, and means nothing in inference
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    }


def _be_alone(device: torch.device) -> None:
    """Tell torch.distributed that this process is all there is, unless a launcher has said otherwise."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": str(device.index),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }.items():
        os.environ.setdefault(name, value)
