"""Invalid records: one line for a cause that many records share, and every record counted."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_phi2.data.invalid import MAX_SHOWN, InvalidRecord, describe_invalid, raise_invalid
from lit_phi2.data.records import ReadOptions, read_records
from lit_phi2.errors import InputError


def faults(message: str, lines: range) -> list[InvalidRecord]:
    return [InvalidRecord(f"a.jsonl:{line}", message.format(line=line), "{}") for line in lines]


def counted(lines: list[str]) -> int:
    """How many records the lines account for, by the numbers in them."""
    numbers = [re.match(r"(?:\.\.\. and )?(\d+) (?:records,|more)", line) for line in lines]
    return sum(int(number[1]) if number else 1 for number in numbers)


def test_a_cause_of_more_than_20_records_is_one_line(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl([{"instruction": "Why?"} for _ in range(23)])
    _, invalid = read_records([str(path)], ReadOptions(), needs_response=True)
    with pytest.raises(InputError) as raised:
        raise_invalid(invalid, setting="data.train_files")
    line, total = str(raised.value).splitlines()
    places = f"{path}:1, {path}:2 and {path}:3"
    assert line.startswith(f"23 records, the first at {places}: has no field 'response'; it has 'instruction'.")
    assert total.startswith("23 invalid records in data.train_files. Fix them, or set data.on_bad_record to 'skip'")


def test_the_next_cause_follows_the_first_in_order() -> None:
    """5,000 records of one fault hide none of the others; the order is that of the first record of each line."""
    invalid = [*faults("is blank.", range(10, 5010)), *faults("is a list.", range(9000, 9025))]
    invalid[3:3] = faults("is null.", range(1, 3))
    assert describe_invalid(invalid) == [
        "5000 records, the first at a.jsonl:10, a.jsonl:11 and a.jsonl:12: is blank.",
        "a.jsonl:1: is null.",
        "a.jsonl:2: is null.",
        "25 records, the first at a.jsonl:9000, a.jsonl:9001 and a.jsonl:9002: is a list.",
    ]


def test_messages_that_differ_in_numbers_have_one_cause() -> None:
    """The column of a syntax error, the tokens of a record: the line quotes the first record's."""
    invalid = faults("is not valid JSON at column {line}.", range(1, 31))
    assert describe_invalid(invalid) == [
        "30 records, the first at a.jsonl:1, a.jsonl:2 and a.jsonl:3; a.jsonl:1: is not valid JSON at column 1."
    ]


def test_records_that_lack_a_field_have_one_cause_whatever_they_have(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl([{"instruction": "Why?", f"x{chr(97 + n)}": n} for n in range(25)])
    _, invalid = read_records([str(path)], ReadOptions(), needs_response=True)
    assert len(invalid) == 25
    assert len(describe_invalid(invalid)) == 1


def test_20_invalid_records_have_a_line_each(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl([{"instruction": "Why?"} for _ in range(20)])
    _, invalid = read_records([str(path)], ReadOptions(), needs_response=True)
    with pytest.raises(InputError) as raised:
        raise_invalid(invalid, setting="data.train_files")
    lines = str(raised.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:20]] == [f"{path}:{number}" for number in range(1, 21)]
    assert len(lines) == 21


def test_small_causes_become_a_line_where_20_lines_are_too_few() -> None:
    """Two causes of 15: 30 lines would hide some of the second."""
    invalid = [*faults("is blank.", range(15)), *faults("is a list.", range(15, 30))]
    lines = describe_invalid(invalid)
    assert len(lines) == 2
    assert counted(lines) == 30


@pytest.mark.parametrize("sizes", [[1] * 23, [2] * 21, [1, 19, 1], [40] * 25, [3, 21, 7, 1, 9], [20, 20]])
def test_every_invalid_record_is_counted_in_at_most_21_lines(sizes: list[int]) -> None:
    invalid: list[InvalidRecord] = []
    for number, size in enumerate(sizes):
        invalid += faults(f"cause {chr(97 + number)}.", range(len(invalid), len(invalid) + size))
    lines = describe_invalid(invalid)
    assert len(lines) <= MAX_SHOWN + 1
    assert counted(lines) == sum(sizes)
    if len(sizes) <= MAX_SHOWN:
        assert all(any(f"cause {chr(97 + number)}." in line for line in lines) for number in range(len(sizes)))


def test_no_invalid_records_raise_no_error() -> None:
    raise_invalid([], setting="data.train_files")
    assert describe_invalid([]) == []
