"""Duplicate ids: every later use of an id is reported with the location of its first use."""

import json
from pathlib import Path

import numpy as np

from lit_phi2.data.records import FieldNames, InvalidRecord, Record, read_records


def test_a_duplicate_id_is_reported_with_its_first_location(tmp_path: Path) -> None:
    """Reference: a dict. Two files, many batches, places with and without a column."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.json"
    numbers = np.random.default_rng(0).integers(0, 9000, 12_000).tolist()
    rows = [{"id": f"c{number}", "instruction": "Why?", "response": "So."} for number in numbers]
    one.write_text("".join(json.dumps(row) + "\n" for row in rows[:9000]))
    two.write_text(json.dumps(rows[9000:]))  # all on one line
    records, faults = read_records([str(one), str(two)], FieldNames(), needs_response=True)
    places: dict[str, str] = {}
    expected: list[str] = []
    positions = [f"{one}:{line}" for line in range(1, 9001)]
    column = 2
    for number, row in enumerate(rows[9000:]):
        positions.append(f"{two}:1" if number == 0 else f"{two}:1:{column}")
        column += len(json.dumps(row)) + 2
    for row, place in zip(rows, positions, strict=True):
        if row["id"] in places:
            expected.append(f"{place}: id {row['id']!r} was already used at {places[row['id']]}; ids must be unique.")
        else:
            places[row["id"]] = place
    assert [str(fault) for fault in faults] == expected
    assert [record.location for record in records] == list(places.values())
    assert all(isinstance(one, Record) for one in records)
    assert all(isinstance(one, InvalidRecord) for one in faults)


def test_ids_are_unique_over_all_files(tmp_path: Path) -> None:
    first = write_table(tmp_path / "a.jsonl", ROWS)
    second = write_table(tmp_path / "b.csv", [{**GOOD, "id": "b"}])
    records, faults = read(first, second)
    assert [record.id for record in records] == ["a", "b", "c"]
    assert [fault.location for fault in faults] == [f"{second}:2"]
    records, faults = read(first, first)
    assert len(records) == len(faults) == len(ROWS)
