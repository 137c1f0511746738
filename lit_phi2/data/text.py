"""Values of a record as they appear in messages and in rejected.jsonl.

    None, 12.5, [..]         -> "null", "a number", "a list"     describe_kind
    a name of 80 characters  -> its first 57 and "..."           shorten
    ["id", "input"]          -> "'id', 'input'"                  quote_list
    {"id": 3}                -> '{"id": 3}'                      to_raw_json

A message may show field names and ids, never the text of a record: records are private.
"""

import json
from collections.abc import Iterable
from typing import Any

_MAX_NAME_CHARS = 60
_MAX_NAMES = 10

_KINDS: tuple[tuple[type, str], ...] = (
    (bool, "a boolean"),  # before int, because bool is a subclass of int
    (int, "a number"),
    (float, "a number"),
    (str, "text"),
    (list, "a list"),
    (dict, "an object"),
)


def describe_kind(value: Any) -> str:
    """The kind of a parsed JSON value, in the words of a message.

    >>> describe_kind(12.5)
    'a number'
    """
    if value is None:
        return "null"
    return next((name for kind, name in _KINDS if isinstance(value, kind)), type(value).__name__)


def shorten(name: str) -> str:
    """A name of at most 60 characters; in a corrupt file a field name may be megabytes long."""
    return name if len(name) <= _MAX_NAME_CHARS else name[: _MAX_NAME_CHARS - 3] + "..."


def quote_list(names: Iterable[Any]) -> str:
    """Names in quotes, at most ten of them.

    >>> quote_list(["id", "input"])
    "'id', 'input'"
    """
    quoted = [repr(shorten(str(name))) for name in names]
    return ", ".join(quoted[:_MAX_NAMES]) + (", ..." if len(quoted) > _MAX_NAMES else "") if quoted else "none"


def is_valid_unicode(text: str) -> bool:
    """Whether UTF-8 can encode the text; half of a surrogate pair, which JSON can escape, cannot be encoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def to_raw_json(row: Any) -> str:
    r"""The row as JSON that a file can hold; half of a surrogate pair stays the escape that it came from.

    >>> to_raw_json({"text": "é\ud83d"})
    '{"text": "é\\ud83d"}'
    """
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
