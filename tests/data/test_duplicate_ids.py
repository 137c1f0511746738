"""Duplicate ids: every later use of an id is reported with the location of its first use."""

import json
from pathlib import Path

import numpy as np

from lit_phi2.data.duplicate_ids import DuplicateIdIndex
from lit_phi2.data.records import InvalidRecord, ReadOptions, Record, read_records


def test_the_index_returns_the_location_of_the_first_use() -> None:
    index = DuplicateIdIndex(["a.jsonl", "b.json"])
    assert index.add("x", (0, 1, 0)) is None
    assert index.add("y", (1, 3, 42)) is None
    assert index.add("x", (1, 7, 0)) == "a.jsonl:1"
    assert index.add("x", (1, 8, 0)) == "a.jsonl:1"
    assert index.add("y", (1, 9, 0)) == "b.json:3:42"


def test_a_duplicate_id_is_reported_with_its_first_location(tmp_path: Path) -> None:
    """Reference: a dict. 12,000 records in two files, with locations by line and by line:column."""
    jsonl, array = tmp_path / "one.jsonl", tmp_path / "two.json"
    numbers = np.random.default_rng(0).integers(0, 9000, 12_000).tolist()
    rows = [{"id": f"c{number}", "instruction": "Why?", "response": "So."} for number in numbers]
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows[:9000]))
    array.write_text(json.dumps(rows[9000:]))  # all on one line
    records, invalid = read_records([str(jsonl), str(array)], ReadOptions(), needs_response=True)
    locations = [f"{jsonl}:{line}" for line in range(1, 9001)]
    column = 2
    for number, row in enumerate(rows[9000:]):
        locations.append(f"{array}:1" if number == 0 else f"{array}:1:{column}")
        column += len(json.dumps(row)) + 2
    first_uses: dict[str, str] = {}
    expected: list[str] = []
    for row, location in zip(rows, locations, strict=True):
        first = first_uses.setdefault(row["id"], location)
        if first != location:
            expected.append(f"{location}: its id was already used at {first}; ids must be unique.")
    assert len(expected) > 3000
    assert [str(record) for record in invalid] == expected
    assert [record.location for record in records] == list(first_uses.values())
    assert all(isinstance(record, Record) for record in records)
    assert all(isinstance(record, InvalidRecord) for record in invalid)


def test_ids_are_unique_over_all_files(tmp_path: Path) -> None:
    """Also over a file that is given twice."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.csv"
    rows = [{"id": name, "instruction": "Why?", "response": "So."} for name in "abc"]
    first.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    second.write_text("id,instruction,response\nb,Why?,So.\n", "utf-8")
    records, invalid = read_records([str(first), str(second)], ReadOptions(), needs_response=True)
    assert [record.id for record in records] == ["a", "b", "c"]
    assert [record.location for record in invalid] == [f"{second}:2"]
    records, invalid = read_records([str(first), str(first)], ReadOptions(), needs_response=True)
    assert len(records) == len(invalid) == len(rows)
