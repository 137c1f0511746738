"""JSON Lines: one object per line -> rows.

    1   {"id": "c-17", "response": "The ..."}     ->  (1, {"id": "c-17", ...})
    2                                                 empty lines are ignored
    3   {"id": "c-18", "response": "The ..."},    ->  (3, UnparsableRow("ends in a comma; ..."))

A file that is JSON in another layout is an InputError that says so: as lines, each of its records would be many
invalid ones.
"""

import json
import re
from pathlib import Path
from typing import Any

from lit_phi2.data.readers.files import STDIN
from lit_phi2.data.readers.json_text import DECODER, DuplicateKeyError, explain
from lit_phi2.data.readers.rows import Rows, UnparsableRow
from lit_phi2.data.readers.text_file import UndecodableLine, open_text, undecodable_row
from lit_phi2.errors import InputError

_WHITESPACE = " \t\r\n\v\f"

_IS_ARRAY = "begins a JSON array, but the file's ending promises one object per line. Let its name end in .json."
_STDIN_IS_ARRAY = "begins a JSON array; expected one object per line, as `jq -c '.[]'` writes them."


def read_json_lines(path: Path, encoding: str | None = None) -> Rows:
    """The objects of a file with one on each line.

    Args:
        path: of the file, which may be compressed.
        encoding: data.encoding.

    Raises:
        InputError: the file cannot be read, is in another encoding, or is an array or has objects over several lines.
    """
    num_rows, location, row = 0, "", None
    is_array = _STDIN_IS_ARRAY if str(path) == STDIN else _IS_ARRAY
    with open_text(path, encoding) as file:
        for number, line in enumerate(file.lines(), start=1):
            if not line.strip(_WHITESPACE):
                continue
            row = undecodable_row(line) if isinstance(line, UndecodableLine) else _parse_line(line)
            num_rows += 1
            if num_rows == 1:
                location = f"{path}:{number}"
                _check_layout(location, line.strip(_WHITESPACE), row, is_array)
            yield number, row
    if num_rows == 1 and isinstance(row, list):
        raise InputError(f"{location}: {is_array}")


def _check_layout(location: str, line: str, row: Any, is_array: str) -> None:
    """Check that the first line does not begin a value that spans lines."""
    if not isinstance(row, UnparsableRow):
        return
    if re.match(r"\[\s*(\{|$)", line):
        raise InputError(f"{location}: {is_array}")
    if line == "{":
        raise InputError(
            f"{location}: begins an object that spans lines; expected one object per line. "
            "Write each object on one line, as `jq -c .` does."
        )


def _parse_line(line: str) -> Any:
    line = line.rstrip("\r\n")
    try:
        return DECODER.decode(line)
    except DuplicateKeyError as error:
        message = str(error)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and line[error.pos :].strip(_WHITESPACE) == ",":
            message = "ends in a comma; expected one object on the line and nothing after it. Remove the comma."
            return UnparsableRow(message, line, once=True)
        message = f"is not valid JSON: {explain(error)}; expected one object on the line."
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        message = f"is not valid JSON: {type(error).__name__}; expected one object with text fields."
    return UnparsableRow(message, line)
