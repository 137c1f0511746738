"""Identifiers: where a text names a person, a claim or a provider, by patterns, check digits and the words before.

    "Member M79184741, NPI 1234567893, call 555-201-3344"
      ->  (7, 16, member_id), (22, 32, npi), (39, 51, phone)

A kind has a shape that is enough alone (an e-mail address, CLM-2024-00017), a check rule (NPI, MBI, cards), or words
before it ("file 4270", "date of birth: 4/12/1980"); any other number of seven digits or more that is no date counts as
a claim number. Names and addresses have none of these and are not found.

Everything here is linear in the length of the text: each pattern begins at a digit or at a fixed letter, and words are
looked up in the few characters before a candidate. Fullwidth digits and other dashes and spaces of Unicode count as
the plain ones.
"""

import re
from bisect import bisect
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

# In the order of preference where two claim the same characters.
KINDS = (
    *("email", "mbi", "ssn", "credit_card", "npi", "dob", "phone", "tax_id", "prescription", "authorization"),
    *("referral", "policy_number", "medical_record", "account_number", "member_id", "claim_number"),
)


class Identifier(NamedTuple):
    """Characters start to end of a text, and what they are."""

    start: int
    end: int
    kind: str


def find_identifiers(text: str, kinds: Collection[str]) -> list[Identifier]:
    """The identifiers of these kinds in a text, in order; no two overlap.

    >>> find_identifiers("Claim CLM-2024-00017 of jo@x.org", KINDS)
    [Identifier(start=6, end=20, kind='claim_number'), Identifier(start=24, end=32, kind='email')]
    """
    plain = plain_text(text)
    found = []
    if "@" in plain and "email" in kinds:
        found += [Identifier(*match.span(), "email") for match in _EMAIL.finditer(plain)]
    if _DIGIT.search(plain):
        # Every kind is looked for, so that the digits of one that may stay are not taken for another.
        found += [*_by_shape(plain), *_by_words(plain), *_birth_dates(plain)]
    return [each for each in without_overlaps(found) if each.kind in kinds]


def plain_text(text: str) -> str:
    """The text with plain digits, dashes and spaces in place of others of Unicode; the same length."""
    return text if text.isascii() else text.translate(_PLAIN)


# Digits of all scripts that Python's int() reads would do too; these are those that keyboards and PDF files produce.
_PLAIN = str.maketrans(
    {0xFF10 + digit: str(digit) for digit in range(10)}
    | dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d\u00ad"), "-")
    | dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2007\u2009\u200a\u202f\u3000"), " ")
    | {"\uff20": "@", "\uff0e": ".", "\uff08": "(", "\uff09": ")", "\uff0b": "+"}
)

_DIGIT = re.compile(r"\d", re.ASCII)
_EMAIL = re.compile(r"[\w.+%'-]*[\w+]@[\w-]+(?:\.[\w-]*\w)+")


# Shapes that are enough alone


def _luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1, annex B).

    >>> _luhn("79927398713"), _luhn("79927398710")
    (True, False)
    """
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def _is_npi(digits: str) -> bool:
    """A National Provider Identifier: Luhn over 80840 and its ten digits (45 CFR 162.406).

    >>> _is_npi("1234567893"), _is_npi("1234567890")
    (True, False)
    """
    return len(digits) == 10 and digits[0] in "12" and _luhn("80840" + digits)


def _is_ssn(digits: str) -> bool:
    """A Social Security number that may be issued: area not 000, 666 or above 899, group not 00, serial not 0000.

    >>> [_is_ssn(digits) for digits in ("219099999", "000121234", "666121234", "900121234", "219001234", "219090000")]
    [True, False, False, False, False, False]
    """
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    return len(digits) == 9 and area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def _is_card(digits: str) -> bool:
    return digits[0] in "3456" and _luhn(digits)


# A Medicare Beneficiary Identifier: C A AN N A AN N A A N N, without the letters S L O I B Z (CMS, "Understanding the
# MBI format"); its dashes are optional.
_A = "[AC-HJKMNP-RT-Yac-hjkmnp-rt-y]"
_AN = "[0-9AC-HJKMNP-RT-Yac-hjkmnp-rt-y]"
_MBI = rf"(?<![0-9A-Za-z])[1-9]{_A}{_AN}\d[- ]?{_A}{_AN}\d[- ]?{_A}{_A}\d\d(?![0-9A-Za-z])"

_SHAPES: tuple[tuple[str, re.Pattern[str], Callable[[str], bool] | None], ...] = tuple(
    (kind, re.compile(pattern, re.ASCII), is_valid)
    for kind, pattern, is_valid in (
        ("mbi", _MBI, None),
        ("ssn", r"(?<![0-9A-Za-z])\d{3}([-. /])\d{2}\1\d{4}(?![0-9A-Za-z])", _is_ssn),
        ("credit_card", r"(?<![0-9A-Za-z])\d{4}[- ]?\d{4}[- ]?\d{4}[- ]?\d{1,7}(?![0-9A-Za-z])", _is_card),
        ("credit_card", r"(?<![0-9A-Za-z])3[47]\d\d[- ]?\d{6}[- ]?\d{5}(?![0-9A-Za-z])", _is_card),
        ("npi", r"(?<![0-9A-Za-z])[12]\d{3}[- ]?\d{3}[- ]?\d{3}(?![0-9A-Za-z])", _is_npi),
        (
            "phone",
            r"(?<![0-9A-Za-z])(?:\+?1[-. /]?)?\(?[2-9]\d\d\)?[-. /]{1,2}[2-9]\d\d[-. ]\d{4}(?![0-9A-Za-z])",
            None,
        ),
        (
            "phone",
            r"\+\d{1,3}(?:[-. /]{0,2}\(?\d{1,4}\)?){2,5}\d(?![0-9A-Za-z])",
            lambda digits: 8 <= len(digits) <= 15,
        ),
        ("phone", r"(?<![0-9A-Za-z])\([2-9]\d\d\) ?\d{7}(?![0-9A-Za-z])", None),
        ("tax_id", r"(?<![0-9A-Za-z])\d{2}-\d{7}(?![0-9A-Za-z-])", None),
        ("authorization", r"(?<![0-9A-Za-z])(?i:PA|AUTH)[-# ]?\d[\d-]{4,14}\d(?![0-9A-Za-z])", None),
        ("prescription", r"(?<![0-9A-Za-z])(?i:RX)[-# ]{0,2}\d{6,12}(?![0-9A-Za-z])", None),
        ("referral", r"(?<![0-9A-Za-z])(?i:REF)[-#]\d[\d-]{4,14}\d(?![0-9A-Za-z])", None),
        ("medical_record", r"(?<![0-9A-Za-z])(?i:MRN)[-#]?\d{5,12}(?![0-9A-Za-z])", None),
        ("claim_number", r"(?<![0-9A-Za-z])(?i:CLM|CLAIM)[-#_/]?\d[\d/-]{3,18}\d(?![0-9A-Za-z])", None),
        ("member_id", r"(?<![0-9A-Za-z])(?:[A-Za-z]\d{8,11}|[A-Za-z]{3}\d{9,12})(?![0-9A-Za-z])", None),
        ("claim_number", r"(?<![0-9A-Za-z])[A-Za-z]{2}(?:-\d{6,9}|\d{7,10})(?![0-9A-Za-z])", None),
    )
)


def _by_shape(plain: str) -> Iterator[Identifier]:
    for kind, pattern, is_valid in _SHAPES:
        for match in pattern.finditer(plain):
            if is_valid is None or is_valid(_digits(match.group())):
                yield Identifier(*match.span(), kind)


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


# Values that the words before them explain

VALUE = re.compile(r"(?<![0-9A-Za-z$])(?<!\d[.,])(?=[A-Za-z/_-]{0,20}\d)[0-9A-Za-z]+(?:[-/_][0-9A-Za-z]+)*", re.ASCII)
_SPACED = re.compile(r"(?: \d{2,6}){1,4}(?![0-9A-Za-z-])", re.ASCII)  # the rest of a value such as 400 88 217
_MIN_DIGITS, _MIN_DIGITS_ALONE = 4, 7
_BEFORE = 48  # characters that may hold the words
# Not "for" and "of": what follows them is as often the code of a procedure.
_BETWEEN = "is|was|are|no|num|number|nr|ids?|identifier|file|note|the|ending|in|last|four|digits"
_GAP = rf"(?:\W{{1,5}}(?:{_BETWEEN})\b){{0,5}}\W{{0,5}}\Z"
_NUMBER = r"(?:\W{1,4}|_)(?:\w+ )?(?:no|num|number|nr|id|identifier|#)"
_WORDS = re.compile(
    r"(?<![0-9A-Za-z])(?:"
    rf"(?P<ssn>ssn?|social security(?:{_NUMBER})?|soc\.? sec\.?)"
    r"|(?P<phone>phone|telephone|tel|fax|cell|mobile|call(?: me| us| back)?(?: at)?|reach(?: me| us)?(?: at)?)"
    r"|(?P<tax_id>tax id|tax payer id|taxpayer id|tin|ein|fein|itin)"
    rf"|(?P<authorization>(?:prior |pre-?)?auth(?:orization|orisation)?(?:{_NUMBER})?)"
    rf"|(?P<referral>referral(?:{_NUMBER})?)"
    rf"|(?P<prescription>rx|prescription(?:{_NUMBER})?)"
    rf"|(?P<policy_number>(?:policy|certificate|contract|group|grp)(?:{_NUMBER})?)"
    rf"|(?P<medical_record>mrn|(?:medical record|chart|patient)(?:{_NUMBER}))"
    rf"|(?P<account_number>(?:account|acct|routing|iban)(?:{_NUMBER})?)"
    rf"|(?P<member_id>(?:member|subscriber|enrollee|beneficiary|insured|policyholder|cardholder)(?:{_NUMBER})?|ids?)"
    r"|(?P<code>ndc|cpt|hcpcs|cdt)"
    r"|(?P<claim_number>claims?|file|reference|ref|case|icn|dcn|tcn|number|no|nr|num)"
    rf"){_GAP}",
    re.IGNORECASE | re.ASCII,
)
_DATE = re.compile(
    r"(?:19|20)\d\d(?:[-/]\d{1,2}){0,2}|20\d\d[01]\d[0-3]\d|\d{1,2}[-/]\d{1,2}[-/](?:\d{4}|\d\d)", re.ASCII
)  # or a year
_NO_IDENTIFIER = re.compile(  # where no words before it say otherwise: two dates; a procedure with a modifier
    rf"(?:{_DATE.pattern})[-/](?:{_DATE.pattern})|[0-9A-Z]\d{{4}}-\d\d", re.ASCII
)
_UNIT = re.compile(r" ?(?:dollars|usd|eur|%)", re.IGNORECASE)


def _by_words(plain: str) -> Iterator[Identifier]:
    """Values with at least four digits after the words of a kind, and with seven after no such words; no dates."""
    for match in VALUE.finditer(plain):
        value = match.group()
        digits = _digits(value)
        if len(digits) < 2 or _DATE.fullmatch(value):
            continue
        start, end = match.span()
        if rest := _SPACED.match(plain, end) if value == digits else None:
            end, digits = rest.end(), digits + _digits(rest.group())
        if len(digits) < _MIN_DIGITS:
            continue
        words = _WORDS.search(plain, max(0, start - _BEFORE), start)
        kind = words.lastgroup if words else None
        if kind == "code" or _UNIT.match(plain, end):
            continue
        if kind == "ssn" and not (len(digits) == 4 or _is_ssn(digits)):  # four: the last of a masked number
            kind = None
        if kind == "phone" and len(digits) not in (7, 10, 11):
            kind = None
        if kind is None and len(digits) >= _MIN_DIGITS_ALONE and not _NO_IDENTIFIER.fullmatch(value):
            kind = "claim_number"  # in records of claims, a long number without a name
        if kind is not None:
            yield Identifier(start, end, kind)


_BIRTH = re.compile(r"birth|born|d\.?o\.?b", re.IGNORECASE)
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_BIRTH_DATE = re.compile(
    r"(?<![a-z])(?:d\.?o\.?b\b\.?|date[ _]of[ _]birth|birth[ _-]?dates?|birthday|birth|born)"
    r"(?:\W{0,5}(?:is|was|on|the|of|:)\b){0,2}\W{0,6}"
    rf"(?P<date>\d{{4}}[-/. ]\d{{1,2}}[-/. ]\d{{1,2}}|\d{{1,2}}[-/. ]\d{{1,2}}[-/. ]\d{{2,4}}|\d{{8}}"
    rf"|{_MONTH} {{0,2}}{_DAY},? {{0,2}}(?:of )?\d{{4}}|{_MONTH} \d{{4}}"
    rf"|(?:the )?{_DAY}[- ](?:of )?{_MONTH}[-, ]{{1,2}}\d{{2,4}}"
    r")(?![0-9A-Za-z])",
    re.IGNORECASE | re.ASCII,
)


def _birth_dates(plain: str) -> Iterator[Identifier]:
    if not _BIRTH.search(plain):
        return
    for match in _BIRTH_DATE.finditer(plain):
        yield Identifier(*match.span("date"), "dob")


def without_overlaps(found: list[Identifier]) -> list[Identifier]:
    """In order; of those that overlap, the longest, and of equally long ones the first of KINDS."""
    found.sort(key=lambda each: (each.start - each.end, KINDS.index(each.kind)))
    kept: list[Identifier] = []
    for each in found:
        place = bisect(kept, each)
        starts_free = place == 0 or kept[place - 1].end <= each.start
        if starts_free and (place == len(kept) or each.end <= kept[place].start):
            kept.insert(place, each)
    return kept
