"""Invalid records: each with its location, the reason and its text; many with one cause become one line.

    mine.jsonl:3   field 'response' is empty; ...   ->   2000 records, the first at mine.jsonl:3, mine.jsonl:9 and
    mine.jsonl:9   field 'response' is empty; ...          mine.jsonl:12: field 'response' is empty; ...
    ...            (2000 such records)
    mine.jsonl:40  is not valid JSON: ...           ->   mine.jsonl:40: is not valid JSON: ...

Two records share a cause if their messages differ in numbers alone, such as the column of a syntax error.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lit_phi2.errors import InputError

MAX_SHOWN = 20  # lines about invalid records, and the most records with one cause that have a line each

_MAX_PLACES = 3  # locations that the line of a shared cause names


class RecordError(ValueError):
    """A row is not a valid record.

    Args:
        message: what was found and what was expected, without a text of the record.
        cause: the message without what varies between records with the same fault; by default the message itself.
        once: the fault is one of the whole file, so that one line names it however few the records are.
    """

    def __init__(self, message: str, cause: str = "", *, once: bool = False) -> None:
        super().__init__(message)
        self.cause = cause
        self.once = once


@dataclass(frozen=True, slots=True)
class InvalidRecord:
    """A record that cannot be used.

    Attributes:
        location: `path:line`.
        message: what was found and what was expected, without a text of the record.
        raw: the text of the record, for rejected.jsonl.
        cause, once: as in RecordError.
        record_id: where it is known; if `forgotten`, its digest.
        content: digest of its texts (`identity.py`), where they are known.
        forgotten: data.without names it; `raw` is then empty.
    """

    location: str
    message: str
    raw: str
    cause: str = ""
    once: bool = False
    record_id: str = ""
    content: str = ""
    forgotten: bool = False

    def __str__(self) -> str:
        return f"{self.location}: {self.message}"


def describe_invalid(records: Sequence[InvalidRecord]) -> list[str]:
    """At most 20 lines in the order of the records, and the number of records that have none.

    A cause of more than 20 records is one line; so is one of fewer where 20 lines would not name every cause.

    Args:
        records: in the order of their files; may be empty.
    """
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(re.sub(r"\d+", "0", record.cause or record.message), []).append(index)
    num_lines, limit = MAX_SHOWN + 1, MAX_SHOWN + 1
    while num_lines > MAX_SHOWN and limit > 1:
        limit -= 1
        num_lines = sum(1 if _is_one_line(records, group, limit) else len(group) for group in groups.values())
    lines: list[tuple[int, int, str]] = []  # index of the first record, number of records, text
    for group in groups.values():
        if _is_one_line(records, group, limit):
            lines.append((group[0], len(group), _group_line([records[index] for index in group])))
        else:
            lines += [(index, 1, str(records[index])) for index in group]
    lines.sort()
    num_others = sum(count for _, count, _ in lines[MAX_SHOWN:])
    return [line for _, _, line in lines[:MAX_SHOWN]] + ([f"... and {num_others} more"] if num_others else [])


def raise_invalid(invalid: Sequence[InvalidRecord], *, setting: str) -> None:
    """Raise if there are invalid records: what `describe_invalid` says of them, and their number.

    Args:
        invalid: may be empty.
        setting: the config key that named their files.

    Raises:
        InputError: at least one record is invalid.
    """
    if not invalid:
        return
    noun, pronoun = ("record", "it") if len(invalid) == 1 else ("records", "them")
    summary = (
        f"{len(invalid)} invalid {noun} in {setting}. "
        f"Fix {pronoun}, or set data.on_bad_record to 'skip' to leave {pronoun} out."
    )
    raise InputError("\n".join([*describe_invalid(invalid), summary]))


def _is_one_line(records: Sequence[InvalidRecord], group: Sequence[int], limit: int) -> bool:
    return len(group) > limit or (records[group[0]].once and len(group) > 1)


def _group_line(group: Sequence[InvalidRecord]) -> str:
    *places, last = [record.location for record in group[:_MAX_PLACES]]
    first = "at" if len(group) <= _MAX_PLACES else "the first at"
    are_equal = len({record.message for record in group}) == 1
    message = f": {group[0].message}" if are_equal else f"; {group[0]}"
    return f"{len(group)} records, {first} {', '.join(places)} and {last}{message}"
