"""JSON text: decode a value strictly, and explain what is wrong with one in the words of a message.

{"id": 1, "id": 2}          DuplicateKeyError: json would keep the last value and drop the others silently
{"response": NaN}           {"response": None}: what pandas and json.dumps write for an absent value
{"id": 1},                  "a comma follows the object"
"""

import json
import re
from collections import Counter
from typing import Any

from lit_phi2.data.text import is_name

_WHITESPACE = re.compile(r"[ \t\r\n]*")

# What json says where a comma precedes a closing bracket; from Python 3.13 on it names the comma itself.
_AT_TRAILING_COMMA = ("Expecting property name enclosed in double quotes", "Expecting value")


class DuplicateKeyError(ValueError):
    """An object names a field twice."""


def skip_whitespace(text: str, position: int) -> int:
    """The position of the next character that is not JSON's whitespace, or the length of the text."""
    match = _WHITESPACE.match(text, position)
    assert match is not None
    return match.end()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        name = f"the field {repeated!r}" if is_name(repeated) else "a field"
        raise DuplicateKeyError(f"names {name} twice; expected each name once.")
    return row


def _parse_constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)  # Infinity, -Infinity


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_parse_constant)


def explain(error: json.JSONDecodeError) -> str:
    """What is wrong and at which column, without a text of the record.

    >>> try: DECODER.decode('{"id": 1,}')
    ... except json.JSONDecodeError as error: print(explain(error))
    a comma before the closing bracket at column 10
    """
    text, position = error.doc, error.pos
    reason = error.msg
    rest = text[position : position + 10]
    if error.msg in _AT_TRAILING_COMMA and rest[:1] in ("}", "]") and text[:position].rstrip(" \t\r\n")[-1:] == ",":
        reason = "a comma before the closing bracket"
    elif error.msg == _AT_TRAILING_COMMA[0] and rest[:1] == "'":
        reason = "text in single quotes where JSON has double ones"
    elif error.msg == "Expecting value" and re.match(r"(None|True|False)\b", rest):
        reason = "a value as Python writes it; JSON has null, true and false,"
    return f"{reason} at column {error.colno}"
