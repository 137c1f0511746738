"""Redaction: identifiers of a record -> placeholders, before the record is tokenized, cached, shown or written.

    instruction  "Why was CLM-2024-00017 denied?"        "Why was [CLAIM_NUMBER_1] denied?"
    input        "Member M79184741, M80000001"       ->  "Member [MEMBER_ID_1], [MEMBER_ID_2]"
    response     "Ask about CLM-2024-00017."             "Ask about [CLAIM_NUMBER_1]."

Within a record the same value has the same placeholder, in whatever format it is written. A value that the words before
it explain once ("claim 42708978") is replaced wherever the record repeats it, also where no such word precedes it.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from lit_phi2.audit.identifiers import KINDS, VALUE, Identifier, find_identifiers, plain_text, without_overlaps
from lit_phi2.errors import InputError

_MIN_REPEATED = 5  # characters of a value that is searched for on its own; shorter ones occur by chance
_PLACEHOLDER = re.compile(rf"\[({'|'.join(kind.upper() for kind in KINDS)})_(\d{{1,6}})\]")
_LOWER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")  # keeps the length of any text


class Redacted(NamedTuple):
    """Texts with placeholders, and the kind of each placeholder that was put in, as often as it was."""

    texts: list[str]
    kinds: list[str]


def check_kinds(kinds: str | Sequence[str] | None, setting: str) -> tuple[str, ...]:
    """The kinds in the order of KINDS, each once; null is none, "all" every kind.

    Raises:
        InputError: one is unknown; it is not shown if it has digits, as a value given by mistake would.

    >>> check_kinds(["ssn", "email", "ssn"], "data.redact")
    ('email', 'ssn')
    """
    names = [kinds] if isinstance(kinds, str) else list(kinds or [])
    for name in names:
        if name not in (*KINDS, "all"):
            shown = repr(name) if name.replace("_", "").isalpha() else "a kind"
            raise InputError(f"{setting}: {shown} is unknown; expected all, or some of {', '.join(KINDS)}.")
    return tuple(kind for kind in KINDS if kind in names or "all" in names)


def redact(texts: Sequence[str], kinds: Collection[str]) -> Redacted:
    """Redact the texts of one record together.

    The placeholders of a text depend on the texts before it and not on those after it, as far as the words before a
    value explain it: a completion can be added at the end. Numbers go on after those of placeholders already there.

    >>> redact(["Is M79184741 covered?", "Yes, m79184741 is."], ["member_id"]).texts
    ['Is [MEMBER_ID_1] covered?', 'Yes, [MEMBER_ID_1] is.']
    """
    if not kinds:
        return Redacted(list(texts), [])
    plain = [plain_text(text).translate(_LOWER) for text in texts]
    found = [find_identifiers(text, kinds) for text in texts]
    if not any(found):
        return Redacted(list(texts), [])
    kind_of: dict[str, str] = {}
    for text, identifiers in zip(plain, found, strict=True):
        for each in identifiers:
            kind_of.setdefault(text[each.start : each.end], each.kind)  # the first use of a value decides
    names = _Names()
    redacted, put_in = [], []
    for original, text, identifiers in zip(texts, plain, found, strict=True):
        names.keep(original)
        parts, end = [], 0
        for each in _with_repeated(text, identifiers, kind_of):
            value = text[each.start : each.end]
            kind = kind_of.get(value, each.kind)
            parts += [original[end : each.start], names.placeholder(kind, value)]
            end = each.end
            put_in.append(kind)
        redacted.append("".join([*parts, original[end:]]))
    return Redacted(redacted, put_in)


def redacted_id(record_id: str, default_id: str, kinds: Collection[str]) -> str:
    """The id of a record, or the default id if it holds an identifier; placeholders would not tell records apart."""
    return record_id if redact([record_id], kinds).texts == [record_id] else default_id


class _Names:
    """The placeholders of a record's values."""

    def __init__(self) -> None:
        self._number: dict[tuple[str, str], int] = {}
        self._last: dict[str, int] = {}

    def keep(self, text: str) -> None:
        """Do not use the placeholders that a text has already."""
        if "[" in text:
            for match in _PLACEHOLDER.finditer(text):
                kind = match[1].lower()
                self._last[kind] = max(self._last.get(kind, 0), int(match[2]))

    def placeholder(self, kind: str, value: str) -> str:
        key = kind, "".join(filter(str.isalnum, value)) if kind != "email" else value
        if key not in self._number:
            self._number[key] = self._last[kind] = self._last.get(kind, 0) + 1
        return f"[{kind.upper()}_{self._number[key]}]"


def _with_repeated(plain: str, identifiers: list[Identifier], kind_of: Mapping[str, str]) -> list[Identifier]:
    """The identifiers of a text, and the values that the record explains elsewhere."""
    values = (match for match in VALUE.finditer(plain) if match.end() - match.start() >= _MIN_REPEATED)
    found = [Identifier(*match.span(), kind_of[match.group()]) for match in values if match.group() in kind_of]
    for date in (value for value, kind in kind_of.items() if kind == "dob"):
        start = plain.find(date)
        while start >= 0:
            found.append(Identifier(start, start + len(date), "dob"))
            start = plain.find(date, start + len(date))
    return without_overlaps([*identifiers, *found]) if found else identifiers
