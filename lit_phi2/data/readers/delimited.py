r"""Delimited text, CSV and TSV: a header, then one row per record -> rows.

    1  instruction;response          the delimiter is the one that the header contains, unless a line sep=; precedes it
    2  Why?;"Because ...             ->  (2, {"instruction": "Why?", "response": "Because ...\n..."})
    3  ..."
    4  How?;"So "quoted" it is"      ->  (4, UnparsableRow): costs one record
    5  When?;"In May"                ->  (5, {...})

Line ends inside quotes belong to the value, as does a lone \r outside of them (`csv_rows.py`).
"""

import re
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

from lit_phi2.data.readers.csv_rows import CsvRow, split_rows
from lit_phi2.data.readers.rows import Rows, UnparsableRow, check_column_names
from lit_phi2.data.readers.text_file import open_text, undecodable_row
from lit_phi2.errors import InputError

_DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a pipe"}
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?[;,\t|]*\s*', re.IGNORECASE)  # what Excel reads, and writes on request
_FIRST_LINE_END = re.compile(r'(?:[^"\r\n]|"[^"]*")*+(\r\n|\r|\n)')

_BROKEN = (
    "is not valid CSV: a quote is not closed, or text follows a closing quote. Inside quotes, write each quote twice."
)


def read_delimited(path: Path, encoding: str | None = None, *, delimiter: str | None = None) -> Rows:
    """The rows of a CSV or TSV file, after its header.

    A row with fewer values than the header has no value (None) in its last columns.

    Args:
        path: of the file, which may be compressed.
        encoding: data.encoding.
        delimiter: None takes the one in the header.

    Raises:
        InputError: the file cannot be read, is in another encoding, or its header is malformed or names a column twice.
    """
    with open_text(path, encoding) as file:
        match = _FIRST_LINE_END.match(file.head())
        is_old_mac = match is not None and match[1] == "\r"
        lines = file.lines("\r" if is_old_mac else "\n")
        number, header, delimiter = _find_header(lines, delimiter)
        if not header:
            return
        rows = split_rows(chain([header], lines), delimiter, number)
        columns = _read_header(path, next(rows))
        for row in rows:
            yield row.line, _parse(columns, row, delimiter)


def _find_header(lines: Iterator[str], delimiter: str | None) -> tuple[int, str, str]:
    """Line number and first line of the header, and the delimiter; the line is empty if the file has none."""
    for number, line in enumerate(lines, start=1):
        if number == 1 and (match := _SEPARATOR_LINE.fullmatch(line)):
            delimiter = match[1]
        elif line.strip("\r\n"):
            return number, line, delimiter or _delimiter_of(line)
    return 0, "", ","


def _delimiter_of(header: str) -> str:
    """The delimiter that occurs most often outside quotes; a comma if there is none.

    >>> _delimiter_of('"question, in full";answer')
    ';'
    """
    unquoted = re.sub(r'"[^"]*("|$)', "", header)
    return max(_DELIMITERS, key=unquoted.count)  # the first of equal ones


def _read_header(path: Path, header: CsvRow) -> list[str]:
    if header.values is None or header.is_undecodable:
        raise InputError(f"{path}:{header.line}: the header {_BROKEN}")
    check_column_names(f"{path}:{header.line}", header.values)
    return header.values


def _parse(columns: list[str], row: CsvRow, delimiter: str) -> dict[str, str | None] | UnparsableRow:
    if row.is_undecodable:
        return undecodable_row(row.text)
    if row.values is None:
        return UnparsableRow(_BROKEN, row.text)
    if len(row.values) > len(columns):
        message = f"has {len(row.values)} values but the header has {len(columns)} columns"
        name = _DELIMITERS.get(delimiter, repr(delimiter))
        return UnparsableRow(f"{message}; put a value that contains {name} in quotes.", row.text)
    return dict(zip_longest(columns, row.values))
