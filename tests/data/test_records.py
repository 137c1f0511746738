"""Reading records: every format gives the same ones, and every fault is told as path:line."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lit_phi2.data.records import FieldNames, InvalidRecord, Record, raise_invalid, read_records
from lit_phi2.errors import InputError

GOOD = {"id": "g", "instruction": "Why?", "input": "Code 97", "response": "Because."}
ROWS = [
    {"id": "a", "instruction": "Why was it denied?", "input": 'Code 97, "bundled"', "response": "It is included."},
    {"id": "b", "instruction": "Appeal?\nHow?", "input": "", "response": "Within 180 days.\n\nBy letter."},
    {"id": "c", "instruction": "Für Größe ½ — 予約", "input": "a,b;c\td", "response": "Oui, ça va."},
]


def read(*sources: Path | str, needs_response: bool = True, **fields: str) -> tuple[list[Record], list[InvalidRecord]]:
    return read_records([str(source) for source in sources], FieldNames(**fields), needs_response=needs_response)


def texts(records: list[Record]) -> list[tuple[str, ...]]:
    return [(record.id, record.instruction, record.input, record.response) for record in records]


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    """Rows in the format that the path's ending names, written by the libraries that people write them with."""
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), "utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# Formats


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json", "csv", "parquet"])
def test_every_format_gives_the_same_records(ending: str, tmp_path: Path) -> None:
    records, faults = read(write_table(tmp_path / f"records.{ending}", ROWS))
    assert texts(records) == [(row["id"], row["instruction"], row["input"], row["response"]) for row in ROWS]
    assert faults == []


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_fields_may_have_other_names(ending: str, tmp_path: Path) -> None:
    renamed = [{"key": "k1", "question": "Why?", "context": "Code 97", "answer": "Because.", "input": "not this one"}]
    path = write_table(tmp_path / f"records.{ending}", renamed)
    records, faults = read(path, instruction="question", input="context", response="answer", id="key")
    assert texts(records) == [("k1", "Why?", "Code 97", "Because.")]
    assert faults == []


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_input_and_id_may_be_absent(ending: str, tmp_path: Path) -> None:
    """The id is then the file's name and the line; a Parquet file has rows instead, counted from 1."""
    rows = [{"instruction": "Why?", "response": "Because."}, {"instruction": "How?", "response": "So."}]
    records, _ = read(write_table(tmp_path / f"claims.{ending}", rows))
    second = {"jsonl": 2, "json": 6, "csv": 3, "parquet": 2}[ending]  # json.dumps(indent=2): [ { i r } { -> line 6
    assert texts(records)[1] == (f"claims.{ending}:{second}", "How?", "", "So.")


def test_a_csv_row_is_placed_at_the_line_on_which_it_begins(tmp_path: Path) -> None:
    """Counted by hand: quoted values run over several lines, and lines between records may be empty."""
    lines = [
        "instruction,response",  # 1
        '"one',  # 2
        "",  # 3
        'two","a',  # 4
        'b"',  # 5
        "",  # 6
        "three,",  # 7: an empty response
        "four,d",  # 8
    ]
    path = tmp_path / "r.csv"
    path.write_text("\n".join(lines), "utf-8")
    records, faults = read(path)
    assert [(r.instruction, r.response, r.location) for r in records] == [
        ("one\n\ntwo", "a\nb", f"{path}:2"),
        ("four", "d", f"{path}:8"),
    ]
    assert [fault.location for fault in faults] == [f"{path}:7"]


def test_an_object_in_a_json_array_is_placed_at_the_line_on_which_it_begins(tmp_path: Path) -> None:
    """Counted by hand. A second object on a line is placed at line:column, as editors take it."""
    path = tmp_path / "r.json"
    path.write_text(
        '\n[\n  {"instruction": "a", "response": "x"}, {"instruction": "b",\n'  # lines 1 to 3, into 4
        '   "response": "y"},\n\n  {"instruction": "c"}\n]\n',  # 4 to 7
        "utf-8",
    )
    records, faults = read(path)
    assert [record.location for record in records] == [f"{path}:3", f"{path}:3:42"]
    assert [fault.location for fault in faults] == [f"{path}:6"]


def test_a_json_array_on_one_line_needs_no_ids(tmp_path: Path) -> None:
    """json.dump writes one so; ids must still be told apart."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps([{"instruction": "Why?", "response": "Because."}] * 3), "utf-8")
    records, faults = read(path)
    assert len({record.id for record in records}) == 3
    assert faults == []


def test_a_byte_order_mark_belongs_to_no_record(tmp_path: Path) -> None:
    """Excel writes one at the start of a CSV file."""
    for ending, text in (
        ("jsonl", json.dumps(GOOD)),
        ("json", json.dumps([GOOD])),
        ("csv", "id,instruction,input,response\ng,Why?,Code 97,Because.\n"),
    ):
        path = tmp_path / f"bom.{ending}"
        path.write_text(text, "utf-8-sig")
        records, faults = read(path)
        assert texts(records) == [("g", "Why?", "Code 97", "Because.")], ending
        assert faults == []


def test_null_and_blank_inputs_are_no_input(tmp_path: Path) -> None:
    rows = [{**GOOD, "id": name, "input": value} for name, value in (("a", None), ("b", ""), ("c", " \n"))]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    records, faults = read(path)
    assert [record.input for record in records] == ["", "", ""]
    assert faults == []


def test_ids_may_be_whole_numbers(write_jsonl: Callable[..., Path]) -> None:
    records, faults = read(write_jsonl([{**GOOD, "id": 0}, {**GOOD, "id": 17}]))
    assert [record.id for record in records] == ["0", "17"]
    assert faults == []


def test_records_of_several_files_come_in_the_order_given(tmp_path: Path) -> None:
    second = write_table(tmp_path / "a.jsonl", [ROWS[0]])
    first = write_table(tmp_path / "b.csv", [ROWS[2], ROWS[1]])
    assert [record.id for record in read(first, second)[0]] == ["c", "b", "a"]


def test_files_of_the_same_name_give_different_default_ids(tmp_path: Path) -> None:
    paths = [tmp_path / month / "claims.jsonl" for month in ("may", "june")]
    for path in paths:
        path.parent.mkdir()
        path.write_text('{"instruction": "Why?", "response": "Because."}\n', "utf-8")
    records, faults = read(*paths)
    assert [record.id for record in records] == [f"{path}:1" for path in paths]
    assert faults == []


@pytest.mark.parametrize("name", ["a[1].parquet", "a*.parquet", "a b.parquet"])
def test_a_path_is_a_path_and_no_pattern(name: str, tmp_path: Path) -> None:
    write_table(tmp_path / "ab.parquet", [ROWS[0]])
    assert [record.id for record in read(write_table(tmp_path / name, [ROWS[1]]))[0]] == ["b"]


def test_reading_leaves_nothing_on_disk(tmp_path: Path) -> None:
    """Records are private: no format may leave a copy in a cache, in a process whose home and caches are empty."""
    endings = ("jsonl", "json", "csv", "parquet")
    files = [write_table(tmp_path / f"r.{ending}", [{**GOOD, "id": ending}]) for ending in endings]
    home = tmp_path / "home"
    home.mkdir()
    places = dict.fromkeys(("HOME", "HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "TMPDIR"), str(home))
    code = (
        "import sys; from lit_phi2.data.records import Fields, read_records\n"
        "print(len(read_records(sys.argv[1:], Fields(), needs_response=True)[0]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, files)],
        env={**os.environ, **places, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "4\n", done.stderr
    assert list(home.rglob("*")) == []


# Packaged and hub sources


def test_the_packaged_claims_can_be_named() -> None:
    """Reference: the lines of the packaged file, parsed here."""
    file = Path(__file__).parents[2] / "lit_phi2" / "assets" / "claims" / "validation.jsonl"
    expected = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    records, faults = read("claims:validation")
    assert len(expected) > 0
    assert texts(records) == [(row["id"], row["instruction"], row["input"], row["response"]) for row in expected]
    assert records[4].location == "claims:validation:5"
    assert faults == []


def test_an_unknown_packaged_split_names_those_there_are() -> None:
    with pytest.raises(InputError, match="claims:dev: is not packaged; there are claims:gold, claims:test, "):
        read("claims:dev")


@pytest.mark.parametrize(
    ("source", "name", "split"),
    [("hub:acme/claims", "acme/claims", "train"), ("hub:acme/claims:test[:5]", "acme/claims", "test[:5]")],
)
def test_a_hub_dataset_is_streamed(source: str, name: str, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the hub client's place stands a function: the call that it gets, and what becomes of its rows."""
    calls = []

    def load_dataset(path: str, **options: object) -> Iterator[dict[str, object]]:
        calls.append((path, options))
        return iter([GOOD, {**GOOD, "id": "h", "response": 3}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records, faults = read(source)
    assert calls == [(name, {"split": split, "streaming": True})]
    assert texts(records) == [("g", "Why?", "Code 97", "Because.")]
    assert [fault.location for fault in faults] == [f"{source}:2"]


def test_a_hub_dataset_that_cannot_be_read_says_what_was_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **options: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"hub:acme/claims: .*ConnectionError.* Expected hub:owner/name\[:split\]"):
        read("hub:acme/claims")


# Sources that cannot be used at all


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", None, "no such file. Paths are taken from the folder you are in"),
        ("r.jsonl", b"", "is empty; expected at least one record"),
        ("r.jsonl", b"\n  \n", "is empty; expected at least one record"),
        ("r.json", b" ", "is empty"),
        ("r.json", b"[]", "is empty"),
        ("r.csv", b"", "is empty"),
        ("r.csv", b"instruction,response\n", "is empty"),
        ("r.xlsx", b"PK", "unknown format '.xlsx'; expected a file ending in .jsonl, .json, .csv or .parquet"),
        ("r", b"{}", "unknown format ''"),
        ("r.json", b'{"instruction": "a"}', "holds no JSON array of objects; one object a line is .jsonl"),
        ("r.json", b'[\n{"instruction": "a"},\n{"instruction" "b"}]', ":3: is not valid JSON: Expecting ':' delimiter"),
        ("r.json", b'[\n{"instruction": "a"}\n', ":3: is not valid JSON: expected ',' or ']'"),
        ("r.json", b'[{"instruction": "a"}]\n\n[]', ":3: is not valid JSON: the array is not closed, or more follows"),
        ("r.json", b'[\n{"id": 1' + b"0" * 5000 + b"}]", ":2: is not valid JSON"),
        ("r.json", b'[\n\n{"instruction": "\xe9"}]', ":3: is not UTF-8. Save the file as UTF-8"),
        ("r.csv", b"question,answer\na,b\n", ":1: has no column 'instruction', 'response'; its columns are 'question'"),
        ("r.csv", b"\n\ninstruction,input\na,b\n", ":3: has no column 'response'"),
        ("r.parquet", b"PAR2" * 9, "cannot be read as Parquet"),
    ],
)
def test_a_source_that_cannot_be_used_says_where_and_why(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}:")


def test_a_folder_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file; expected one ending in"):
        read(tmp_path)


def test_a_parquet_file_without_rows_is_empty(tmp_path: Path) -> None:
    columns = pyarrow.table({"instruction": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(columns, tmp_path / "r.parquet")
    with pytest.raises(InputError, match="is empty; expected at least one record"):
        read(tmp_path / "r.parquet")


# Bad records


def without(field: str) -> dict[str, str]:
    return {name: value for name, value in GOOD.items() if name != field} | {"id": "bad"}


def changed(field: str, value: object) -> dict[str, object]:
    return {**GOOD, "id": "bad", field: value}


BAD_RECORDS: dict[str, tuple[object, str]] = {
    "not JSON": ('{"instruction": "Why?"', "is not valid JSON: Expecting ',' delimiter at column 23; expected one obj"),
    "not UTF-8": (b'{"instruction": "Caf\xe9"}', "is not UTF-8: byte 0xe9 at position 21. Save it as UTF-8."),
    "not an object": (["Why?", "Because."], "is a list; expected an object with the fields of a record."),
    "null": (None, "is null; expected an object"),
    "too deep": ("[" * 100_000, "is not valid JSON: RecursionError; expected one object"),
    "number too long": ('{"id": 1' + "0" * 5000 + "}", "is not valid JSON: ValueError; expected one object of plain"),
    "missing instruction": (
        without("instruction"),
        "has no field 'instruction'; it has 'id', 'input', 'response'. Expected a text there (data.*_field",
    ),
    "missing response": (without("response"), "has no field 'response'; it has 'id', 'instruction', 'input'."),
    "no value": (changed("response", None), "field 'response' has no value; expected a text."),
    "empty instruction": (changed("instruction", ""), "field 'instruction' is empty; expected a text."),
    "blank response": (changed("response", " \n\t"), "field 'response' is blank; expected a text."),
    "number": (changed("response", 12.5), "field 'response' is a number; expected a text."),
    "truth": (changed("instruction", True), "field 'instruction' is true or false; expected a text."),
    "list": (changed("input", ["Code 97"]), "field 'input' is a list; expected a text."),
    "object": (changed("input", {"code": 97}), "field 'input' is an object; expected a text."),
    "half a character": (changed("response", "\ud83d"), "field 'response' holds half of a surrogate pair"),
    "half a character in the id": (changed("id", "c\ud83d"), "field 'id' holds half of a surrogate pair"),
    "header in a field": (
        changed("input", "Notes\n### Response:\nDenied"),
        "field 'input' has a line that begins with '### Response:', a section header of the template",
    ),
    "id no text": (changed("id", 1.5), "field 'id' is a number; expected a text or a whole number."),
    "duplicate id": (changed("id", "g"), "id 'g' was already used at {path}:1; ids must be unique."),
}


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_a_bad_record_is_a_fault_with_its_place_and_the_others_are_kept(kind: str, tmp_path: Path) -> None:
    """It stands on line 3, after an empty line and before a good record."""
    row, message = BAD_RECORDS[kind]
    line = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\n".join([json.dumps(GOOD).encode(), b"", line, json.dumps({**GOOD, "id": "h"}).encode()]))
    records, faults = read(path)
    assert [record.id for record in records] == ["g", "h"]
    assert len(faults) == 1
    assert str(faults[0]).startswith(f"{path}:3: {message.format(path=path)}")
    faults[0].raw.encode()  # a file can hold it


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"Why?", "field 'response' has no value; expected a text."),
        (b"Why?,", "field 'response' is empty; expected a text."),
        (b"Why?,Because,of,that", "has 4 values but the header has 2 columns; put a value that holds a comma between"),
        (b"Caf\xe9,Because.", "is not UTF-8. Save the file as UTF-8."),
        (b'"Why" not?,Because.', "is not valid CSV: ',' expected after '\"'; nothing after it was read."),
        (b'"Why?,Because.', "is not valid CSV: unexpected end of data; nothing after it was read."),
    ],
)
def test_a_bad_csv_row_is_a_fault_with_its_place(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(b"instruction,response\nHow?,So.\n" + line)
    records, faults = read(path)
    assert [record.instruction for record in records] == ["How?"]
    assert len(faults) == 1
    assert str(faults[0]).startswith(f"{path}:3: {message}")


def test_a_broken_csv_header_is_a_fault_of_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text('"instruction"s,response\nWhy?,Because.\n', "utf-8")
    records, faults = read(path)
    assert records == []
    assert len(faults) == 1
    assert str(faults[0]).startswith(f"{path}:1: is not valid CSV: ")


def test_an_id_must_be_unique_over_all_files_and_a_file_given_twice_is_found_out(tmp_path: Path) -> None:
    first = write_table(tmp_path / "a.jsonl", ROWS)
    second = write_table(tmp_path / "b.csv", [{**GOOD, "id": "b"}])
    records, faults = read(first, second)
    assert [record.id for record in records] == ["a", "b", "c"]
    assert [fault.location for fault in faults] == [f"{second}:2"]
    records, faults = read(first, first)
    assert len(records) == len(faults) == len(ROWS)


def test_accepted_and_rejected_records_are_all_that_the_file_holds(tmp_path: Path) -> None:
    """Every kind of bad record, each followed by a good one: nothing is dropped, nothing counted twice."""
    lines = []
    for number, (row, _) in enumerate(BAD_RECORDS.values()):
        lines.append(json.dumps({**GOOD, "id": "g" if number == 0 else f"g{number}"}).encode())
        lines.append(row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode())
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\n".join(lines))
    records, faults = read(path)
    assert [record.location for record in records] == [f"{path}:{line}" for line in range(1, len(lines), 2)]
    assert [fault.location for fault in faults] == [f"{path}:{line}" for line in range(2, len(lines) + 1, 2)]


def test_a_fault_keeps_the_record_as_it_stands_in_the_file(tmp_path: Path) -> None:
    """So that rejected.jsonl can be mended and read again."""
    broken, wrong = '{"instruction": "Why?"', {"instruction": "Größe?", "response": 3}
    path = tmp_path / "r.jsonl"
    path.write_text(f"{broken}\n{json.dumps(wrong)}\n", "utf-8")
    first, second = read(path)[1]
    assert first.raw == broken
    assert json.loads(second.raw) == wrong


def test_predict_needs_no_response_but_checks_one_that_is_there(write_jsonl: Callable[..., Path]) -> None:
    rows = [without("response"), changed("id", "e") | {"response": ""}, {**GOOD, "response": 3}]
    records, faults = read(path := write_jsonl(rows), needs_response=False)
    assert [(record.id, record.response) for record in records] == [("bad", ""), ("e", "")]
    assert [str(fault) for fault in faults] == [f"{path}:3: field 'response' is a number; expected a text."]
    assert len(read(path)[1]) == 3  # the same file is no training data


def test_predict_needs_no_response_column(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("instruction\nWhy?\n", "utf-8")
    assert [record.instruction for record in read(path, needs_response=False)[0]] == ["Why?"]


# What is told


def test_the_first_twenty_faults_are_shown_and_all_are_counted(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl([{"instruction": "Why?"} for _ in range(23)])
    _, faults = read(path)
    with pytest.raises(InputError) as raised:
        raise_invalid(faults, setting="data.train_files")
    lines = str(raised.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:20]] == [f"{path}:{number}" for number in range(1, 21)]
    assert lines[20] == "... and 3 more"
    assert lines[21].startswith("23 bad records in data.train_files. Mend them, or set data.on_bad_record to 'skip'")
    assert len(lines) == 22


def test_twenty_faults_are_all_shown(write_jsonl: Callable[..., Path]) -> None:
    _, faults = read(write_jsonl([{"instruction": "Why?"} for _ in range(20)]))
    with pytest.raises(InputError) as raised:
        raise_invalid(faults, setting="data.train_files")
    assert len(str(raised.value).splitlines()) == 21
    assert "more" not in str(raised.value)


def test_no_faults_are_no_error() -> None:
    raise_invalid([], setting="data.train_files")


def test_messages_hold_no_text_of_records(tmp_path: Path) -> None:
    """Logs are copied around more freely than claims. One word stands in every text of every kind of bad record."""
    secret = "Zanzibar"
    rows = [
        f'{{"instruction": "{secret}" "response": "{secret}"}}'.encode(),
        f'{{"instruction": "{secret}\xe9", "response": "{secret}"}}'.encode("latin-1"),
        json.dumps([secret]).encode(),
        json.dumps(secret).encode(),
    ]
    texts = {"instruction": secret, "input": secret, "response": secret}
    bad = [
        {"instruction": secret},
        {**texts, "response": ""},
        {**texts, "response": [secret]},
        {**texts, "response": {secret: secret}},
        {**texts, "input": f"### Response:\n{secret}"},
        {**texts, "response": f"{secret}\ud83d"},
        {**texts, "id": {"name": secret}},
    ]
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\n".join(rows + [json.dumps(row).encode() for row in bad]))
    table = tmp_path / "r.csv"
    out = io.StringIO()
    csv.writer(out).writerows([["instruction", "response"], [secret, ""], [secret] * 3, [f"{secret}\udce9", secret]])
    table.write_text(out.getvalue() + f'"{secret}"{secret},\n', "utf-8", errors="surrogateescape")
    faults = read(path)[1] + read(table)[1]
    assert len(faults) == len(rows) + len(bad) + 4
    assert [str(fault) for fault in faults if secret in str(fault)] == []


def test_a_part_of_the_packaged_claims_is_its_first_records() -> None:
    whole, _ = read("claims:test")
    part, _ = read("claims:test[:7]")
    assert [record.id for record in part] == [record.id for record in whole[:7]]
    assert len(whole) > 7
    with pytest.raises(InputError, match="is not packaged"):
        read("claims:test[7:]")
