"""Identifiers are found in every format, told from codes and amounts, and checked by the rules of their issuers."""

import itertools
import random
import re
import string

import pytest

from lit_phi2.audit.identifiers import KINDS, find_identifiers
from lit_phi2.data.sources import CLAIMS_DIR
from lit_phi2.utils.files import read_json_lines
from planted import PLANTED


def found(text: str, *kinds: str) -> list[tuple[str, str]]:
    return [(text[each.start : each.end], each.kind) for each in find_identifiers(text, kinds or KINDS)]


def test_every_kind_has_planted_identifiers() -> None:
    assert set(PLANTED) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_found_in_every_format(kind: str) -> None:
    """Reference: the planted value; what is found covers all of it."""
    for words, value in PLANTED[kind]:
        text = words.format(value)
        covered = [(value in text_found or text_found in value, each) for text_found, each in found(text, kind)]
        assert (True, kind) in covered, text
        assert all(value not in left for left in [text.replace(part, "") for part, _ in found(text, kind)]), text


@pytest.mark.parametrize(
    "text",
    [
        "Procedure 99213 with modifier 25, diagnosis S72.001A, drug J1234, revenue code 0450.",
        "Charge $12,815.12, paid $1412.00 of $1000000, 80% after 2 visits; the claim for 45378 of May 3, 2025.",
        "Notice of 2025-03-29, 3/29/2025 and 20250329; claim of 2025; 45 CFR 162.406; section 1557; ZIP 30301.",
        "CPT 99214-25, 27447-59 and G0439, HCPCS A4253, NDC 0093-7146-56; billed 1250000 dollars; DRG 470; ZIP 30301.",
        "Served 03/12/2025-03/14/2025, 2025-03-12/2025-03-14 and 3-12-25; plan years 2024-2025; member since 2019.",
        "Policy section 4.2.1, Section 12.3(b), sections 1201 and 1305; 29 U.S.C. 1133; 42 CFR 438.404; page 14.",
        "Denial CO-97, PR-204, RARC N130, EOB code 1234; deductible of 2500 of 8700; claim limit 25000; CDT D2740.",
        "30 visits, 12.5 mg, 10:30, 2024, 180 days, 1.25.3, page 12 of 40, ICD-10, COVID-19, B12, W-9, CMS-1500",
    ],
)
def test_codes_dates_and_amounts_are_no_identifiers(text: str) -> None:
    assert found(text) == []


def test_packaged_claims_lose_no_amount_code_or_date() -> None:
    """The references are the shapes of amounts, percentages, dates and codes; all that is found has four digits."""
    amounts = re.compile(r"\$ ?[\d,]+(?:\.\d+)?|[\d.]+ ?%|\b\d+(?:\.\d+)? (?:mg|mL|days?|months?|years?|visits?)\b")
    dates = re.compile(r"\b[A-Z][a-z]+ \d{1,2}, \d{4}|\b\d{1,2}/\d{1,2}/\d{4}|\b\d{4}-\d\d-\d\d")
    codes = re.compile(r"\b(?:\d{5}|[A-Z]\d{4}|[A-Z]\d\d\.\d\w*)\b(?![-\d])")
    num_found = 0
    for record in list(read_json_lines(CLAIMS_DIR / "train.jsonl"))[:400]:
        for text in (record["instruction"], record["input"], record["response"]):
            spans = [match.span() for pattern in (amounts, dates, codes) for match in pattern.finditer(text)]
            for start, end, kind in find_identifiers(text, KINDS):
                num_found += 1
                assert sum(map(str.isdigit, text[start:end])) >= 4
                assert kind == "dob" or not any(first < end and start < last for first, last in spans), text[start:end]
    assert num_found > 1000


def test_check_rules_tell_numbers_from_identifiers() -> None:
    """Reference: CMS's published examples (NPI 1234567893, MBI 1EG4-TE5-MK73), SSA's list of numbers never issued."""
    for invalid in ("000-12-3456", "666-12-3456", "900-12-3456", "123-00-4567", "123-45-0000"):
        assert found(f"number {invalid}", "ssn") == []
    assert found("1234567893", "npi") == [("1234567893", "npi")]
    assert found("1234567890 and 3234567893", "npi") == []
    assert found("1EG4-TE5-MK73", "mbi") == [("1EG4-TE5-MK73", "mbi")]
    # S, L, O, I, B and Z are in no MBI; its first character is no 0, its second no digit.
    for invalid in ("1SG4-TE5-MK73", "0EG4-TE5-MK73", "11G4-TE5-MK73", "1EG4-TE5-MO73", "1EGX-TE5-MK73"):
        assert found(invalid, "mbi") == []
    assert found("4111 1111 1111 1112", "credit_card") == []


def test_words_alone_make_no_social_security_number() -> None:
    """SSA issues none of area 000; the last four of one are often given alone. A long number is one of a claim."""
    assert found("SSN 000121234") == [("000121234", "claim_number")]
    assert found("SSN: 6789") == [("6789", "ssn")]
    assert found("SSN 66612") == []


def test_one_npi_in_ten_random_numbers_is_valid() -> None:
    """Reference: a check digit leaves one of ten numbers; 2,000 draws are within 4 standard deviations of 200."""
    generator = random.Random(0)
    numbers = [f"1{generator.randrange(10**9):09d}" for _ in range(2000)]
    assert 146 <= sum(bool(found(number, "npi")) for number in numbers) <= 254


def test_found_spans_are_in_order_and_never_overlap() -> None:
    generator = random.Random(1)
    words = [words.format(value) for rows in PLANTED.values() for words, value in rows]
    for _ in range(300):
        text = generator.choice(["", " ", "/", "-"]).join(generator.sample(words, 4))
        text += "".join(generator.choices(string.printable, k=20))
        spans = [(each.start, each.end) for each in find_identifiers(text, KINDS)]
        assert all(start < end for start, end in spans)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
