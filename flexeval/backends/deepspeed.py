"""DeepSpeed ZeRO-Inference as a backend: weights in page-locked host memory, gathered on the GPU layer by layer.

A peer to measure the engine against, set up as DeepSpeed's own example does (DeepSpeedExamples,
`inference/huggingface/zero_inference/run_model.py`). Needs the optional package `deepspeed` and a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from flexeval.backends.backend import OnCompletions, Usage
from flexeval.backends.batching import gpu_room, largest_batch, streamed_bytes
from flexeval.backends.generation import Generator
from flexeval.backends.loading import open_model
from flexeval.backends.transformers import load_whole
from flexeval.config import Limits, format_size
from flexeval.engine.sizes import model_shape
from flexeval.errors import CapacityError, ConfigError
from flexeval.models import ModelSource
from flexeval.request import Completion, Request


class DeepSpeedBackend:
    """A model under ZeRO stage 3 with its parameters on the CPU; its KV cache stays on the GPU."""

    name = "deepspeed"

    def __init__(
        self,
        model: str | ModelSource,
        *,
        device: str = "auto",
        dtype: str = "auto",
        limits: Limits | None = None,
        batch_size: int | None = None,
    ):
        """Load and partition the model.

        Args:
            model: As for `Engine.load`.
            device: As for `Engine.load`.
            dtype: As for `Engine.load`.
            limits: Room on each tier.
            batch_size: Sequences computed together; None is the largest power of two that fits.

        Raises:
            ConfigError: The package or a GPU is missing.
            CapacityError: The weights do not fit in host memory.
            FlexevalError: The model cannot be used.
        """
        check_installed()
        start = time.perf_counter()
        opened = open_model(model, setting="none", device=device, dtype=dtype)
        if opened.device.type != "cuda":
            raise ConfigError("the peer deepspeed needs a GPU", where="--peer", mend="Leave it out")
        self.text = opened.text
        self._device = opened.device
        self._limits = limits or Limits()
        self._batch_size = batch_size
        self._shape = model_shape(opened.anatomy, None, opened.device)
        self._module = self._partition(load_whole(opened, attention=None))
        self._generator: Generator | None = None
        self._load_s = time.perf_counter() - start

    def place(self, requests: Sequence[Request]) -> Generator:
        """Choose a batch size for these requests; `generate` does so by itself.

        Raises:
            RequestError: A request cannot be answered as asked.
            CapacityError: Not even one fits.
        """
        if self._generator is None:
            asked = [part for request in requests for part in self.text.to_token_requests(request)]
            room = gpu_room(self._limits, self._device) - streamed_bytes(self._shape)
            size = self._batch_size or largest_batch(self._shape, asked, room)
            self._generator = Generator(self._module, self.text, device=self._device, batch_size=size)
        return self._generator

    def generate(
        self, requests: Sequence[Request], *, on_completions: OnCompletions = lambda completions: None
    ) -> list[Completion]:
        """Answer the requests. Raises `RequestError` before anything is computed, and `CapacityError`."""
        return self.place(requests).generate(requests, on_completions=on_completions) if requests else []

    def usage(self) -> Usage:
        """What was used so far; host memory is not measured."""
        assert self._generator is not None, "nothing was placed"
        return self._generator.usage(self._load_s, {"gpu": torch.cuda.max_memory_allocated(self._device)})

    def close(self) -> None:
        """Forget the model and leave the process group."""
        self._generator = None
        del self._module
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def _partition(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with its parameters in page-locked host memory."""
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        if self._limits.cpu_bytes is not None and num_bytes > self._limits.cpu_bytes:
            what = f"deepspeed holds all weights ({format_size(num_bytes)}) in host memory"
            raise CapacityError(what, mend="Raise --cpu-memory")
        import deepspeed

        for module in model.modules():  # ZeRO moves parameters alone
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = buffer.to(self._device)
        _be_alone(self._device)
        deepspeed.init_distributed("nccl")
        config = zero_config(self._shape.hidden_size, model.dtype)
        deepspeed.zero.Init(module=model, config_dict_or_path=config)  # else `initialize` takes it to the GPU whole
        engine: Any = deepspeed.initialize(model=model, config=config)[0]
        return engine.module.eval()  # type: ignore[no-any-return]


def check_installed() -> None:
    """Raise `ConfigError` where the package is missing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "the peer deepspeed is not installed", where="--peer", mend="Run pip install 'flexeval[deepspeed]'"
        )


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
