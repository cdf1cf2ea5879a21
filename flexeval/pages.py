"""What the pages of a Parquet file say that they unpack to, before anything unpacks them.

A file's metadata tells the sizes of columns, but a reader believes each page's own header, which can name 2 GiB behind
a few bytes. So metadata and headers are read here first (Thrift's compact protocol; parquet-format, `parquet.thrift`),
as strictly as the few forms need that common writers use. Arrow's own view of the metadata ends the process where some
of it contradicts itself. Knows no type of a column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flexeval.config import format_size

_MAGIC = b"PAR1"
_FOOTER_BYTES = 4 * 2**20
"""At most: a column of a row group takes about 150."""
_ROW_GROUPS, _COLUMNS, _META, _PATH = 4, 1, 3, 3
_NUM_COLUMN_VALUES, _COLUMN_BYTES, _DATA_OFFSET, _DICTIONARY_OFFSET = 5, 7, 9, 11

_TYPE, _UNPACKED_BYTES, _PACKED_BYTES = 1, 2, 3
_DICTIONARY = 2
_HEADERS = {0: 5, _DICTIONARY: 7, 3: 8}
"""Of data pages, dictionary pages and data pages of the second version: the field with what else there is to know."""
_ENCODING = {5: 2, 7: 2, 8: 4}
_NUM_VALUES = 1
_ENCODINGS = {0: "PLAIN", 2: "PLAIN_DICTIONARY", 3: "RLE", 8: "RLE_DICTIONARY"}
"""Those that need no more room than a page and its dictionary take."""
_HEADER_BYTES = 64 * 2**10
"""At most; and no page is counted as less, or a file could have millions of them."""
_VALUE_BYTES = 4
"""Every value is counted as so much at least: equal ones may take no room in a page."""
_LAST_FIELD = 64
_DEEPEST = 12


def check_pages(path: Path, names: Sequence[str] | None, limit: int) -> None:
    """Raise `ValueError` unless the pages of columns lie side by side and unpack to `limit` bytes at most.

    Args:
        path: The file.
        names: Of top-level columns that are to be read; None for all.
        limit: In bytes, over all of them together.
    """
    room, size = limit, path.stat().st_size
    with path.open("rb") as file:
        for column in _columns(file, size):
            is_wanted = names is None or column.name in names
            if not is_wanted or column.num_values == 0:  # then no page is read
                continue
            start, num_values = column.start, 0
            end = start + column.num_bytes
            if not len(_MAGIC) <= start <= end <= size:
                raise ValueError("a column lies outside of it")
            while start < end:
                file.seek(start)
                page = _read_page(file.read(min(_HEADER_BYTES, end - start)))
                start += page.num_bytes
                num_values += page.num_values
                room -= max(page.num_unpacked_bytes, _HEADER_BYTES)
                if room < 0 or num_values > limit // _VALUE_BYTES:
                    raise ValueError(f"it unpacks to more than {format_size(limit)}, too much for its length")
            if start != end or num_values != column.num_values:
                raise ValueError("its pages are not what its metadata says")


class _Column(NamedTuple):
    """A column's part of a row group."""

    name: str
    """Of the top-level column it belongs to."""
    start: int
    """Of its first page."""
    num_bytes: int
    num_values: int


def _columns(file: BinaryIO, size: int) -> Iterator[_Column]:
    """All columns of all row groups, as the metadata at the file's end tells them."""
    file.seek(max(0, size - 8))
    tail = file.read(8)
    num_bytes = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or not 0 < num_bytes <= min(_FOOTER_BYTES, size - 8):
        raise ValueError("it does not end as a Parquet file does")
    file.seek(size - 8 - num_bytes)
    footer = _Reader(file.read(num_bytes)).struct()
    for group in _structs(footer, _ROW_GROUPS):
        for chunk in _structs(group, _COLUMNS):
            meta = chunk.get(_META)
            if not isinstance(meta, dict):
                raise ValueError("a column has no metadata")
            names = meta.get(_PATH)
            if not isinstance(names, list) or not names or not isinstance(names[0], bytes):
                raise ValueError("a column has no name")
            start = _size(meta, _DATA_OFFSET)
            if _DICTIONARY_OFFSET in meta and 0 < (first := _size(meta, _DICTIONARY_OFFSET)) < start:
                start = first
            yield _Column(names[0].decode(), start, _size(meta, _COLUMN_BYTES), _size(meta, _NUM_COLUMN_VALUES))


def _structs(owner: dict[int, Any], field: int) -> list[dict[int, Any]]:
    found = owner.get(field)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError("its metadata cannot be read")
    return found


class _Page(NamedTuple):
    num_bytes: int
    """In the file, its header included."""
    num_unpacked_bytes: int
    num_values: int
    """Of the column; none in a dictionary."""


def _read_page(data: bytes) -> _Page:
    reader = _Reader(data)
    header = reader.struct()
    place = _HEADERS.get(_size(header, _TYPE))
    inner = header.get(place) if place else None
    if place is None or not isinstance(inner, dict):
        raise ValueError("a page is of an unknown kind")
    if _size(inner, _ENCODING[place]) not in _ENCODINGS:
        raise ValueError(f"a page is encoded in another way than {', '.join(_ENCODINGS.values())}")
    num_unpacked, num_values = _size(header, _UNPACKED_BYTES), _size(inner, _NUM_VALUES)
    is_dictionary = place == _HEADERS[_DICTIONARY]
    if is_dictionary and num_values > num_unpacked:
        raise ValueError("a page holds less than its header says")
    return _Page(reader.place + _size(header, _PACKED_BYTES), num_unpacked, 0 if is_dictionary else num_values)


def _size(owner: dict[int, Any], field: int) -> int:
    size = owner.get(field)
    if type(size) is not int or size < 0:
        raise ValueError("the header of a page or column names no size")
    return size


class _Reader:
    """Values in Thrift's compact protocol: structs by field number, lists, integers, bytes; None for other numbers."""

    def __init__(self, data: bytes):
        self._data = data
        self.place = 0
        """Bytes read."""

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """A struct. Raises `ValueError`."""
        found: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            step, kind = head >> 4, head & 15
            number = number + step if step else self._integer()
            if not 0 < number <= _LAST_FIELD or number in found:
                raise ValueError("a header names a field twice, or one that there is not")
            found[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth + 1)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError("a header is nested too deeply")
        match kind:
            case 1 | 2 | 3:  # of a list's booleans, each takes a byte
                return self._byte()
            case 4 | 5 | 6:
                return self._integer()
            case 7:
                return self._skip(8)
            case 8:
                return self._bytes(self._varint())
            case 9 | 10:
                head = self._byte()
                num = self._varint() if head >> 4 == 15 else head >> 4
                if num > len(self._data) - self.place:
                    raise ValueError("a header is cut short")
                return [self._value(head & 15, depth + 1) for _ in range(num)]
            case 12:
                return self.struct(depth)
        raise ValueError("a header holds a value of an unknown kind")

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _bytes(self, num: int) -> bytes:
        if num > len(self._data) - self.place:
            raise ValueError("a header is cut short")
        self.place += num
        return self._data[self.place - num : self.place]

    def _skip(self, num: int) -> None:
        self._bytes(num)

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 64, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a header holds a number that is too long")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
