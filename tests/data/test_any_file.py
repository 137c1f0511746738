"""Any file: forms x file kinds x encodings x faults. Accepted + rejected = records, each rejection at its own place.

The reference is how the file was made: for each record the line on which it was written, and whether it is faulty.
"""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from helpers import check_time_is_linear
from lit_phi2.data.invalid import InvalidRecord, describe_invalid
from lit_phi2.data.records import ReadOptions, Record, iter_records, read_records
from lit_phi2.errors import InputError

Row = dict[str, Any]

# Texts with what breaks a reader: line ends of Unicode, quotes, delimiters, brackets, characters of several bytes
text = st.text(
    st.sampled_from(list("abz ,;\t|\"'[]{}:\\#é世😀\n\u2028\u2029\x85\x0b\x0c\x1c\x1e\ufeff\r")), max_size=12
)
texts = text.map(lambda value: f"Why {value} now")


def chat(field: str, speaker: str, content: str, names: tuple[str, str]) -> Callable[[str, str], Row]:
    return lambda a, b: {field: [{speaker: names[0], content: a}, {speaker: names[1], content: b}]}


FORMS: dict[str, Callable[[str, str], Row]] = {
    "instruction": lambda a, b: {"instruction": a, "response": b},
    "Alpaca": lambda a, b: {"instruction": a, "input": "", "output": b},
    "Dolly": lambda a, b: {"instruction": a, "context": "Code 97", "response": b},
    "prompt/completion": lambda a, b: {"prompt": a, "completion": b},
    "messages": chat("messages", "role", "content", ("user", "assistant")),
    "conversations": chat("conversations", "from", "value", ("human", "gpt")),
}
OTHER_FORM = {"conversations": "messages", "messages": "prompt/completion"}  # of any other form: conversations


def emptied(row: Row, form: str) -> Row:
    """Without the text of the response."""
    *_, last = row
    if isinstance(row[last], list):
        return {last: [*row[last][:-1], {**row[last][-1], list(row[last][-1])[1]: ""}]}
    return {**row, last: ""}


# Faults of a row that every kind of file can hold; True: also a table, whose rows all have the same fields
FAULTS: dict[str, tuple[bool, Callable[[Row, str], Any]]] = {
    "no response": (True, emptied),
    "null": (True, lambda row, form: dict.fromkeys(row)),
    "header": (True, lambda row, form: replace_texts(row, "a\n### Response: b")),
    "other form": (False, lambda row, form: FORMS[OTHER_FORM.get(form, "conversations")]("a", "b")),
    "no fields": (False, lambda row, form: {}),
    "not an object": (False, lambda row, form: ["a", "b"]),
    "number": (False, lambda row, form: dict.fromkeys(row, 7)),
}


def replace_texts(value: Any, replacement: str) -> Any:
    if isinstance(value, str):
        return replacement if value.startswith("Why") else value
    if isinstance(value, list):
        return [replace_texts(item, replacement) for item in value]
    return {name: replace_texts(item, replacement) for name, item in value.items()}


# Files: rows -> bytes, and the line of each row


def jsonl_file(rows: list[Any], encode: Callable[[str], bytes], form: str) -> tuple[bytes, list[str]]:
    return encode("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)), lines_from(1, rows)


def json_file(rows: list[Any], encode: Callable[[str], bytes], form: str) -> tuple[bytes, list[str]]:
    return encode("[" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "]"), lines_from(1, rows)


def one_line_json_file(rows: list[Any], encode: Callable[[str], bytes], form: str) -> tuple[bytes, list[str]]:
    parts = [json.dumps(row, ensure_ascii=False) for row in rows]
    columns = [2 + sum(len(part) + 1 for part in parts[:number]) for number in range(len(parts))]
    lines = ["1" if number == 0 else f"1:{column}" for number, column in enumerate(columns)]
    return encode("[" + ",".join(parts) + "]"), lines


def lines_from(first: int, rows: list[Any]) -> list[str]:
    return [str(first + number) for number in range(len(rows))]


def csv_file(delimiter: str) -> Callable[..., tuple[bytes, list[str]]]:
    def write(rows: list[Any], encode: Callable[[str], bytes], form: str) -> tuple[bytes, list[str]]:
        out = io.StringIO()
        writer = csv.writer(out, delimiter=delimiter)
        columns = list(FORMS[form]("", ""))
        writer.writerow(columns)
        lines = []
        for row in rows:
            lines.append(str(1 + out.getvalue().count("\n")))
            cells = [row[name] for name in columns]
            writer.writerow(
                [json.dumps(cell, ensure_ascii=False) if isinstance(cell, list) else cell for cell in cells]
            )
        return encode(out.getvalue()), lines

    return write


def parquet_file(rows: list[Any], encode: Callable[[str], bytes], form: str) -> tuple[bytes, list[str]]:
    out = io.BytesIO()
    schema = pyarrow.Table.from_pylist([FORMS[form]("a", "b")]).schema
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), out)
    return out.getvalue(), lines_from(1, rows)


KINDS: dict[str, tuple[bool, Callable[..., tuple[bytes, list[str]]]]] = {  # whether it is a table, and its writer
    "r.jsonl": (False, jsonl_file),
    "R.NDJSON": (False, jsonl_file),
    "r.json": (False, json_file),
    "line.json": (False, one_line_json_file),
    "r.csv": (True, csv_file(",")),
    "semicolon.CSV": (True, csv_file(";")),
    "pipe.csv": (True, csv_file("|")),
    "r.tsv": (True, csv_file("\t")),
    "r.parquet": (True, parquet_file),
}
ENCODINGS: dict[str, tuple[str, str | None]] = {  # the codec of the file, and data.encoding
    "UTF-8": ("utf-8", None),
    "UTF-8 with BOM": ("utf-8-sig", None),
    "UTF-16": ("utf-16", None),
    "Windows": ("cp1252", "cp1252"),
}


def encode_utf8(content: str) -> bytes:
    return content.encode()


@settings(max_examples=250, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    form=st.sampled_from(list(FORMS)),
    kind=st.sampled_from(list(KINDS)),
    encoding=st.sampled_from(list(ENCODINGS)),
    is_compressed=st.booleans(),
    records=st.lists(st.tuples(texts, texts, st.sampled_from([*[""] * 8, *FAULTS])), max_size=12),
)
def test_accepted_and_rejected_records_are_all_there_are(
    form: str,
    kind: str,
    encoding: str,
    is_compressed: bool,
    records: list[tuple[str, str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    is_table, write = KINDS[kind]
    rows: list[Any] = [FORMS[form]("Why first", "So")]  # it has a form, so that the file has one
    faulty = [False]
    for first, second, fault in records:
        in_table, make_faulty = FAULTS.get(fault, (True, lambda row, form: row))
        row = FORMS[form](first, second)
        faulty.append(bool(fault) and (in_table or not is_table))
        rows.append(make_faulty(row, form) if faulty[-1] else row)
    codec, option = ENCODINGS[encoding]
    content, lines = write(rows, lambda content: content.encode(codec, "replace"), form)
    path = tmp_path_factory.mktemp("any") / (f"{kind}.gz" if is_compressed else kind)
    path.write_bytes(gzip.compress(content) if is_compressed else content)

    options = ReadOptions(encoding=option)
    found = list(iter_records([str(path)], options, needs_response=True))

    assert [record.location for record in found] == [f"{path}:{line}" for line in lines]
    assert [isinstance(record, InvalidRecord) for record in found] == faulty, describe_invalid(
        [record for record in found if isinstance(record, InvalidRecord)]
    )
    expected = [text for row, is_faulty in zip(records, faulty[1:], strict=True) if not is_faulty for text in row[:2]]
    if not kind.endswith("parquet"):
        expected = [text.encode(codec, "replace").decode(codec) for text in expected]
    accepted = [record for record in found[1:] if isinstance(record, Record)]
    assert [text for record in accepted for text in (record.instruction, record.response)] == expected


@settings(max_examples=250, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(list(KINDS)),
    form=st.sampled_from(list(FORMS)),
    encoding=st.sampled_from(list(ENCODINGS)),
    cut=st.floats(0, 1),
    junk=st.one_of(
        st.binary(max_size=8), st.sampled_from([b"\x00", b'"', b"\xe9", b",", b"]", b"}\n{", b"\r", b"\xff\xfe"])
    ),
    needs_response=st.booleans(),
)
def test_a_damaged_file_costs_records_or_is_refused_by_path(
    kind: str,
    form: str,
    encoding: str,
    cut: float,
    junk: bytes,
    needs_response: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Bytes in the middle are replaced. Nothing but an InputError is raised, and every rejection has its place."""
    codec, option = ENCODINGS[encoding]
    rows = [FORMS[form](f"Why {n}?", "So é") for n in range(6)]
    content, _ = KINDS[kind][1](rows, lambda content: content.encode(codec), form)
    place = int(cut * len(content))
    path = tmp_path_factory.mktemp("any") / kind
    path.write_bytes(content[:place] + junk + content[place + len(junk) // 2 :])
    found, refusal = [], ""
    try:
        found = list(iter_records([str(path)], ReadOptions(encoding=option), needs_response=needs_response))
    except InputError as error:
        refusal = str(error)
    assert not refusal or (refusal.startswith(f"{path}:") and "\n" not in refusal)
    locations = [record.location for record in found]
    assert len(set(locations)) == len(locations)
    assert all(location.startswith(f"{path}:") for location in locations)
    for invalid in found:
        if isinstance(invalid, InvalidRecord):
            assert invalid.message
            invalid.raw.encode()


@pytest.mark.parametrize("kind", ["r.jsonl", "r.json", "line.json", "r.csv", "r.parquet"])
def test_reading_takes_time_linear_in_the_number_of_records(kind: str, tmp_path: Path) -> None:
    """Half of them are invalid."""
    counts = (2_000, 40_000)
    paths = {count: tmp_path / f"{count}-{kind}" for count in counts}
    for count, path in paths.items():
        path.write_bytes(write_many(kind, count // 2))

    def read(count: int) -> None:
        records, invalid = read_records([str(paths[count])], ReadOptions(), needs_response=True)
        assert len(describe_invalid(invalid)) == 1
        assert (len(records), len(invalid)) == (count // 2, count // 2)

    check_time_is_linear(read, *counts)


def write_many(kind: str, count: int) -> bytes:
    """A valid and an invalid record, count times after one another."""
    valid = FORMS["messages"]("Why was it denied?", "No referral.")
    rows = [valid, emptied(valid, "messages")]
    if kind == "r.parquet":
        return parquet_file(rows * count, encode_utf8, "messages")[0]
    if kind == "r.csv":
        header, *lines = csv_file(",")(rows, encode_utf8, "messages")[0].splitlines(keepends=True)
        return header + b"".join(lines) * count
    lines = [json.dumps(row).encode() for row in rows] * count
    if kind == "r.jsonl":
        return b"\n".join(lines)
    return b"[" + (b", " if kind == "line.json" else b",\n").join(lines) + b"]"
