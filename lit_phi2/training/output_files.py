r"""Output files: predictions -> a file in the format that its name's ending gives.

    .jsonl      {"id": "c-17", ..., "new_tokens": 31}\n            one object a record; absent fields are left out
    .csv        id,instruction,input,...\r\n                       UTF-8 with a byte order mark, for spreadsheets
    .parquet    row groups of ROW_GROUP records                    text, int64 and bool; null where a field is absent

All are written record by record, so millions of predictions need the memory of one row group.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_phi2.data.arguments import STDIN_SOURCE
from lit_phi2.errors import InputError
from lit_phi2.utils.files import atomic_write
from lit_phi2.utils.sequences import batched

STDOUT = "-"  # as --output
ROW_GROUP = 4096  # records
Prediction = Mapping[str, Any]

_TEXTS = ("id", "instruction", "input", "reference", "completion", "finish_reason")
_COLUMNS = (*_TEXTS, "new_tokens", "truncated")

# A spreadsheet takes a cell that begins with one of these for a formula, which can send the sheet elsewhere (CWE-1236).
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def check_format(file: Path, source: str) -> None:
    """Refuse a file whose ending names no format.

    Args:
        file: to write.
        source: begins the message: the flag that names it.

    Raises:
        InputError: names the endings that there are.
    """
    if file.suffix.lower() not in _FORMATS:
        *others, last = _FORMATS
        found = f"the ending {file.suffix!r}" if file.suffix else "no ending"
        raise InputError(
            f"{source}: has {found}; expected {', '.join(others)} or {last}, or - for JSON Lines on standard output."
        )


def reads_stdin(files: str | list[str] | None) -> bool:
    """Whether a source is standard input."""
    return STDIN_SOURCE in ([files] if isinstance(files, str) else files or [])


def check_streams(files: str | list[str] | None, output: str | None, world_size: int) -> None:
    """Refuse to share standard input or output among processes.

    Args:
        files: data.predict_files.
        output: --output.
        world_size: processes.

    Raises:
        InputError: several processes would use one of them.
    """
    names = ["data.predict_files"] * reads_stdin(files) + ["--output"] * (output == STDOUT)
    if names and world_size > 1:
        raise InputError(
            f"{' and '.join(names)}: - can be used by one process, and this run has {world_size}. Give "
            "--trainer.devices 1, or files."
        )


def write_predictions(file: Path, predictions: Iterable[Prediction]) -> None:
    """Write a file that appears complete or not at all.

    Raises:
        OSError: it cannot be written; names it.
    """
    atomic_write(file, _FORMATS[file.suffix.lower()](predictions))


def to_line(prediction: Prediction) -> str:
    """A line of JSON Lines."""
    return json.dumps(prediction, ensure_ascii=False) + "\n"


def _csv_parts(predictions: Iterable[Prediction]) -> Iterator[bytes]:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    yield b"\xef\xbb\xbf"  # without it, Excel reads UTF-8 as another encoding
    writer.writerow(_COLUMNS)
    for prediction in predictions:
        texts = [_guard(prediction.get(name, "")) for name in _TEXTS]
        truncated = "true" if prediction.get("truncated") else "false"
        writer.writerow([*texts, prediction["new_tokens"], truncated])
        yield buffer.getvalue().encode()
        buffer.seek(0)
        buffer.truncate()
    yield buffer.getvalue().encode()


def _guard(text: str) -> str:
    """The text with an apostrophe before what a spreadsheet would calculate.

    >>> _guard("=1+1"), _guard("- see page 2"), _guard("a = b")
    ("'=1+1", "'- see page 2", 'a = b')
    """
    return "'" + text if text.startswith(_FORMULA_STARTS) else text


def _parquet_parts(predictions: Iterable[Prediction]) -> Iterator[bytes]:
    import pyarrow  # type: ignore[import-untyped]  # slow to import, rarely needed
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    schema = pyarrow.schema(
        [
            *(pyarrow.field(name, pyarrow.string(), nullable=name == "reference") for name in _TEXTS),
            pyarrow.field("new_tokens", pyarrow.int64(), nullable=False),
            pyarrow.field("truncated", pyarrow.bool_(), nullable=False),
        ]
    )
    sink = _Sink()
    with parquet.ParquetWriter(sink, schema, compression="zstd") as writer:
        for group in batched(predictions, ROW_GROUP):
            rows = [{"truncated": False, **prediction} for prediction in group]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
            yield from sink.take()
    yield from sink.take()


class _Sink:
    """A file that hands on what is written to it."""

    closed = False

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, part: bytes) -> int:
        self.parts.append(bytes(part))
        return len(part)

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def take(self) -> list[bytes]:
        """What was written since the last call."""
        parts, self.parts = self.parts, []
        return parts


_FORMATS: dict[str, Callable[[Iterable[Prediction]], Iterable[str | bytes]]] = {
    ".jsonl": lambda predictions: map(to_line, predictions),
    ".csv": _csv_parts,
    ".parquet": _parquet_parts,
}
