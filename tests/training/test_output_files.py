"""The formats of predictions; references are readers that are not ours: json, csv, pyarrow."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from lit_phi2.data.records import FieldNames, ReadOptions, read_records
from lit_phi2.errors import InputError
from lit_phi2.training import output_files
from lit_phi2.training.output_files import check_format, write_predictions

ROWS: list[dict[str, Any]] = [
    {
        "id": "a",
        "instruction": 'Quote "this", please',
        "input": "two\nlines\r\nand\rmore",
        "reference": "Because.",
        "completion": "Señora,\u2028日本 🙂",
        "finish_reason": "stop",
        "new_tokens": 3,
    },
    {
        "id": "b",
        "instruction": "Why?",
        "input": "",
        "completion": "",
        "finish_reason": "length",
        "new_tokens": 400,
        "truncated": True,
    },
]


def read_csv(file: Path) -> list[dict[str, str]]:
    text = file.read_bytes().decode("utf-8-sig")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_a_csv_file_has_every_field_in_its_column(tmp_path: Path) -> None:
    file = tmp_path / "out.CSV"
    write_predictions(file, ROWS)
    first, second = read_csv(file)
    assert {name: first[name] for name in ROWS[0]} == ROWS[0] | {"new_tokens": "3"}
    assert {name: second[name] for name in ROWS[1]} == ROWS[1] | {"new_tokens": "400", "truncated": "true"}
    assert (first["truncated"], second["reference"]) == ("false", "")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_cell_of_a_csv_file_is_a_formula(start: str, tmp_path: Path) -> None:
    """OWASP's list of first characters, "CSV injection"; in JSON Lines the text is as it was."""
    row = {name: f'{start}HYPERLINK("x")' if isinstance(value, str) else value for name, value in ROWS[0].items()}
    write_predictions(tmp_path / "out.csv", [row])
    (cells,) = read_csv(tmp_path / "out.csv")
    assert all(cells[name] == f"'{row[name]}" for name in ("id", "instruction", "input", "reference", "completion"))
    write_predictions(tmp_path / "out.jsonl", [row])
    assert json.loads((tmp_path / "out.jsonl").read_text("utf-8")) == row


def test_a_parquet_file_has_types_and_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_files, "ROW_GROUP", 2)
    file = tmp_path / "out.parquet"
    write_predictions(file, [*ROWS, ROWS[0]])
    table = parquet.read_table(file)
    absent = {"reference": None, "truncated": False}
    assert table.to_pylist() == [absent | row for row in [*ROWS, ROWS[0]]]
    types = {name: str(table.schema.field(name).type) for name in table.schema.names}
    assert types.pop("new_tokens") == "int64"
    assert types.pop("truncated") == "bool"
    assert set(types.values()) == {"string"}
    assert parquet.ParquetFile(file).num_row_groups == 2


def test_a_parquet_file_is_written_group_by_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first group is on disk before the last record is asked for: memory does not grow with the records."""
    monkeypatch.setattr(output_files, "ROW_GROUP", 10)
    file = tmp_path / "out.parquet"
    sizes: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(2000):
            if number == 1999:
                sizes.append((tmp_path / "out.parquet.new").stat().st_size)
            yield ROWS[0] | {"id": str(number)}

    write_predictions(file, rows())
    assert sizes[0] > 10_000
    assert [row["id"] for row in parquet.read_table(file).to_pylist()] == [str(number) for number in range(2000)]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_our_reader_takes_every_format_back(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"out{ending}"
    write_predictions(file, ROWS)
    options = ReadOptions(FieldNames(instruction="instruction", response="completion"))
    records, _ = read_records([str(file)], options, needs_response=False)
    assert [(each.id, each.instruction, each.response) for each in records] == [
        (row["id"], row["instruction"], row["completion"]) for row in ROWS
    ]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_failure_leaves_the_old_file_as_it_is(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"out{ending}"
    file.write_text("old")

    def rows() -> Iterator[dict[str, Any]]:
        yield from ROWS
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_predictions(file, rows())
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == [file.name]


@pytest.mark.parametrize("name", ["out", "out.txt", "out.json", "out.jsonl.gz", "out.xlsx"])
def test_another_ending_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(InputError, match=r"^--output out.*expected \.jsonl, \.csv or \.parquet, or - for"):
        check_format(Path(name), f"--output {name}")
