"""Sources: a path, claims:SPLIT or hub:owner/name[:split] -> rows, each with its line.

    .jsonl .ndjson    one object per line                   1, 2, 3        line
    .json             an array of objects                   2, 3, "3:42"   line; line:column from the second on a line
    .csv              a header, then one row per record     2, 3, 6        line on which the row begins
    .parquet          one row per record                    1, 2, 3        row
    claims:train      packaged .jsonl; claims:train[:1700] is its first 1,700 records
    hub:owner/name    rows that `datasets` streams          1, 2, 3        row

A row that cannot be parsed is an UnparsableRow and costs one record. A source that cannot be read at all is an
InputError.

Files are parsed here because the readers of `datasets` give no line, fail as a whole on one invalid row, and leave
copies of private records in a cache in the home folder.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from lit_phi2.data.text import quote_list, shorten
from lit_phi2.errors import InputError

CLAIMS_DIR = Path(__file__).parent.parent / "assets" / "claims"

_ENDINGS = ".jsonl, .json, .csv or .parquet"

Rows = Iterator[tuple[int | str, Any]]  # line, and the parsed row or an UnparsableRow


@dataclass(frozen=True, slots=True)
class UnparsableRow:
    """A row that could not be parsed: the reason, and its text as it is in the file."""

    message: str
    raw: str


def read_rows(source: str, required: Sequence[str]) -> Rows:
    """All rows of a source with their lines, counted from 1; no line occurs twice.

    Args:
        source: a path, claims:SPLIT or hub:owner/name[:split].
        required: the fields that every record needs, which a CSV header must therefore name.

    Raises:
        InputError: the source does not exist, cannot be read, or has an unknown format.
    """
    if source.startswith("hub:"):
        return enumerate(_read_hub(source), start=1)
    if source.startswith("claims:"):
        return _read_packaged(source)
    return _read_file(source, required)


def _read_packaged(source: str) -> Rows:
    match = re.fullmatch(r"claims:(\w+)(?:\[:([1-9]\d*)\])?", source)
    path = CLAIMS_DIR / f"{match[1] if match else ''}.jsonl"
    if match is None or not path.is_file():
        names = ", ".join(f"claims:{packaged.stem}" for packaged in sorted(CLAIMS_DIR.glob("*.jsonl")))
        raise InputError(
            f"{source}: is not packaged; expected one of {names}. "
            "claims:train[:1700] is the first 1,700 records of claims:train."
        )
    return islice(_read_jsonl(path), int(match[2]) if match[2] else None)


def _read_file(source: str, required: Sequence[str]) -> Rows:
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"{source}: no such file. Paths are taken from the folder you are in, {Path.cwd()}.")
    if not path.is_file():
        raise InputError(f"{source}: is not a file; expected one ending in {_ENDINGS}.")
    readers: dict[str, Callable[[Path], Rows]] = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_json,
        ".csv": lambda path: _read_csv(path, required),
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise InputError(f"{source}: unknown format {path.suffix!r}; expected a file ending in {_ENDINGS}.")
    return readers[path.suffix](path)


# JSON, one object per line


def _read_jsonl(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, which some spreadsheets write
            if line.strip():
                yield number, _parse_json_line(line.rstrip(b"\r\n"))


def _parse_json_line(line: bytes) -> Any:
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except _DuplicateKeyError as error:
        message = str(error)
    except UnicodeDecodeError as error:
        message = f"is not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}. Save it as UTF-8."
    except json.JSONDecodeError as error:
        message = f"is not valid JSON: {error.msg} at column {error.colno}; expected one object on the line."
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        message = f"is not valid JSON: {type(error).__name__}; expected one object with text fields."
    return UnparsableRow(message, line.decode("utf-8", errors="replace"))


class _DuplicateKeyError(ValueError):
    """An object that names a field twice: json would keep the last value and drop the others silently."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _DuplicateKeyError(f"names the field {shorten(repeated)!r} twice; expected each name once.")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


# JSON, one array


def _read_json(path: Path) -> Rows:
    """The objects of an array, each with the line on which it begins; the second on a line gets line:column."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: is not UTF-8. Save the file as UTF-8.") from error
    position = _skip_whitespace(text, 0)
    if position == len(text):
        return
    if text[position] != "[":
        raise InputError(f"{path}: is not a JSON array of objects; a file with one object per line ends in .jsonl.")
    lines, previous = _LineCounter(text), 0
    position = _skip_whitespace(text, position + 1)
    while text[position : position + 1] not in ("]", ""):
        line = lines.line_at(position)
        column = position - text.rfind("\n", 0, position)
        row, position = _parse_array_item(path, text, position, line)
        yield f"{line}:{column}" if line == previous else line, row
        previous = line
        position = _skip_separator(path, text, position, lines)
    end = _skip_whitespace(text, position + 1)
    if position == len(text) or end < len(text):
        raise InputError(
            f"{path}:{lines.line_at(end)}: is not valid JSON: the array is not closed, or more follows it."
        )


class _LineCounter:
    """Line numbers of increasing positions, so that no part of a large text is counted twice."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.line = 1
        self.position = 0

    def line_at(self, position: int) -> int:
        self.line += self.text.count("\n", self.position, position)
        self.position = position
        return self.line


def _skip_whitespace(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _parse_array_item(path: Path, text: str, position: int, line: int) -> tuple[Any, int]:
    """The item that begins at a position, and the position after it."""
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        message = f"{path}:{error.lineno}: is not valid JSON: {error.msg} at column {error.colno}"
        raise InputError(f"{message}; expected an array of objects.") from error
    except _DuplicateKeyError as error:
        raise InputError(f"{path}:{line}: {error}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        message = f"{path}:{line}: is not valid JSON: {type(error).__name__}"
        raise InputError(f"{message}; expected objects with text fields.") from error


def _skip_separator(path: Path, text: str, position: int, lines: _LineCounter) -> int:
    """The position of the next item, or of the closing bracket."""
    position = _skip_whitespace(text, position)
    if text[position : position + 1] == ",":
        return _skip_whitespace(text, position + 1)
    if text[position : position + 1] != "]":
        line = lines.line_at(position)
        raise InputError(f"{path}:{line}: is not valid JSON: expected ',' or ']' after an object.")
    return position


# CSV


def _read_csv(path: Path, required: Sequence[str]) -> Rows:
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters would refuse a long chart extract
    # surrogateescape keeps bytes that are not UTF-8 recognizable, so that they cost one record and not the file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        columns: list[str] = []
        for line, values in _split_csv(file):
            if isinstance(values, UnparsableRow):
                yield line, values
            elif columns:
                yield line, _csv_row(columns, values)
            else:
                columns = values
                _check_csv_header(f"{path}:{line}", columns, required)


def _split_csv(file: Iterator[str]) -> Iterator[tuple[int, list[str] | UnparsableRow]]:
    """The values of each row that is not empty, up to the first syntax error; a quoted value may span several lines."""
    reader = csv.reader(file, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, UnparsableRow(f"is not valid CSV: {error}; nothing after it was read.", "")
            return
        if values:
            yield line, values


def _check_csv_header(location: str, columns: Sequence[str], required: Sequence[str]) -> None:
    _check_column_names(location, columns)
    missing = [column for column in required if column not in columns]
    if not missing:
        return
    # Show the columns only if they look like names: in a file without a header the first line is a private record.
    are_names = all(re.fullmatch(r"[\w .-]{1,40}", column) for column in columns)
    header = f"its columns are {quote_list(columns)}" if are_names else "its first line does not hold column names"
    raise InputError(
        f"{location}: has no column {', '.join(map(repr, missing))}; {header}. Name "
        "them with data.instruction_field, data.input_field, data.response_field and data.id_field."
    )


def _check_column_names(location: str, columns: Sequence[str]) -> None:
    if repeated := [name for name, count in Counter(columns).items() if count > 1]:
        raise InputError(f"{location}: has several columns {shorten(repeated[0])!r}; expected each name once.")


def _csv_row(columns: list[str], values: list[str]) -> dict[str, str | None] | UnparsableRow:
    raw = json.dumps(values)
    if len(values) > len(columns):
        message = f"has {len(values)} values but the header has {len(columns)} columns"
        return UnparsableRow(f"{message}; put a value that contains a comma in quotes.", raw)
    if any("\udc80" <= character <= "\udcff" for value in values for character in value):
        return UnparsableRow("is not UTF-8. Save the file as UTF-8.", raw)
    return dict(zip_longest(columns, values))  # columns that the row does not reach are None


# Parquet and the hub


def _read_parquet(path: Path) -> Rows:
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]  # slow to import, rarely needed

    try:
        file = parquet.ParquetFile(path)
        _check_column_names(str(path), file.schema_arrow.names)
        batches = file.iter_batches(batch_size=1000)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except InputError:
        raise
    except (ArrowException, OSError, ValueError) as error:  # ValueError: a string that is not UTF-8
        raise InputError(f"{path}: cannot be read as Parquet ({type(error).__name__}: {error}).") from error


def _read_hub(source: str) -> Iterator[Any]:
    from datasets import load_dataset

    name, _, split = source.removeprefix("hub:").partition(":")
    try:
        yield from load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # network, name, split or format: the hub client raises many types
        raise InputError(
            f"{source}: the dataset could not be read ({type(error).__name__}). Expected hub:owner/name[:split] and a "
            "network, or a file on this machine."
        ) from error
