"""Rows: what every reader yields, one for each record of a file.

(17, {"instruction": "Why ...", "response": "The ..."})     a parsed row, and the line on which it begins
("18:42", {"instruction": ...})                             the second object on a line: line:column
(19, UnparsableRow("is not valid JSON: ...", "{..."))        costs one record
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lit_phi2.data.text import is_name
from lit_phi2.errors import InputError

Rows = Iterator[tuple[int | str, Any]]  # line, and the parsed row or an UnparsableRow


@dataclass(frozen=True, slots=True)
class UnparsableRow:
    """A row that could not be parsed.

    Attributes:
        message: what was found and what was expected, without a text of the row.
        raw: its text as it is in the file.
        once: the fault is one of the whole file, so that one line names it however few the rows are.
    """

    message: str
    raw: str
    once: bool = False


def check_column_names(location: str, columns: Sequence[str]) -> None:
    """Check that no column is named twice; columns without a name are ignored, as spreadsheets append them.

    Raises:
        InputError: a name occurs twice.
    """
    repeated = [name for name, count in Counter(columns).items() if name and count > 1]
    if repeated:
        name = repr(repeated[0]) if is_name(repeated[0]) else "of one name"
        raise InputError(f"{location}: has several columns {name}; expected each name once.")


def without_nan(value: Any) -> Any:
    """The value with each NaN, by which pandas marks an absent value, as None.

    >>> without_nan({"response": float("nan"), "facts": [1.5, "nan"]})
    {'response': None, 'facts': [1.5, 'nan']}
    """
    if isinstance(value, float):
        return value if value == value else None
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    return value
