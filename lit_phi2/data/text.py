"""Values of a record: their checks, and how they appear in messages and in rejected.jsonl.

    None, 12.5, [..]                   -> "null", "a number", "a list"     describe_kind
    ["id", "input"]                    -> "'id', 'input'"                  quote_names
    ["id", "Why was it denied?"]       -> "'id' and 1 other"
    {"id": 3}                          -> '{"id": 3}'                      to_raw_json

A message may show the name of a field, and never a value: records are private. A field whose name does not look like
one is counted and not shown, because the first line of a CSV file without a header is a record.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from lit_phi2.data.invalid import RecordError

NOT_UNICODE = "holds half of a surrogate pair; expected whole characters."

_MAX_NAMES = 10
# As in code, and with two digits at most: neither a sentence nor a claim number nor a date is a name.
_NAME = re.compile(r"(?!.*[0-9].*[0-9].*[0-9])[A-Za-z_][A-Za-z0-9_-]{0,39}")

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


def is_name(text: Any) -> bool:
    """Whether a text looks like the name of a field, so that a message may show it.

    >>> [is_name(text) for text in ("claim_id", "icd10-code", "CLM-4417", "Why was it denied?")]
    [True, True, False, False]
    """
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def quote_names(names: Iterable[Any]) -> str:
    """Names of fields in quotes, at most ten of them, and the number of the others.

    >>> quote_names(["id", "input"])
    "'id', 'input'"
    >>> quote_names(["id", "Why was it denied?"])
    "'id' and 1 other"
    """
    all_names = list(names)
    shown = [repr(name) for name in all_names if is_name(name)][:_MAX_NAMES]
    num_others = len(all_names) - len(shown)
    others = [f"{num_others} other{'s' if num_others > 1 else ''}"] if num_others else []
    return " and ".join([", ".join(shown)] * bool(shown) + others) or "none"


def is_valid_unicode(text: str) -> bool:
    """Whether UTF-8 can encode the text; half of a surrogate pair, which JSON can escape, cannot be encoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_text(value: Any, place: str) -> str:
    """The value, which is text with more than whitespace.

    Args:
        value: of a field.
        place: for messages, such as "field 'response'".

    Raises:
        RecordError: it is not.
    """
    if value is None:
        raise RecordError(f"{place} has no value; expected text.")
    if not isinstance(value, str):
        raise RecordError(f"{place} is {describe_kind(value)}; expected text.")
    if not value or value.isspace():
        raise RecordError(f"{place} is {'blank' if value else 'empty'}; expected text.")
    if not is_valid_unicode(value):
        raise RecordError(f"{place} {NOT_UNICODE}")
    return value


def to_raw_json(row: Any) -> str:
    r"""The row as JSON that a file can hold; half of a surrogate pair stays the escape that it came from.

    >>> to_raw_json({"text": "é\ud83d"})
    '{"text": "é\\ud83d"}'
    """
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
