"""Arrays of named columns as Parquet files, which any tool for tables can read. Knows no meaning of a column."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flexeval.errors import ResultsError
from flexeval.files import replacing

if TYPE_CHECKING:
    import pyarrow as pa


def save(rows: npt.NDArray[np.void], path: Path) -> None:
    """Write a structured array, whole or not at all; a field of several numbers becomes a list of fixed size."""
    import pyarrow
    from pyarrow import parquet

    columns = {name: _to_arrow(rows[name]) for name in rows.dtype.names or ()}
    with replacing(path) as temporary:
        parquet.write_table(pyarrow.table(columns), temporary, compression="zstd")


def load(path: Path) -> npt.NDArray[np.void]:
    """Read what `save` wrote. Raises `ResultsError`."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        rows = np.zeros(table.num_rows, [_field(field) for field in table.schema])
        for name in rows.dtype.names or ():
            column = table.column(name).combine_chunks()
            flat = column.flatten() if rows[name].ndim == 2 else column
            rows[name] = flat.to_numpy(zero_copy_only=False).reshape(rows[name].shape)
        return rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        what = f"cannot be read: {str(error).splitlines()[0]}"
        raise ResultsError(what, where=str(path), mend="Remove it, then run again") from error


def _field(field: Any) -> tuple[Any, ...]:
    import pyarrow

    if not pyarrow.types.is_fixed_size_list(field.type):
        return field.name, field.type.to_pandas_dtype()
    return field.name, field.type.value_type.to_pandas_dtype(), (field.type.list_size,)


def _to_arrow(values: npt.NDArray[Any]) -> pa.Array:
    import pyarrow

    if values.ndim == 1:
        return pyarrow.array(values)
    flat = pyarrow.array(np.ascontiguousarray(values).ravel())
    return pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
