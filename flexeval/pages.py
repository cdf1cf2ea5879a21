"""What the pages of a Parquet file say that they unpack to, before anything unpacks them.

A file's metadata tells the sizes of columns, but a reader believes each page's own header, which can name 2 GiB behind
a few bytes. So headers are read here first (Thrift's compact protocol; parquet-format, `parquet.thrift`), as strictly
as the few forms need that common writers use. Knows no type of a column.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flexeval.config import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyarrow import parquet as pq

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
_LAST_FIELD = 32
_DEEPEST = 8


def check_pages(path: Path, metadata: pq.FileMetaData, names: Sequence[str] | None, limit: int) -> None:
    """Raise `ValueError` unless the pages of columns lie side by side and unpack to `limit` bytes at most.

    Args:
        path: The file.
        metadata: What it says of itself.
        names: Of top-level columns that are to be read; None for all.
        limit: In bytes, over all of them together.
    """
    room, size = limit, path.stat().st_size
    with path.open("rb") as file:
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                is_wanted = names is None or column.path_in_schema.partition(".")[0] in names
                if not is_wanted or column.num_values == 0:  # then no page is read
                    continue
                start, num_values = column.data_page_offset, 0
                if 0 < (column.dictionary_page_offset or 0) < start:
                    start = column.dictionary_page_offset
                end = start + column.total_compressed_size
                if not 4 <= start <= end <= size:
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


class _Page(NamedTuple):
    num_bytes: int
    """In the file, its header included."""
    num_unpacked_bytes: int
    num_values: int
    """Of the column; none in a dictionary."""


def _read_page(data: bytes) -> _Page:
    reader = _Reader(data)
    header = reader.struct()
    place = _HEADERS.get(header.get(_TYPE, -1))
    inner = header.get(place) if place else None
    if place is None or not isinstance(inner, dict):
        raise ValueError("a page is of an unknown kind")
    if inner.get(_ENCODING[place]) not in _ENCODINGS:
        raise ValueError(f"a page is encoded in another way than {', '.join(_ENCODINGS.values())}")
    num_unpacked, num_values = _size(header, _UNPACKED_BYTES), _size(inner, _NUM_VALUES)
    is_dictionary = place == _HEADERS[_DICTIONARY]
    if is_dictionary and num_values > num_unpacked:
        raise ValueError("a page holds less than its header says")
    return _Page(reader.place + _size(header, _PACKED_BYTES), num_unpacked, 0 if is_dictionary else num_values)


def _size(header: dict[int, Any], field: int) -> int:
    size = header.get(field)
    if not isinstance(size, int) or size < 0:
        raise ValueError("a page's header names no size")
    return size


class _Reader:
    """A value in Thrift's compact protocol."""

    def __init__(self, data: bytes):
        self._data = data
        self.place = 0
        """Bytes read."""

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Fields by number: integers, booleans, structs; None for what no page header needs."""
        found: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            step, kind = head >> 4, head & 15
            number = number + step if step else self._integer()
            if not 0 < number <= _LAST_FIELD or number in found or depth > _DEEPEST:
                raise ValueError("a page's header cannot be read")
            found[number] = self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 12:
            return self.struct(depth + 1)
        if kind == 8:  # the least and the most of a page's values
            num_bytes = self._varint()  # which moves the place as well
            self.place += num_bytes
            return None
        raise ValueError("a page's header cannot be read")

    def _byte(self) -> int:
        if self.place >= len(self._data):
            raise ValueError("a page's header is cut short")
        self.place += 1
        return self._data[self.place - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a page's header cannot be read")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
