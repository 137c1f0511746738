"""data/sources.py."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from lit_phi2.data.text import quote_list, shorten
from lit_phi2.errors import InputError

CLAIMS = Path(__file__).parent.parent / "assets" / "claims"

_ENDINGS = ".jsonl, .json, .csv or .parquet"


def read_rows(source: str, required: Sequence[str]) -> Iterator[tuple[int | str, Any]]:
    """(line or row number from 1, the parsed row or a _Unreadable) for everything a source holds; no number twice."""
    if source.startswith("hub:"):
        yield from enumerate(_hub_rows(source), start=1)
        return
    if source.startswith("claims:"):
        named = re.fullmatch(r"claims:(\w+)(?:\[:([1-9]\d*)\])?", source)
        path = CLAIMS / f"{named[1] if named else ''}.jsonl"
        if named is None or not path.is_file():
            raise InputError(
                f"{source}: is not packaged; there are "
                + ", ".join(f"claims:{p.stem}" for p in sorted(CLAIMS.glob("*.jsonl")))
                + ", and claims:train[:1700] for the first 1,700 records of one."
            )
        yield from islice(_jsonl_rows(path), int(named[2]) if named[2] else None)
        return
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"{source}: no such file. Paths are taken from the folder you are in, {Path.cwd()}.")
    if not path.is_file():
        raise InputError(f"{source}: is not a file; expected one ending in {_ENDINGS}.")
    readers = {".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    if path.suffix == ".csv":
        yield from _csv_rows(path, required)
    elif path.suffix in readers:
        yield from readers[path.suffix](path)
    else:
        raise InputError(f"{source}: unknown format {path.suffix!r}; expected a file ending in {_ENDINGS}.")


@dataclass(frozen=True, slots=True)
class UnparsableRow:
    """A line that could not be parsed at all."""

    message: str
    raw: str


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as some spreadsheets write
            if line.strip():
                yield number, _parse_json_line(line.rstrip(b"\r\n"))


class _DuplicateKeyError(ValueError):
    """An object that names a field twice: json would keep the last and drop the rest in silence."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _DuplicateKeyError(f"names the field {shorten(twice)!r} twice; expected each name once.")
    return found


def _parse_json_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        message = str(error)
    except UnicodeDecodeError as error:
        message = f"is not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}. Save it as UTF-8."
    except json.JSONDecodeError as error:
        message = f"is not valid JSON: {error.msg} at column {error.colno}; expected one object on the line."
    except (RecursionError, ValueError) as error:
        message = f"is not valid JSON: {type(error).__name__}; expected one object of plain texts."
    return UnparsableRow(message, line.decode("utf-8", errors="replace"))


def _json_rows(path: Path) -> Iterator[tuple[int | str, Any]]:
    """The objects of a top-level array, each with the line on which it begins; the second on a line as line:column."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: is not UTF-8. Save the file as UTF-8.") from error
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    position = _skip_space(text, 0)
    if not text[position:]:
        return
    if text[position] != "[":
        raise InputError(f"{path}: holds no JSON array of objects; one object a line is .jsonl.")
    line, previous, counted = 1, 0, 0
    position = _skip_space(text, position + 1)
    while text[position : position + 1] not in ("]", ""):
        line += text.count("\n", counted, position)
        counted = position
        column = position - text.rfind("\n", 0, position)
        try:
            row, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            found = f"{path}:{error.lineno}: is not valid JSON: {error.msg} at column {error.colno}"
            raise InputError(f"{found}; expected an array of objects.") from error
        except _DuplicateKeyError as error:
            raise InputError(f"{path}:{line}: {error}") from error
        except (RecursionError, ValueError) as error:
            found = f"{path}:{line}: is not valid JSON: {type(error).__name__}"
            raise InputError(f"{found}; expected objects of plain texts.") from error
        yield f"{line}:{column}" if line == previous else line, row
        previous = line
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise InputError(f"{path}:{line}: is not valid JSON: expected ',' or ']' after an object.")
    end = _skip_space(text, position + 1)
    if not text[position:] or text[end:]:
        line += text.count("\n", counted, end)
        raise InputError(f"{path}:{line}: is not valid JSON: the array is not closed, or more follows it.")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _csv_rows(path: Path, required: Sequence[str]) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 would refuse a long chart extract
    # surrogateescape keeps bytes that are not UTF-8 recognisable, so that they cost a record and not the file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        columns: list[str] = []
        while True:
            line = reader.line_num + 1  # where the row begins; a quoted field may run over several lines
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, UnparsableRow(f"is not valid CSV: {error}; nothing after it was read.", "")
                return
            if not values:
                continue  # an empty line
            if columns:
                yield line, _csv_row(columns, values)
                continue
            columns = values
            _check_columns(f"{path}:{line}", columns)
            if missing := [column for column in required if column not in columns]:
                # The names only where they look like names: a file without a header begins with a record.
                named = all(re.fullmatch(r"[\w .-]{1,40}", column) for column in columns)
                found = (
                    f"its columns are {quote_list(columns)}" if named else "its first line does not hold column names"
                )
                raise InputError(
                    f"{path}:{line}: has no column {', '.join(map(repr, missing))}; {found}. Name "
                    "them with data.instruction_field, data.input_field, data.response_field and data.id_field."
                )


def _check_columns(place: str, columns: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise InputError(f"{place}: has several columns {shorten(twice[0])!r}; expected each name once.")


def _csv_row(columns: list[str], values: list[str]) -> Any:
    raw = json.dumps(values)
    if len(values) > len(columns):
        message = f"has {len(values)} values but the header has {len(columns)} columns"
        return UnparsableRow(f"{message}; put a value that holds a comma between quotes.", raw)
    if any("\udc80" <= character <= "\udcff" for value in values for character in value):
        return UnparsableRow("is not UTF-8. Save the file as UTF-8.", raw)
    return dict(zip_longest(columns, values))  # columns that the row does not reach are None


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]  # slow to import, seldom needed

    try:
        file = parquet.ParquetFile(path)
        _check_columns(str(path), file.schema_arrow.names)
        batches = file.iter_batches(batch_size=1000)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except InputError:
        raise
    except (ArrowException, OSError, ValueError) as error:  # ValueError: a text that is not UTF-8
        raise InputError(f"{path}: cannot be read as Parquet ({type(error).__name__}: {error}).") from error


def _hub_rows(source: str) -> Iterator[Any]:
    from datasets import load_dataset

    name, _, split = source.removeprefix("hub:").partition(":")
    try:
        yield from load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # network, name, split or format: the hub client raises many kinds
        raise InputError(
            f"{source}: the dataset could not be read ({type(error).__name__}). Expected hub:owner/name[:split] and a "
            "network, or a file on this machine."
        ) from error
