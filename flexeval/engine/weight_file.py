"""Tensors in safetensors files, each read when it is asked for. Knows files and torch's types; not whose they are."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from flexeval.directio import CHUNK_BYTES
from flexeval.engine.memory.chunks import bytes_of
from flexeval.safetensors_header import TensorPlace

_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class FileTensor:
    """A tensor that is still in its file: what transformers' loader takes for a slice of safetensors' own."""

    def __init__(self, path: Path, place: TensorPlace):
        self._path = path
        self._place = place
        self.problem: str | None = None
        """Why it could not be read: the loader keeps to itself what went wrong."""

    def get_dtype(self) -> str:
        """Its type, as the file names it."""
        return self._place.dtype

    def get_shape(self) -> list[int]:
        """Numbers along each dimension."""
        return list(self._place.shape)

    def __getitem__(self, part: object) -> Tensor:
        """Read it all into memory of its own, and take a part. Raises `OSError`; `ValueError` for a strange type."""
        try:
            return self._read()[part]  # type: ignore[index]
        except OSError as error:
            self.problem = f"{self._path.name} cannot be read: {error.strerror}"
            raise

    def _read(self) -> Tensor:
        if (dtype := _TYPES.get(self._place.dtype)) is None:
            raise ValueError(f"numbers of type {self._place.dtype} are not read")
        data = torch.empty(self._place.num_bytes, dtype=torch.uint8)
        file = os.open(self._path, os.O_RDONLY)
        try:
            offset = self._place.offset
            for chunk in data.split(CHUNK_BYTES):
                left = bytes_of(chunk)
                while left:
                    if (num_read := os.preadv(file, [left], offset)) == 0:
                        raise OSError(None, "it was cut short while it was in use")
                    left, offset = left[num_read:], offset + num_read
        finally:
            os.close(file)
        return data.view(dtype).reshape(self._place.shape)
