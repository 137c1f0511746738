"""Parquet: one row per record -> rows, counted from 1.

    instruction | response         ->  (1, {"instruction": "Why ...", "response": "The ..."})
    a column of numbers with NaN   ->  None there: pandas marks an absent value so

A compressed file is decompressed into memory, because Parquet is read from its end.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_phi2.data.readers.files import open_bytes, split_ending
from lit_phi2.data.readers.rows import Rows, check_column_names, without_nan
from lit_phi2.errors import InputError

_BATCH_ROWS = 1000  # in memory at a time


def read_parquet(path: Path) -> Rows:
    """The rows of a file.

    Raises:
        InputError: the file cannot be read as Parquet, or names a column twice.
    """
    return enumerate(_read_rows(path), start=1)


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]  # slow to import, rarely needed

    try:
        with parquet.ParquetFile(_source(path)) as file:
            schema = file.schema_arrow
            check_column_names(str(path), schema.names)
            columns = [field.name for field in schema if "double" in str(field.type) or "float" in str(field.type)]
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    yield row | {name: without_nan(row[name]) for name in columns}
    except InputError:
        raise
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        # A text that is not UTF-8, a date after the year 9999. Only the kind of error: its message may quote a value.
        raise InputError(
            f"{path}: cannot be read as Parquet ({type(error).__name__}). Copy or write it again."
        ) from error


def _source(path: Path) -> Any:
    """What pyarrow reads: the path, or the decompressed bytes."""
    if split_ending(path.name)[1] is None:
        return path
    from pyarrow import BufferReader

    with open_bytes(path) as file:
        return BufferReader(file.read())
