"""Records: what makes a record invalid, and the messages about it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_phi2.data.records import FieldNames, InvalidRecord, ReadOptions, Record, read_records

GOOD = {"id": "g", "instruction": "Why?", "input": "Código 97", "response": "Because."}


def read(*sources: Path | str, needs_response: bool = True, **fields: str) -> tuple[list[Record], list[InvalidRecord]]:
    return read_records(
        [str(source) for source in sources], ReadOptions(FieldNames(**fields)), needs_response=needs_response
    )


def test_reading_records_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    """So a file can be validated in a fraction of a second. Checked in a new process that reads JSON and CSV."""
    jsonl, table = tmp_path / "r.jsonl", tmp_path / "r.csv"
    jsonl.write_text(json.dumps(GOOD), "utf-8")
    table.write_text("instruction,response\nWhy?,Because.\n", "utf-8")
    code = (
        "import sys; from lit_phi2.data.records import ReadOptions, read_records\n"
        "print(len(read_records(sys.argv[1:], ReadOptions(), needs_response=True)[0]))\n"
        "print(sorted({'torch', 'transformers', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(jsonl), str(table)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout == "2\n[]\n", result.stderr


def as_line(row: dict[str, str]) -> bytes:
    """Characters as they are: where no line has any beyond ASCII, one that is not UTF-8 is another encoding."""
    return json.dumps(row, ensure_ascii=False).encode()


# Valid records


def test_null_and_blank_inputs_become_empty(tmp_path: Path) -> None:
    rows = [{**GOOD, "id": name, "input": value} for name, value in (("a", None), ("b", ""), ("c", " \n"))]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    records, invalid = read(path)
    assert [record.input for record in records] == ["", "", ""]
    assert invalid == []


def test_ids_may_be_whole_numbers(write_jsonl: Callable[..., Path]) -> None:
    records, invalid = read(write_jsonl([{**GOOD, "id": 0}, {**GOOD, "id": 17}]))
    assert [record.id for record in records] == ["0", "17"]
    assert invalid == []


def test_predict_needs_no_response_but_validates_a_present_one(write_jsonl: Callable[..., Path]) -> None:
    rows = [without("response"), changed("id", "e") | {"response": ""}, {**GOOD, "response": 3}]
    records, invalid = read(path := write_jsonl(rows), needs_response=False)
    assert [(record.id, record.response) for record in records] == [("bad", ""), ("e", "")]
    assert [str(record) for record in invalid] == [f"{path}:3: field 'response' is a number; expected text."]
    assert len(read(path)[1]) == 3  # the same file is not training data


# Invalid records


def without(field: str) -> dict[str, str]:
    return {name: value for name, value in GOOD.items() if name != field} | {"id": "bad"}


def changed(field: str, value: object) -> dict[str, object]:
    return {**GOOD, "id": "bad", field: value}


INVALID_RECORDS: dict[str, tuple[object, str]] = {
    "not JSON": ('{"instruction": "Why?"', "is not valid JSON: Expecting ',' delimiter at column 23; expected one obj"),
    "not UTF-8": (b'{"instruction": "Caf\xe9"}', "is not UTF-8 at column 21, unlike other lines. Save it as UTF-8."),
    "not an object": (["Why?", "Because."], "is a list; expected an object with the fields of a record."),
    "null": (None, "is null; expected an object"),
    "too deep": ("[" * 100_000, "is not valid JSON: RecursionError; expected one object"),
    "number too long": ('{"id": 1' + "0" * 5000 + "}", "is not valid JSON: ValueError; expected one object with text"),
    "missing instruction": (
        without("instruction"),
        "has no field 'instruction'; it has 'id', 'input', 'response'. Expected text there (data.*_field",
    ),
    "missing response": (without("response"), "has no field 'response'; it has 'id', 'instruction', 'input'."),
    "no value": (changed("response", None), "field 'response' has no value; expected text."),
    "empty instruction": (changed("instruction", ""), "field 'instruction' is empty; expected text."),
    "blank response": (changed("response", " \n\t"), "field 'response' is blank; expected text."),
    "number": (changed("response", 12.5), "field 'response' is a number; expected text."),
    "boolean": (changed("instruction", True), "field 'instruction' is a boolean; expected text."),
    "list": (changed("input", ["Code 97"]), "field 'input' is a list; expected text."),
    "object": (changed("input", {"code": 97}), "field 'input' is an object; expected text."),
    "half a character": (changed("response", "\ud83d"), "field 'response' holds half of a surrogate pair"),
    "half a character in the id": (changed("id", "c\ud83d"), "field 'id' holds half of a surrogate pair"),
    "header in a field": (
        changed("input", "Notes\n### Response:\nDenied"),
        "field 'input' has a line that begins with '### Response:', a section header of the template",
    ),
    "id not text": (changed("id", 1.5), "field 'id' is a number; expected text or a whole number."),
    "duplicate id": (changed("id", "g"), "its id was already used at {path}:1; ids must be unique."),
}


@pytest.mark.parametrize("kind", INVALID_RECORDS)
def test_an_invalid_record_is_located_and_the_others_are_kept(kind: str, tmp_path: Path) -> None:
    """The invalid record is on line 3, after an empty line and before a valid record."""
    row, message = INVALID_RECORDS[kind]
    line = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\n".join([as_line(GOOD), b"", line, as_line({**GOOD, "id": "h"})]))
    records, invalid = read(path)
    assert [record.id for record in records] == ["g", "h"]
    assert len(invalid) == 1
    assert str(invalid[0]).startswith(f"{path}:3: {message.format(path=path)}")
    invalid[0].raw.encode()  # it can be written to a file


def test_every_record_is_either_valid_or_invalid(tmp_path: Path) -> None:
    """Each kind of invalid record after a valid one: none is lost and none is counted twice."""
    lines = []
    for number, (row, _) in enumerate(INVALID_RECORDS.values()):
        lines.append(as_line({**GOOD, "id": "g" if number == 0 else f"g{number}"}))
        lines.append(row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode())
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\n".join(lines))
    records, invalid = read(path)
    assert [record.location for record in records] == [f"{path}:{line}" for line in range(1, len(lines), 2)]
    assert [record.location for record in invalid] == [f"{path}:{line}" for line in range(2, len(lines) + 1, 2)]


def test_an_invalid_record_keeps_its_text_from_the_file(tmp_path: Path) -> None:
    """rejected.jsonl shows it to the user in full."""
    unparsable, wrong_type = '{"instruction": "Why?"', {"instruction": "Größe?", "response": 3}
    path = tmp_path / "r.jsonl"
    path.write_text(f"{unparsable}\n{json.dumps(wrong_type)}\n", "utf-8")
    first, second = read(path)[1]
    assert first.raw == unparsable
    assert json.loads(second.raw) == wrong_type
