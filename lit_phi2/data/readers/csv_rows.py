r"""CSV rows: lines -> the values of each row, where a quoted value may span lines; broken quotes cost one row.

    2  a,"b                   ->  CsvRow(2, ["a", "b\nc"])
    3  c"
    4  d,"e "f" g"            ->  CsvRow(4, None): text follows a closing quote
    5  h,"i                   ->  CsvRow(5, None): never closed, as the quote of line 7 shows
    6  j,k                    ->  CsvRow(6, ["j", "k"])
    7  l,"m"                  ->  CsvRow(7, ["l", "m"])

A row is broken if csv refuses it, or if it spans lines and has more values than the header, or fewer and whole rows
inside it. Its first line is given up, and reading resumes at the next line. The lines that the row had swallowed are
then read alone, except the last one: that a line begins inside a quote decides all that follows up to the end of the
row, so whatever begins on one of these lines and goes on after it ends in the same fault. Every line is therefore
parsed at most four times, and the time is linear even if every line has a stray quote.

A stray quote may be inside a value that spans lines, whose other lines are not rows. So if the first line of a broken
row opens more quotes than it closes, the lines up to one that closes a quote which it does not open belong to the row,
unless a quoted value begins before.
"""

import csv
import re
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from lit_phi2.data.readers.text_file import UndecodableLine

_MAX_ROW_CHARS = 2**24  # a longer row has a quote that is not closed; also limits the memory that such a quote costs
_MAX_HELD = 100  # lines after a broken row that may belong to it

# csv ends a row at a carriage return outside quotes. Halves of surrogate pairs, which no file decodes to, hide it.
_HIDE = {ord("\r"): "\ud800", ord("\n"): "\ud801"}
_SHOW = {0xD800: "\r", 0xD801: "\n"}


class CsvRow(NamedTuple):
    """A row.

    Attributes:
        line: on which it begins.
        values: None if its quotes are broken.
        text: as it is in the file, without the last line end.
        is_undecodable: it contains bytes that are not UTF-8.
    """

    line: int
    values: list[str] | None
    text: str
    is_undecodable: bool


def split_rows(lines: Iterator[str], delimiter: str, first_line: int = 1) -> Iterator[CsvRow]:
    """The rows that are not empty; the first one is the header.

    Args:
        lines: with their ends.
        delimiter: one character.
        first_line: the number of the first line.
    """
    broken: list[CsvRow] = []  # a broken row
    held: list[CsvRow] = []  # rows after it, which may be lines of it
    for row in _RowReader(lines, delimiter, first_line).rows():
        if broken and row.values is not None and len(held) < _MAX_HELD and broken[0].text.count('"') % 2:
            if _closes_quote(row):
                broken, held = [*broken, *held, row], []
                continue
            if not re.search(rf'(?m)(^|{re.escape(delimiter)})"', row.text):
                held.append(row)
                continue
        if broken:
            yield _join(broken)
        yield from (other for other in held if other.values)
        broken, held = [row] if row.values is None else [], []
        if row.values:
            yield row
    if broken:
        yield _join(broken)
    yield from (other for other in held if other.values)


def _closes_quote(row: CsvRow) -> bool:
    """Whether a value ends in a quote although it is not quoted, and the quotes of the row are not in pairs."""
    ending = (value for value in row.values or () if value.endswith('"'))
    is_quoted = all('"' + value.replace('"', '""') + '"' in row.text for value in ending)
    return not is_quoted and row.text.count('"') % 2 == 1


def _join(rows: list[CsvRow]) -> CsvRow:
    text = "\n".join(row.text for row in rows).rstrip("\r\n")
    return CsvRow(rows[0].line, None, text, any(row.is_undecodable for row in rows))


class _RowReader:
    """Feeds lines to csv, and keeps those of the current row, so that they can be read again.

    Args:
        lines: with their ends.
        delimiter: one character.
        first_line: the number of the first line.
    """

    def __init__(self, lines: Iterator[str], delimiter: str, first_line: int) -> None:
        csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters would refuse a long chart extract
        self.lines = lines
        self.delimiter = delimiter
        self.number = first_line  # of the line at which the current row begins
        self.current: list[str] = []
        self.num_chars = 0
        self.width = 0  # number of values in the first row; 0 before it
        self.has_hidden = False

    def rows(self) -> Iterator[CsvRow]:
        again: list[str] = []
        while True:
            yield from self._whole_rows(again)
            if not self.current:
                return
            first, *others = self.current
            yield self._take([first], None)
            for line in others[:-1]:
                yield self._take([line], self._parse_alone(line))
            again = others[-1:]

    def _whole_rows(self, again: list[str]) -> Iterator[CsvRow]:
        """The rows up to the next broken one, whose lines are then in `current`; or up to the end."""
        self.current, self.num_chars = [], 0
        reader = csv.reader(self._feed(again), delimiter=self.delimiter, strict=True)
        try:
            for values in reader:
                if self._swallows_rows(values):
                    return
                self.width = self.width or len(values)
                yield self._take(self.current, values)
                self.current, self.num_chars = [], 0
        except csv.Error:
            return

    def _swallows_rows(self, values: list[str]) -> bool:
        """Whether a row over several lines has too many values, or too few and only whole rows inside it."""
        if not self.width or len(self.current) == 1 or len(values) == self.width:
            return False
        inside = self.current[1:-1]
        if len(values) > self.width:
            return True
        return bool(inside) and all(len(self._parse_alone(line) or ()) == self.width for line in inside)

    def _feed(self, again: list[str]) -> Iterator[str]:
        for line in chain(again, self.lines):
            self.current.append(line)
            self.num_chars += len(line)
            if self.num_chars > _MAX_ROW_CHARS and len(self.current) > 1:
                raise csv.Error("the row is too long")
            yield self._hide_line_ends(line)

    def _parse_alone(self, line: str) -> list[str] | None:
        try:
            return next(csv.reader([self._hide_line_ends(line)], delimiter=self.delimiter, strict=True))
        except csv.Error:
            return None

    def _take(self, lines: list[str], values: list[str] | None) -> CsvRow:
        """The row of these lines; the next one begins after them."""
        text = "".join(lines).rstrip("\r\n")
        if values and self.has_hidden:
            values = [value.translate(_SHOW) for value in values]
        is_undecodable = any(isinstance(line, UndecodableLine) for line in lines)
        row = CsvRow(self.number, values, text, is_undecodable)
        self.number += len(lines)
        return row

    def _hide_line_ends(self, line: str) -> str:
        """The line with each carriage return or line feed before its end replaced."""
        body = line.rstrip("\r\n")
        if "\r" not in body and "\n" not in body:
            return line
        self.has_hidden = True
        return body.translate(_HIDE) + line[len(body) :]
