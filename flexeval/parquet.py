"""Arrays and texts of named columns as Parquet files, which any tool for tables can read. Knows no meaning of a column.

Files may come from strangers, and a few hundred bytes of Parquet can stand for gigabytes: nothing is unpacked before
`pages` has said what it will be, and reading stops where a file unpacks to more than its length lets expect.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from flexeval.config import format_size
from flexeval.errors import ResultsError
from flexeval.files import replacing
from flexeval.pages import check_pages

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet as pq

_LEAST_BYTES = 64 * 2**20
"""What any file may unpack to."""
_MOST_TIMES = 1000
"""Beyond that, how many times its length: prompts that share a header of many thousand tokens come to some hundred."""
_MOST_COLUMNS = 100
_MOST_ENTRIES = 10_000
"""Of any list in a file's metadata: row groups, columns, fields of its schema."""
_BATCH_ROWS = 1024
_AGAIN = "Copy it again, or make it anew"


def save(rows: npt.NDArray[np.void], path: Path) -> None:
    """Write a structured array, whole or not at all; a field of several numbers becomes a list of fixed size."""
    import pyarrow

    save_table(pyarrow.table({name: _to_arrow(rows[name]) for name in rows.dtype.names or ()}), path)


def save_texts(columns: dict[str, list[str]], path: Path, *, metadata: dict[bytes, str]) -> None:
    """Write columns of texts, whole or not at all."""
    import pyarrow

    table = pyarrow.table({name: pyarrow.array(values, pyarrow.string()) for name, values in columns.items()})
    save_table(table.replace_schema_metadata(metadata), path)


def save_table(table: pa.Table, path: Path) -> None:
    """Write a table, whole or not at all."""
    from pyarrow import parquet

    with replacing(path) as temporary, temporary.open("wb") as file:  # Arrow takes no path that is not UTF-8
        parquet.write_table(table, file, compression="zstd")


def load(path: Path) -> npt.NDArray[np.void]:
    """Read what `save` wrote. Raises `ResultsError`."""
    with _reading(path, "Remove it, then run again") as file:
        columns, limit = _open(file), _limit(path)
        rows_type = np.dtype([_field(field) for field in columns.schema_arrow])
        if columns.metadata.num_rows * max(1, rows_type.itemsize) > limit:
            raise _too_large(limit)
        parts = [_to_rows(batch, rows_type) for batch in _batches(columns, path, _num_bytes)]
        return np.concatenate([np.zeros(0, rows_type), *parts])


def read_metadata(path: Path) -> dict[bytes, bytes]:
    """The metadata that was written beside columns. Raises `ResultsError`."""
    with _reading(path, _AGAIN) as file:
        return dict(_open(file).metadata.metadata or {})


def read_texts(path: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Read columns that `save_texts` wrote. Raises `ResultsError`."""
    with _reading(path, _AGAIN) as file:
        schema, texts = _open(file).schema_arrow, {name: list[str]() for name in names}
        for name in names:
            _check_text(schema, name)
        for batch in _batches(_open(file, texts=names), path, _num_text_bytes, names):
            for name in names:
                texts[name] += batch.column(name).to_pylist()
        return texts


@contextmanager
def _reading(path: Path, mend: str) -> Iterator[BinaryIO]:
    """Open a file, and say of whatever goes wrong in which it did."""
    try:
        with path.open("rb") as file:
            yield file
    except Exception as error:  # a damaged file raises whatever the damage leads to
        lines = str(error).strip("'\"").splitlines() or [type(error).__name__]
        raise ResultsError(f"cannot be read: {lines[0]}", where=str(path), mend=mend) from error


def _open(file: BinaryIO, texts: Sequence[str] = ()) -> pq.ParquetFile:
    """Read a file's metadata; columns of `texts` come as codes and a dictionary, so that what repeats stays small."""
    from pyarrow import parquet

    columns = parquet.ParquetFile(
        file,
        read_dictionary=list(texts),
        thrift_string_size_limit=max(1, os.fstat(file.fileno()).st_size),
        thrift_container_size_limit=_MOST_ENTRIES,
        memory_map=False,
        pre_buffer=False,
    )
    if columns.metadata.num_columns > _MOST_COLUMNS:
        raise ValueError(f"it has {columns.metadata.num_columns} columns")
    return columns


def _batches(
    file: pq.ParquetFile,
    path: Path,
    size: Callable[[pa.RecordBatch], int],
    names: Sequence[str] | None = None,
) -> Iterator[pa.RecordBatch]:
    """The rows, some at a time. Raises `ValueError` where they come to too much."""
    limit, num_bytes, num_rows = _limit(path), 0, 0
    check_pages(path, names, limit)
    for batch in file.iter_batches(_BATCH_ROWS, columns=names, use_threads=False):
        num_bytes, num_rows = num_bytes + size(batch), num_rows + len(batch)
        if num_bytes > limit:
            raise _too_large(limit)
        if any(column.null_count for column in batch.columns):
            raise ValueError("cells are empty")
        yield batch
    if num_rows != file.metadata.num_rows:
        raise ValueError(f"it holds {num_rows} rows, and says {file.metadata.num_rows}")


def _limit(path: Path) -> int:
    """Bytes that a file may unpack to."""
    return max(_LEAST_BYTES, _MOST_TIMES * path.stat().st_size)


def _too_large(limit: int) -> ValueError:
    return ValueError(f"it unpacks to more than {format_size(limit)}, too much for its length")


def _num_bytes(batch: pa.RecordBatch) -> int:
    return int(batch.nbytes)


def _num_text_bytes(batch: pa.RecordBatch) -> int:
    """Bytes of the texts when each is written out, and of the objects that hold them."""
    from pyarrow import compute

    lengths = [
        compute.sum(compute.binary_length(column.dictionary).take(column.indices)).as_py() or 0
        for column in batch.columns
    ]
    return sum(lengths) + 64 * len(batch) * len(lengths)


def _check_text(schema: pa.Schema, name: str) -> None:
    import pyarrow

    found = [field.type for field in schema if field.name == name]
    if len(found) != 1:
        raise ValueError(f"it has {len(found) or 'no'} columns called {name}")
    inner = found[0].value_type if pyarrow.types.is_dictionary(found[0]) else found[0]
    if inner not in (pyarrow.string(), pyarrow.large_string()):
        raise ValueError(f"its column {name} is of type {found[0]}, not of texts")


def _field(field: pa.Field) -> tuple[Any, ...]:
    """What a column is in a row. Raises `ValueError` for one that is not of numbers."""
    import pyarrow

    is_list = pyarrow.types.is_fixed_size_list(field.type)
    inner = field.type.value_type if is_list else field.type
    is_number = any(
        check(inner) for check in (pyarrow.types.is_boolean, pyarrow.types.is_integer, pyarrow.types.is_floating)
    )
    if not is_number:
        raise ValueError(f"its column {field.name} is of type {field.type}, not of numbers")
    shape = (field.type.list_size,) if is_list else ()
    return field.name, inner.to_pandas_dtype(), shape


def _to_rows(batch: pa.RecordBatch, rows_type: np.dtype[np.void]) -> npt.NDArray[np.void]:
    rows = np.zeros(len(batch), rows_type)
    for name in rows_type.names or ():
        column = batch.column(name)
        flat = column.flatten() if rows[name].ndim == 2 else column
        if flat.null_count:
            raise ValueError("cells are empty")
        rows[name] = flat.to_numpy(zero_copy_only=False).reshape(rows[name].shape)
    return rows


def _to_arrow(values: npt.NDArray[Any]) -> pa.Array:
    import pyarrow

    if values.ndim == 1:
        return pyarrow.array(values)
    flat = pyarrow.array(np.ascontiguousarray(values).ravel())
    return pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
