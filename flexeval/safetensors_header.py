"""What a safetensors file says it holds, held against the file. Knows the form; no tensor, no layer.

Files are read, never looked at through a memory map: where a file is cut short under a map, or its disk fails, the
whole process is killed (SIGBUS) instead of told.
The form: https://huggingface.co/docs/safetensors. What is refused here is what the safetensors package refuses.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from flexeval.typed import show

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000
_METADATA = "__metadata__"
_MOST_DIMENSIONS = 64
_KEYS = {"dtype", "shape", "data_offsets"}
NUM_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Of a number, by type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """Where a tensor lies in its file."""

    dtype: str
    """As the file names it: `BF16`."""
    shape: tuple[int, ...]
    """Numbers along each dimension."""
    offset: int
    """First byte, from the file's beginning."""
    num_bytes: int
    """How many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A file's header."""

    tensors: dict[str, TensorPlace]
    """By name; together they are all that follows the header."""
    metadata: dict[str, str]
    """Texts beside them."""


def read_header(path: Path) -> Header:
    """Read and check it. Raises `OSError`, and `ValueError` for a header that does not fit the file."""
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        num_bytes = int.from_bytes(_next_bytes(file, _LENGTH_BYTES), "little")
        if num_bytes > min(_MOST_HEADER_BYTES, file_bytes - _LENGTH_BYTES):
            raise ValueError(f"its header has {num_bytes} bytes, the file {file_bytes}")
        text = _next_bytes(file, num_bytes)
    try:
        data = json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(data, dict):
        raise ValueError(f"its header is {show(data)}, not an object")
    metadata = data.pop(_METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"{_METADATA} holds what is no text")
    begin = _LENGTH_BYTES + num_bytes
    tensors = {name: _place(name, told, begin) for name, told in data.items()}
    _check_cover(tensors, begin, file_bytes)
    return Header(tensors=tensors, metadata=metadata)


def _next_bytes(file: BinaryIO, num_bytes: int) -> bytes:
    if len(found := file.read(num_bytes)) < num_bytes:
        raise ValueError(f"the file ends before byte {file.tell() - len(found) + num_bytes}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header names something twice")
    return found


def _place(name: str, told: object, begin: int) -> TensorPlace:
    if not isinstance(told, dict) or not told.keys() >= _KEYS:
        raise ValueError(f"{show(name)} is {show(told)}, not a tensor")
    dtype, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    if not isinstance(dtype, str) or dtype not in NUM_BITS:
        raise ValueError(f"{show(name)} is of type {show(dtype)}, which is unknown")
    if not _are_counts(shape, _MOST_DIMENSIONS) or not _are_counts(offsets, 2) or len(offsets) != 2:
        raise ValueError(f"{show(name)} has a shape or a place that is none")
    if math.prod(shape) * NUM_BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{show(name)} is {offsets[1] - offsets[0]} bytes long, which is not what its shape takes")
    return TensorPlace(dtype=dtype, shape=tuple(shape), offset=begin + offsets[0], num_bytes=offsets[1] - offsets[0])


def _are_counts(values: object, most: int) -> bool:
    if not isinstance(values, list) or len(values) > most:
        return False
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_cover(tensors: dict[str, TensorPlace], begin: int, end: int) -> None:
    """Raise `ValueError` unless the tensors lie one behind the other, up to the file's end."""
    place = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset != place:
            raise ValueError(f"{show(name)} begins at byte {tensor.offset}, what is before it ends at {place}")
        place += tensor.num_bytes
    if place != end:
        raise ValueError(f"its tensors end at byte {place}, the file at {end}")
