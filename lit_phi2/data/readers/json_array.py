"""JSON arrays: one array of objects -> rows, each with the line on which it begins.

    1  [
    2    {"id": "a", ...}, {"id": "b",      ->  (2, {"id": "a"}), ("2:25", {"id": "b"})
    3     ...},
    4    {"id": "c", ...}                   ->  (4, {"id": "c"})
    5  ]

The text is in memory as a whole, its objects one after the other. No part of it is searched twice, so the time is
linear, also where everything is on one line.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_phi2.data.readers.json_lines import read_json_lines
from lit_phi2.data.readers.json_text import DECODER, DuplicateKeyError, explain, skip_whitespace
from lit_phi2.data.readers.rows import Rows
from lit_phi2.data.readers.text_file import has_undecodable, open_text, undecodable_row
from lit_phi2.data.text import quote_names
from lit_phi2.errors import InputError


def read_json(path: Path, encoding: str | None = None) -> Rows:
    """The objects of a .json file: an array, or one object per line.

    Args:
        path: of the file, which may be compressed.
        encoding: data.encoding.

    Raises:
        InputError: the file cannot be read, is in another encoding, or is not valid JSON or another value.
    """
    with open_text(path, encoding) as file:
        text = file.read()
    position = skip_whitespace(text, 0)
    if position == len(text):
        return iter(())
    if text[position] == "[":
        return _read_array(path, text, position + 1, check_bytes=file.has_undecodable)
    if text[position] == "{" and _is_json_lines(text, position):
        return read_json_lines(path, encoding)
    raise InputError(_explain_layout(path, text, position))


def _is_json_lines(text: str, position: int) -> bool:
    """Whether the first line may be a whole object and another one begins the next line that is not empty."""
    end = text.find("\n", position)
    following = skip_whitespace(text, end) if end >= 0 else len(text)
    return text[following : following + 1] == "{" and text[position:end].rstrip(" \t\r,").endswith("}")


def _explain_layout(path: Path, text: str, position: int) -> str:
    expected = "expected an array of objects, [{...}, {...}], or one object per line"
    try:
        value, end = DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        return f"{path}:{error.lineno}: is not valid JSON: {explain(error)}; {expected}."
    except (RecursionError, ValueError):  # nested too deeply, a number of thousands of digits, a name given twice
        return f"{path}: is not a JSON array; {expected}."
    if not isinstance(value, dict):
        return f"{path}: is not a JSON array; {expected}."
    if skip_whitespace(text, end) < len(text):
        return f"{path}: has several values after one another; {expected}."
    names = f"{path}: is one object, with {quote_names(value)}; {expected}."
    lists = [name for name, item in value.items() if isinstance(item, list)]
    if lists:
        return f"{names} Its records may be the list in {quote_names(lists)}: let the file hold that list alone."
    return f"{names} pandas writes an array with orient='records'."


def _read_array(path: Path, text: str, position: int, *, check_bytes: bool) -> Iterator[tuple[int | str, Any]]:
    """The items from a position after the opening bracket on."""
    lines, previous = _LineCounter(text), 0
    position = skip_whitespace(text, position)
    while text[position : position + 1] not in ("]", ""):
        begin, (line, column) = position, lines.place_of(position)
        row, position = _parse_item(path, text, position, line)
        if check_bytes and has_undecodable(text[begin:position]):
            row = undecodable_row(text[begin:position])
        yield f"{line}:{column}" if line == previous else line, row
        previous = line
        position = _skip_separator(path, text, position, lines)
    end = skip_whitespace(text, position + 1)
    if position >= len(text) or end < len(text):
        line, _ = lines.place_of(min(end, len(text)))
        raise InputError(f"{path}:{line}: is not valid JSON: the array is not closed, or more follows it.")


class _LineCounter:
    """Lines and columns of increasing positions, so that no part of a large text is searched twice."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.line = 1
        self.line_start = 0
        self.position = 0

    def place_of(self, position: int) -> tuple[int, int]:
        self.line += self.text.count("\n", self.position, position)
        self.line_start = max(self.line_start, self.text.rfind("\n", self.position, position) + 1)
        self.position = position
        return self.line, position - self.line_start + 1


def _parse_item(path: Path, text: str, position: int, line: int) -> tuple[Any, int]:
    """The item that begins at a position, and the position after it."""
    try:
        return DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        message = f"{path}:{error.lineno}: is not valid JSON: {explain(error)}; expected an array of objects."
        raise InputError(message) from error
    except DuplicateKeyError as error:
        raise InputError(f"{path}:{line}: {error}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        message = f"{path}:{line}: is not valid JSON: {type(error).__name__}; expected objects with text fields."
        raise InputError(message) from error


def _skip_separator(path: Path, text: str, position: int, lines: _LineCounter) -> int:
    """The position of the next item, or of the closing bracket."""
    position = skip_whitespace(text, position)
    if text[position : position + 1] == "]":
        return position
    if text[position : position + 1] != ",":
        line, column = lines.place_of(position)
        at_end = position == len(text)
        reason = "the file ends within the array" if at_end else f"expected ',' or ']' at column {column}"
        raise InputError(f"{path}:{line}: is not valid JSON: {reason}, after an object.")
    following = skip_whitespace(text, position + 1)
    if text[following : following + 1] in ("]", ","):
        line, column = lines.place_of(position)
        raise InputError(f"{path}:{line}: is not valid JSON: no object follows the comma at column {column}.")
    return following
