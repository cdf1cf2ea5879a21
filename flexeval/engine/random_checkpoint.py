"""Weights made up at random, to measure speed without a model. Knows shapes; not where the weights will rest."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from flexeval.engine.checkpoint import Checkpoint
from flexeval.engine.compute.anatomy import Anatomy


class RandomCheckpoint(Checkpoint):
    """Random weights of the right shapes: normal with deviation 0.02 for matrices, 1 for scales, 0 for biases.

    One block of random numbers is drawn once and laid end to end through each tensor, from a place that depends on the
    tensor's name: a 175B model's weights take minutes rather than hours, and each is the same whenever it is read. The
    block's length is prime, so that no two rows of a matrix are alike.
    """

    _BLOCK = 16_777_213

    def __init__(self, anatomy: Anatomy, *, seed: int = 0):
        self._anatomy = anatomy
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._blocks = {torch.float32: torch.randn(self._BLOCK, generator=generator).mul_(0.02)}
        self.identity = f"random weights, second kind, seed {seed}"

    def layer(self, layer: int) -> dict[str, Tensor]:
        """Random tensors for a layer."""
        specs = self._anatomy.layer_specs(layer)
        return {spec.name: self._fill(f"{layer}.{spec.name}", spec.shape, spec.dtype) for spec in specs}

    def rest(self) -> Mapping[str, Tensor]:
        """Random tensors for embedding, norms and head; tied ones share memory, as in the model."""
        tied: dict[int, Tensor] = {}
        tensors = {}
        for name, tensor in self._anatomy.model.state_dict(keep_vars=True).items():
            if id(tensor) not in tied:
                tied[id(tensor)] = self._fill(name, tuple(tensor.shape), tensor.dtype)
            tensors[name] = tied[id(tensor)]
        return tensors

    def _fill(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if len(shape) < 2:
            return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=dtype)
        if dtype not in self._blocks:
            self._blocks[dtype] = self._blocks[torch.float32].to(dtype)
        block, out = self._blocks[dtype], torch.empty(shape, dtype=dtype)
        flat, start = out.view(-1), zlib.crc32(f"{self._seed} {name}".encode()) % self._BLOCK
        while flat.numel():
            part = block[start : start + flat.numel()]
            flat[: part.numel()] = part
            flat, start = flat[part.numel() :], 0
        return out
