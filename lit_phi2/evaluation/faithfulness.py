"""Faithfulness: the amounts, dates and identifiers of a completion that its prompt and its reference lack.

    prompt + reference   "Billed $1,200.00 on May 3, 2025, claim CLM-12345"
    completion           "You owe $1200 since 5/4/2025 on CLM-12345"      ->  {"dates": 1}

Values are compared and not texts: $1,200.00 is $1200, May 3, 2025 is 2025-05-03. A date without a year is that day of
any year. A value that a good answer computes (a difference, a deadline) is in the reference.
"""

import re
from collections.abc import Iterable, Iterator

from lit_phi2.audit.identifiers import KINDS, find_identifiers, plain_text

VALUE_KINDS = ("amounts", "dates", "identifiers")

_IDENTIFIER_KINDS = tuple(kind for kind in KINDS if kind != "dob")  # a date
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = rf"(?P<month>{'|'.join(_MONTHS)})[a-z]*\.?"
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?", re.ASCII)
_AMOUNT = re.compile(
    r"[$€£] ?(\d[\d,]*(?:\.\d+)?)|(\d[\d,]*(?:\.\d+)?) (?:dollars|usd|eur)\b", re.ASCII | re.IGNORECASE
)
_DATES = tuple(
    re.compile(pattern, re.ASCII | re.IGNORECASE)
    for pattern in (
        r"(?<![\d-])(?P<year>\d{4})-(?P<number>\d{1,2})-(?P<day>\d{1,2})(?![\d-])",
        r"(?<![\d/])(?P<number>\d{1,2})/(?P<day>\d{1,2})/(?P<year>\d{4}|\d\d)(?![\d/])",
        rf"\b{_MONTH} (?P<day>\d{{1,2}})(?:st|nd|rd|th)?\b(?:,? (?P<year>\d{{4}})\b)?",
        rf"\b(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?: of)?[ -]{_MONTH}(?:,?[ -](?P<year>\d{{4}})\b)?",
    )
)

Date = tuple[int | None, int, int]  # year, month, day


def unsupported_values(completion: str, sources: Iterable[str]) -> dict[str, int]:
    """How many different values of each kind a completion has that no source has.

    >>> unsupported_values("Pay $20.50 by June 1 on CLM-55555.", ["$20 due 6/1/2026", "CLM-55555"])
    {'amounts': 1, 'dates': 0, 'identifiers': 0}
    """
    source = plain_text("\n".join(sources))
    text = plain_text(completion)
    numbers = {_to_number(match.group()) for match in _NUMBER.finditer(source)}
    dates = set(_dates(source))
    days = {date[1:] for date in dates}
    joined = _letters_and_digits(source)
    return {
        "amounts": len(set(_amounts(text)) - numbers),
        "dates": sum(date not in dates if date[0] else date[1:] not in days for date in set(_dates(text))),
        "identifiers": len({value for value in _identifiers(text) if value not in joined}),
    }


def _amounts(text: str) -> Iterator[float]:
    return (_to_number(match[1] or match[2]) for match in _AMOUNT.finditer(text))


def _to_number(digits: str) -> float:
    return float(digits.replace(",", ""))


def _dates(text: str) -> Iterator[Date]:
    for pattern in _DATES:
        for match in pattern.finditer(text):
            groups = match.groupdict()
            month = int(groups["number"]) if groups.get("number") else _MONTHS.index(groups["month"].lower()) + 1
            year = groups["year"]
            yield (int(year) + (2000 if len(year) == 2 else 0)) if year else None, month, int(groups["day"])


def _identifiers(text: str) -> Iterator[str]:
    return (_letters_and_digits(text[each.start : each.end]) for each in find_identifiers(text, _IDENTIFIER_KINDS))


def _letters_and_digits(text: str) -> str:
    return "".join(filter(str.isalnum, text)).lower()
