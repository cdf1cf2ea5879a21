"""Whether a GGUF file's header fits the file. Knows the form (ggml, docs/gguf.md); not what any of it means.

The reader that everybody uses believes every length: an array that is said to have 2^60 numbers is read past the
file's end until memory is full.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_NUM_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Of numbers, by type."""
_MOST_ITEMS = 2**22
"""Of all arrays together; a vocabulary of 262,144 tokens, with scores, types and merges, comes to a third of it."""
_MOST_DIMENSIONS = 4
_MOST_ELEMENTS = 2**44
"""Of a tensor."""


def check_header(path: Path) -> None:
    """Raise `ValueError` for a header that goes on past the file's end, or tells of more than any model has."""
    with path.open("rb") as file:
        if path.stat().st_size < len(_MAGIC):
            raise ValueError("it is too short")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(data).header()


class _Walk:
    def __init__(self, data: mmap.mmap):
        self._data = data
        self._place = 0
        self._num_items = 0

    def header(self) -> None:
        if self._data[: len(_MAGIC)] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._place = len(_MAGIC)
        if (version := self._number("<I")) not in _VERSIONS:
            raise ValueError(f"its version is {version}, or its byte order another one")
        num_tensors, num_values = self._number("<Q"), self._number("<Q")
        for _ in range(num_values):
            self._skip(self._number("<Q"))
            self._value(self._number("<I"))
        for _ in range(num_tensors):
            self._tensor()

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._skip(self._number("<Q"))
        elif kind == _ARRAY:
            inner, num = self._number("<I"), self._number("<Q")
            self._num_items += num
            if self._num_items > _MOST_ITEMS:
                raise ValueError(f"its arrays have more than {_MOST_ITEMS} items")
            if inner == _STRING:
                for _ in range(num):
                    self._value(inner)
            else:
                self._skip(num * self._bytes_of(inner))
        else:
            self._skip(self._bytes_of(kind))

    def _tensor(self) -> None:
        self._skip(self._number("<Q"))
        num_dimensions = self._number("<I")
        if num_dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {num_dimensions} dimensions")
        shape = [self._number("<Q") for _ in range(num_dimensions)]
        if math.prod(shape) > _MOST_ELEMENTS:
            raise ValueError(f"a tensor has the shape {shape}")
        self._skip(4 + 8)  # type and place

    @staticmethod
    def _bytes_of(kind: int) -> int:
        if kind not in _NUM_BYTES:
            raise ValueError(f"it holds a value of the unknown type {kind}")
        return _NUM_BYTES[kind]

    def _number(self, form: str) -> int:
        start = self._place
        self._skip(struct.calcsize(form))
        return int(struct.unpack_from(form, self._data, start)[0])

    def _skip(self, num_bytes: int) -> None:
        if num_bytes > len(self._data) - self._place:
            raise ValueError("it is cut short, or a length in its header is wrong")
        self._place += num_bytes
