"""Sources: every format gives the same records, and a source that cannot be read says where and why."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lit_phi2.data.records import FieldNames, InvalidRecord, Record, read_records
from lit_phi2.data.sources import CLAIMS_DIR
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
    """Write rows in the format of the path's ending, with the library that people use for it."""
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
    records, invalid = read(write_table(tmp_path / f"records.{ending}", ROWS))
    assert texts(records) == [(row["id"], row["instruction"], row["input"], row["response"]) for row in ROWS]
    assert invalid == []


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_fields_may_be_renamed(ending: str, tmp_path: Path) -> None:
    renamed = [{"key": "k1", "question": "Why?", "context": "Code 97", "answer": "Because.", "input": "another field"}]
    path = write_table(tmp_path / f"records.{ending}", renamed)
    records, invalid = read(path, instruction="question", input="context", response="answer", id="key")
    assert texts(records) == [("k1", "Why?", "Code 97", "Because.")]
    assert invalid == []


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_input_and_id_are_optional(ending: str, tmp_path: Path) -> None:
    """The default id is the file's name and the line; in a Parquet file, the row from 1."""
    rows = [{"instruction": "Why?", "response": "Because."}, {"instruction": "How?", "response": "So."}]
    records, _ = read(write_table(tmp_path / f"claims.{ending}", rows))
    second = {"jsonl": 2, "json": 6, "csv": 3, "parquet": 2}[ending]  # json.dumps(indent=2): [ { i r } { -> line 6
    assert texts(records)[1] == (f"claims.{ending}:{second}", "How?", "", "So.")


def test_a_csv_row_is_located_at_the_line_where_it_begins(tmp_path: Path) -> None:
    """Counted by hand. Quoted values span several lines, and lines between records may be empty."""
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
    records, invalid = read(path)
    assert [(r.instruction, r.response, r.location) for r in records] == [
        ("one\n\ntwo", "a\nb", f"{path}:2"),
        ("four", "d", f"{path}:8"),
    ]
    assert [record.location for record in invalid] == [f"{path}:7"]


def test_a_json_object_is_located_at_the_line_where_it_begins(tmp_path: Path) -> None:
    """Counted by hand. A second object on a line is located at line:column, which editors accept."""
    path = tmp_path / "r.json"
    path.write_text(
        '\n[\n  {"instruction": "a", "response": "x"}, {"instruction": "b",\n'  # lines 1 to 3, into 4
        '   "response": "y"},\n\n  {"instruction": "c"}\n]\n',  # 4 to 7
        "utf-8",
    )
    records, invalid = read(path)
    assert [record.location for record in records] == [f"{path}:3", f"{path}:3:42"]
    assert [record.location for record in invalid] == [f"{path}:6"]


def test_objects_on_one_line_get_different_default_ids(tmp_path: Path) -> None:
    """json.dump writes an array on one line."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps([{"instruction": "Why?", "response": "Because."}] * 3), "utf-8")
    records, invalid = read(path)
    assert len({record.id for record in records}) == 3
    assert invalid == []


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    """Excel writes one at the start of a CSV file."""
    for ending, text in (
        ("jsonl", json.dumps(GOOD)),
        ("json", json.dumps([GOOD])),
        ("csv", "id,instruction,input,response\ng,Why?,Code 97,Because.\n"),
    ):
        path = tmp_path / f"bom.{ending}"
        path.write_text(text, "utf-8-sig")
        records, invalid = read(path)
        assert texts(records) == [("g", "Why?", "Code 97", "Because.")], ending
        assert invalid == []


def test_several_files_are_read_in_the_given_order(tmp_path: Path) -> None:
    second = write_table(tmp_path / "a.jsonl", [ROWS[0]])
    first = write_table(tmp_path / "b.csv", [ROWS[2], ROWS[1]])
    assert [record.id for record in read(first, second)[0]] == ["c", "b", "a"]


def test_files_with_the_same_name_give_different_default_ids(tmp_path: Path) -> None:
    paths = [tmp_path / month / "claims.jsonl" for month in ("may", "june")]
    for path in paths:
        path.parent.mkdir()
        path.write_text('{"instruction": "Why?", "response": "Because."}\n', "utf-8")
    records, invalid = read(*paths)
    assert [record.id for record in records] == [f"{path}:1" for path in paths]
    assert invalid == []


@pytest.mark.parametrize("name", ["a[1].parquet", "a*.parquet", "a b.parquet"])
def test_a_path_is_not_a_glob_pattern(name: str, tmp_path: Path) -> None:
    write_table(tmp_path / "ab.parquet", [ROWS[0]])
    assert [record.id for record in read(write_table(tmp_path / name, [ROWS[1]]))[0]] == ["b"]


def test_reading_writes_nothing_to_disk(tmp_path: Path) -> None:
    """Records are private. Runs in a process with an empty home folder, which must stay empty."""
    endings = ("jsonl", "json", "csv", "parquet")
    files = [write_table(tmp_path / f"r.{ending}", [{**GOOD, "id": ending}]) for ending in endings]
    home = tmp_path / "home"
    home.mkdir()
    folders = dict.fromkeys(("HOME", "HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "TMPDIR"), str(home))
    code = (
        "import sys; from lit_phi2.data.records import FieldNames, read_records\n"
        "print(len(read_records(sys.argv[1:], FieldNames(), needs_response=True)[0]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, files)],
        env={**os.environ, **folders, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout == "4\n", result.stderr
    assert list(home.rglob("*")) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"Why?", "field 'response' has no value; expected text."),
        (b"Why?,", "field 'response' is empty; expected text."),
        (
            b"Why?,Because,of,that",
            "has 4 values but the header has 2 columns; put a value that contains a comma in quotes",
        ),
        (b"Caf\xe9,Because.", "is not UTF-8. Save the file as UTF-8."),
        (b'"Why" not?,Because.', "is not valid CSV: ',' expected after '\"'; nothing after it was read."),
        (b'"Why?,Because.', "is not valid CSV: unexpected end of data; nothing after it was read."),
    ],
)
def test_an_invalid_csv_row_is_reported_with_its_line(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(b"instruction,response\nHow?,So.\n" + line)
    records, invalid = read(path)
    assert [record.instruction for record in records] == ["How?"]
    assert len(invalid) == 1
    assert str(invalid[0]).startswith(f"{path}:3: {message}")


def test_a_malformed_csv_header_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text('"instruction"s,response\nWhy?,Because.\n', "utf-8")
    records, invalid = read(path)
    assert records == []
    assert len(invalid) == 1
    assert str(invalid[0]).startswith(f"{path}:1: is not valid CSV: ")


def test_predict_needs_no_response_column(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("instruction\nWhy?\n", "utf-8")
    assert [record.instruction for record in read(path, needs_response=False)[0]] == ["Why?"]


# Packaged claims and hub datasets


def test_a_packaged_split_can_be_a_source() -> None:
    """Reference: the lines of the packaged file, parsed here."""
    file = CLAIMS_DIR / "validation.jsonl"
    expected = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    records, invalid = read("claims:validation")
    assert len(expected) > 0
    assert texts(records) == [(row["id"], row["instruction"], row["input"], row["response"]) for row in expected]
    assert records[4].location == "claims:validation:5"
    assert invalid == []


def test_a_slice_of_packaged_claims_is_the_first_records() -> None:
    whole, _ = read("claims:test")
    part, _ = read("claims:test[:7]")
    assert [record.id for record in part] == [record.id for record in whole[:7]]
    assert len(whole) > 7
    with pytest.raises(InputError, match="is not packaged"):
        read("claims:test[7:]")


def test_an_unknown_packaged_split_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="claims:dev: is not packaged; expected one of claims:gold, claims:test, "):
        read("claims:dev")


@pytest.mark.parametrize(
    ("source", "name", "split"),
    [("hub:acme/claims", "acme/claims", "train"), ("hub:acme/claims:test[:5]", "acme/claims", "test[:5]")],
)
def test_a_hub_dataset_is_streamed(source: str, name: str, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function replaces the hub client: it records the call and returns two rows."""
    calls = []

    def load_dataset(path: str, **options: object) -> Iterator[dict[str, object]]:
        calls.append((path, options))
        return iter([GOOD, {**GOOD, "id": "h", "response": 3}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records, invalid = read(source)
    assert calls == [(name, {"split": split, "streaming": True})]
    assert texts(records) == [("g", "Why?", "Code 97", "Because.")]
    assert [record.location for record in invalid] == [f"{source}:2"]


def test_an_unreadable_hub_dataset_says_what_was_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **options: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"hub:acme/claims: .*ConnectionError.* Expected hub:owner/name\[:split\]"):
        read("hub:acme/claims")


# Sources that cannot be read


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
        (
            "r.json",
            b'{"instruction": "a"}',
            "is not a JSON array of objects; a file with one object per line ends in .jsonl",
        ),
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
def test_an_unreadable_source_says_where_and_why(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}:")


def test_a_folder_is_not_a_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file; expected one ending in"):
        read(tmp_path)


def test_a_parquet_file_without_rows_is_empty(tmp_path: Path) -> None:
    columns = pyarrow.table({"instruction": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(columns, tmp_path / "r.parquet")
    with pytest.raises(InputError, match="is empty; expected at least one record"):
        read(tmp_path / "r.parquet")
