"""Sources: every format gives the same records, and a source that cannot be read says where and why."""

import csv
import gzip
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from lit_phi2.data.records import FieldNames, InvalidRecord, ReadOptions, Record, read_records
from lit_phi2.data.sources import CLAIMS_DIR, expand_sources, read_rows
from lit_phi2.errors import InputError

GOOD = {"id": "g", "instruction": "Why?", "input": "Code 97", "response": "Because."}


ROWS = [
    {"id": "a", "instruction": "Why was it denied?", "input": 'Code 97, "bundled"', "response": "It is included."},
    {"id": "b", "instruction": "Appeal?\nHow?", "input": "", "response": "Within 180 days.\n\nBy letter."},
    {"id": "c", "instruction": "Für Größe ½ — 予約", "input": "a,b;c\td", "response": "Oui, ça va."},
]


def read(*sources: Path | str, needs_response: bool = True, **fields: str) -> tuple[list[Record], list[InvalidRecord]]:
    options = ReadOptions(FieldNames(**fields))
    return read_records([str(source) for source in sources], options, needs_response=needs_response)


def texts(records: list[Record]) -> list[tuple[str, ...]]:
    return [(record.id, record.instruction, record.input, record.response) for record in records]


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows in the format of the path's ending, with the library that people use for it."""
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), "utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# Formats


FORMATS = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"]


def compress(path: Path, compression: str) -> Path:
    """Compress a file with the standard library's gzip, or with pyarrow's zstd."""
    target = path.with_name(f"{path.name}.{compression}")
    if compression == "gz":
        target.write_bytes(gzip.compress(path.read_bytes()))
    else:
        with pyarrow.output_stream(str(target), compression="zstd") as stream:
            stream.write(path.read_bytes())
    return target


@pytest.mark.parametrize("compression", ["", "gz", "zst"])
@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_gives_the_same_records(ending: str, compression: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / f"records.{ending}", ROWS)
    path = compress(path, compression) if compression else path
    for name in (path.name.upper(), path.name):
        path = path.rename(path.with_name(name))
        records, invalid = read(path)
        assert texts(records) == [(row["id"], row["instruction"], row["input"], row["response"]) for row in ROWS]
        assert invalid == []


@pytest.mark.parametrize("ending", FORMATS)
def test_fields_may_be_renamed(ending: str, tmp_path: Path) -> None:
    renamed = [{"key": "k1", "question": "Why?", "context": "Code 97", "answer": "Because.", "input": "another field"}]
    path = write_table(tmp_path / f"records.{ending}", renamed)
    records, invalid = read(path, instruction="question", input="context", response="answer", id="key")
    assert texts(records) == [("k1", "Why?", "Code 97", "Because.")]
    assert invalid == []


@pytest.mark.parametrize("ending", FORMATS)
def test_input_and_id_are_optional(ending: str, tmp_path: Path) -> None:
    """The default id is the file's name and the line; in a Parquet file, the row from 1."""
    rows = [{"instruction": "Why?", "response": "Because."}, {"instruction": "How?", "response": "So."}]
    records, _ = read(write_table(tmp_path / f"claims.{ending}", rows))
    lines = {"jsonl": 2, "ndjson": 2, "json": 6, "csv": 3, "tsv": 3, "parquet": 2}
    second = lines[ending]  # json.dumps(indent=2): [ { i r } { -> line 6
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


def test_reading_writes_nothing_to_disk(tmp_path: Path) -> None:
    """Records are private. Runs in a process with an empty home folder, which must stay empty."""
    files = [write_table(tmp_path / f"r.{ending}", [{**GOOD, "id": ending}]) for ending in FORMATS]
    files += [compress(write_table(tmp_path / f"{n}.parquet", [{**GOOD, "id": n}]), n) for n in ("gz", "zst")]
    home = tmp_path / "home"
    home.mkdir()
    folders = dict.fromkeys(("HOME", "HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "TMPDIR"), str(home))
    code = (
        "import sys; from lit_phi2.data.records import ReadOptions, read_records\n"
        "print(len(read_records(sys.argv[1:], ReadOptions(), needs_response=True)[0]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, files)],
        env={**os.environ, **folders, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout == "8\n", result.stderr
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
    ],
)
def test_an_invalid_csv_row_is_reported_with_its_line(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(b"instruction,response\nHow?,So.\n" + line)
    records, invalid = read(path)
    assert [record.instruction for record in records] == ["How?"]
    assert len(invalid) == 1
    assert str(invalid[0]).startswith(f"{path}:3: {message}")


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
    assert calls == [(name, {"split": split, "revision": None, "streaming": True})]
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
        ("r.csv", b"\n\nsep=;\n", "is empty"),
        ("r.csv", b'\n"instruction"s,response\nWhy?,Because.\n', ":2: the header is not valid CSV"),
        ("r.csv", b"PK\x03\x04", "is a zip archive or an Excel workbook"),
        ("r.csv", b"PAR1", "is a Parquet file; its name must end in .parquet"),
        ("r.jsonl", b"\x1f\x8b\x08", "is compressed with gzip; its name must end in .gz"),
        ("r.jsonl", b"\x28\xb5\x2f\xfd", "is compressed with zstd; its name must end in .zst"),
        (
            "r.xlsx",
            b"PK",
            "unknown format '.xlsx'; expected a file ending in .jsonl, .ndjson, .json, .csv, .tsv or .parquet",
        ),
        ("r.XLSX.gz", b"", "unknown format '.xlsx'"),
        ("r", b"{}", "unknown format ''"),
        ("r.gz", b"{}", "unknown format ''"),
        ("r.csv", b"question,answer\na,b\n", "column"),
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


@pytest.mark.parametrize("compression", ["gz", "zst"])
@pytest.mark.parametrize("ending", FORMATS)
def test_a_damaged_compressed_file_is_refused(ending: str, compression: str, tmp_path: Path) -> None:
    """Cut off, appended to, not compressed at all, or with a byte inverted; pyarrow writes no checksum into a .zst."""
    rows = [{**GOOD, "id": f"{n:x}", "response": f"{n * 0x9E3779B97F4A7C15:x}"} for n in range(3000)]
    plain = write_table(tmp_path / f"r.{ending}", rows)
    path = compress(plain, compression)
    whole = path.read_bytes()
    inverted = bytearray(whole)
    inverted[len(whole) // 2] ^= 0xFF
    cut = [whole[:length] for length in (5, len(whole) // 2, len(whole) - 1)]
    name = {"gz": "gzip", "zst": "zstd"}[compression]
    damaged = [*cut, whole + b"garbage", plain.read_bytes(), *([bytes(inverted)] if compression == "gz" else [])]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(
            InputError, match=f"is not a complete {name} file: it is cut off, damaged or not compressed"
        ):
            read(path)


def test_a_folder_is_not_a_file_of_records(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").mkdir()
    with pytest.raises(InputError, match=r"r\.jsonl: is not a file; expected one ending in \.jsonl, "):
        read(tmp_path / "r.jsonl")


def test_a_parquet_file_without_rows_is_empty(tmp_path: Path) -> None:
    columns = pyarrow.table({"instruction": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(columns, tmp_path / "r.parquet")
    with pytest.raises(InputError, match="is empty; expected at least one record"):
        read(tmp_path / "r.parquet")


def test_nan_in_a_parquet_column_is_an_absent_value(tmp_path: Path) -> None:
    """pandas writes a column without any text as numbers that are NaN."""
    absent = float("nan")
    table = pandas.DataFrame({"instruction": ["Why?", "How?"], "input": [absent, absent], "response": ["a", "b"]})
    table.to_parquet(tmp_path / "r.parquet")
    assert str(pyarrow.parquet.read_schema(tmp_path / "r.parquet").field("input").type) == "double"
    records, invalid = read(tmp_path / "r.parquet")
    assert [(record.instruction, record.input) for record in records] == [("Why?", ""), ("How?", "")]
    assert invalid == []


def test_nan_inside_a_parquet_value_is_an_absent_value(tmp_path: Path) -> None:
    rows = [{"facts": [{"text": "a", "weight": float("nan")}], "score": 1.5}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    assert list(read_rows(str(tmp_path / "r.parquet"))) == [
        (1, {"facts": [{"text": "a", "weight": None}], "score": 1.5})
    ]


def test_an_error_of_parquet_shows_no_value(tmp_path: Path) -> None:
    """A text column with bytes that are not UTF-8; the exception of pyarrow's own conversion is not printed."""
    column = pyarrow.array([b"SECRET \xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"instruction": column}), tmp_path / "r.parquet")
    with pytest.raises(InputError, match=r"r\.parquet: cannot be read as Parquet \(UnicodeDecodeError\)") as raised:
        read(tmp_path / "r.parquet")
    assert "SECRET" not in str(raised.value)


# Folders and globs


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n")


def test_a_folder_is_its_files_of_records_sorted(tmp_path: Path) -> None:
    """Not hidden ones, other formats, or those of folders in it, which may be another split."""
    write_files(tmp_path, "b.jsonl", "a.CSV", "c.parquet.zst", "README.md", ".d.jsonl", "val/e.jsonl", "_SUCCESS")
    expected = [str(tmp_path / name) for name in ("a.CSV", "b.jsonl", "c.parquet.zst")]
    assert expand_sources([str(tmp_path)]) == expected
    assert expand_sources([f"{tmp_path}/", "claims:train"]) == [*expected, "claims:train"]


def test_a_relative_folder_gives_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, "data/b.jsonl", "data/a.jsonl")
    monkeypatch.chdir(tmp_path)
    expected = [os.path.join("data", "a.jsonl"), os.path.join("data", "b.jsonl")]
    assert expand_sources(["data"]) == expected
    assert expand_sources(["data/*.jsonl"]) == expected


def test_a_glob_is_its_files_of_records_sorted(tmp_path: Path) -> None:
    write_files(tmp_path, "b.jsonl", "a.jsonl", "c.csv", "README.md", "deep/er/d.jsonl")
    for pattern, names in (
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("*", ["a.jsonl", "b.jsonl", "c.csv"]),
        ("[ac].*", ["a.jsonl", "c.csv"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "deep/er/d.jsonl"]),
    ):
        assert expand_sources([str(tmp_path / pattern)]) == [str(tmp_path / name) for name in names], pattern


@pytest.mark.parametrize("name", ["a[1].parquet", "a*.parquet", "a?.parquet", "a b.parquet"])
def test_a_path_that_exists_is_not_a_pattern(name: str, tmp_path: Path) -> None:
    write_table(tmp_path / "a1.parquet", [ROWS[0]])
    path = str(write_table(tmp_path / name, [ROWS[1]]))
    assert expand_sources([path]) == [path]
    assert [record.id for record in read(path)[0]] == ["b"]


def test_the_files_in_home_may_be_named_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_files(tmp_path, "data/a.jsonl")
    for source in ("~/data", "~/data/*.jsonl", "~/data/a.jsonl"):
        (file,) = expand_sources([source])
        assert list(read_rows(file)) == [(1, {})]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "no file of records; expected .jsonl, .ndjson, .json, .csv, .tsv or .parquet, or"),
        ("", "There is README.md, notes.txt that the folder holds. Files in its folders are read with"),
        ("empty", "There is nothing that the folder holds."),
        ("*.txt", "There is notes.txt that the pattern matches from the folder you are in, "),
        ("*.jsonl", "There is nothing that the pattern matches"),
    ],
)
def test_a_source_without_a_file_says_what_is_there(source: str, message: str, tmp_path: Path) -> None:
    write_files(tmp_path, "README.md", "notes.txt", ".hidden.jsonl", "deep/a.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        expand_sources([str(tmp_path / source)])
    assert str(raised.value).startswith(f"{tmp_path / source}: ")


@pytest.mark.parametrize(
    "source", ["nowhere.jsonl", "nowhere/", "~nobody4417/a.jsonl", "x" * 5000, "a\0b", '{"a": [1]}']
)
def test_a_path_that_does_not_exist_is_named(source: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"{source}: no ")):
        read(*expand_sources([source]))


# Progress


def test_progress_is_logged_after_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A clock that advances by one second at each look; 12 rows then take 12 seconds."""
    now = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    caplog.set_level(logging.INFO, "lit_phi2")
    path = write_table(tmp_path / "r.jsonl", [GOOD] * 12)
    assert len(list(read_rows(str(path)))) == 12
    assert caplog.messages == [f"{path}: {count} records read" for count in (5, 10)] + [f"{path}: 12 records read, all"]


def test_a_quick_source_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lit_phi2")
    assert len(list(read_rows(str(write_table(tmp_path / "r.jsonl", [GOOD] * 12))))) == 12
    assert caplog.messages == []
