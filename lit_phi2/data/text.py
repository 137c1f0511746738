"""data/text.py."""

import json
from collections.abc import Iterable
from typing import Any


def is_valid_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def describe_kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds: list[tuple[type, str]] = [
        (bool, "true or false"),
        (int, "a number"),
        (float, "a number"),
        (str, "a text"),
        (list, "a list"),
        (dict, "an object"),
    ]
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)


def shorten(text: str) -> str:
    """A name to show, which in a faulty file may be megabytes long."""
    return text if len(text) <= 60 else text[:57] + "..."


def quote_list(names: Iterable[Any]) -> str:
    shown = [repr(shorten(str(name))) for name in names]
    return ", ".join(shown[:10]) + (", ..." if len(shown) > 10 else "") if shown else "none"


def to_raw_json(row: Any) -> str:
    """The row as JSON; half of a surrogate pair, which no file can hold, as the escape that it came from."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
