"""JSON: arrays and lines are read as json reads them, faults are named, and time is linear."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_phi2.data.readers.rows import UnparsableRow
from lit_phi2.data.sources import read_rows
from lit_phi2.errors import InputError

LINE_ENDS = "\u2028 \u2029 \x85 \x0b \x0c \x1c \x1d \x1e \r"


def read(path: Path, content: str) -> list[tuple[int | str, Any]]:
    path.write_bytes(content.encode())
    return list(read_rows(str(path)))


text = st.text(st.one_of(st.sampled_from('\\"[]{},:\u2028\x85\x1c\r\n'), st.characters(codec="utf-8")), max_size=20)
values = st.recursive(
    st.one_of(st.none(), st.integers(), text), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)
objects = st.lists(st.dictionaries(text, values, max_size=3), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=objects, indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans())
def test_json_is_read_as_it_was_written(
    tmp_path: Path, rows: list[dict[str, Any]], indent: int | None, ascii_only: bool
) -> None:
    array = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    assert [row for _, row in read(tmp_path / "r.json", array)] == rows
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    assert read(tmp_path / "r.jsonl", lines) == list(enumerate(rows, start=1))


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    """JSON may hold these characters unescaped, except the control characters, which are escaped here."""
    rows = [{"instruction": f"{n} {LINE_ENDS}"} for n in range(3)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    assert any("\u2028" in line and "\x85" in line for line in lines)
    assert read(tmp_path / "r.jsonl", "\r\n".join(lines)) == [(1, rows[0]), (2, rows[1]), (3, rows[2])]
    assert read(tmp_path / "r.json", "[\n" + ",\n".join(lines) + "\n]") == [(2, rows[0]), (3, rows[1]), (4, rows[2])]


def test_nan_is_an_absent_value(tmp_path: Path) -> None:
    """json.dumps and pandas write NaN for a missing text."""
    row = '{"instruction": "Why?", "input": NaN, "facts": [NaN]}'
    expected = {"instruction": "Why?", "input": None, "facts": [None]}
    assert read(tmp_path / "r.jsonl", row) == [(1, expected)]
    assert read(tmp_path / "r.json", f"[{row}]") == [(1, expected)]


def test_json_lines_may_be_named_json(tmp_path: Path) -> None:
    lines = ['{"a": 1}', "", '{"a": {"b": 2}}', '{"a": 3']
    rows = read(tmp_path / "r.json", "\n".join(lines))
    assert rows[:2] == [(1, {"a": 1}), (3, {"a": {"b": 2}})]
    assert rows[2][0] == 4
    assert isinstance(rows[2][1], UnparsableRow)


# Faults


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": "x"},', "ends in a comma; expected one object on the line and nothing after it. Remove the comma."),
        ('{"a": "x",}', "is not valid JSON: a comma before the closing bracket at column 11"),
        ('{"a": ["x",]}', "is not valid JSON: a comma before the closing bracket at column 12"),
        ("{'a': 'x'}", "is not valid JSON: text in single quotes where JSON has double ones at column 2"),
        ('{"a": None}', "is not valid JSON: a value as Python writes it; JSON has null, true and false, at column 7"),
        ('{"a": "x"} {"a": "y"}', "is not valid JSON: Extra data at column 12"),
        ('{"a": "x", "a": "y"}', "names the field 'a' twice; expected each name once."),
        ('{"SECRET SECRET": 1, "SECRET SECRET": 2}', "names a field twice; expected each name once."),
        ('{"a": 1' + "0" * 5000 + "}", "is not valid JSON: ValueError"),
    ],
)
def test_a_fault_of_a_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    rows = read(tmp_path / "r.jsonl", f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    assert [row for _, row in rows[::2]] == [{"a": 1}, {"a": 2}]
    assert rows[1][1].message.startswith(message)
    assert rows[1][1].raw == line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "r.jsonl",
            '\n[{"a": 1},\n{"a": 2}]',
            ":2: begins a JSON array, but the file's ending promises one object per line",
        ),
        ("r.jsonl", '[{"a": 1}, {"a": 2}]\n', ":1: begins a JSON array"),
        ("r.jsonl", "[\n]", ":1: begins a JSON array"),
        ("r.jsonl", '{\n  "a": 1\n}\n', ":1: begins an object that spans lines"),
        (
            "r.json",
            '{"version": 2, "data": [{"a": 1}]}',
            ": is one object, with 'version', 'data'; expected an array of",
        ),
        ("r.json", '{"data": []}', "Its records may be the list in 'data'"),
        ("r.json", '{"a": {"0": "x"}}', ": is one object, with 'a'; expected an array of objects"),
        ("r.json", '{\n"a": 1\n}\n{\n"a": 2\n}', ": has several values after one another"),
        ("r.json", '{"a": 1}{"a": 2}', ": has several values after one another"),
        ("r.json", '"SECRET"', ": is not a JSON array"),
        ("r.json", "SECRET", ":1: is not valid JSON: Expecting value at column 1"),
        ("r.json", '[{"a": 1},\n{"a": 2},\n]', ":2: is not valid JSON: no object follows the comma at column 9"),
        ("r.json", '[{"a": 1},\n,{"a": 2}]', ":1: is not valid JSON: no object follows the comma at column 10"),
        ("r.json", '[{"a": 1}\n{"a": 2}]', ":2: is not valid JSON: expected ',' or ']' at column 1, after an object"),
        ("r.json", '[{"a": 1},\n{"a": 2,}]', ":2: is not valid JSON: a comma before the closing bracket at column 9"),
        ("r.json", '[\n{"a": 1}\n', ":3: is not valid JSON: the file ends within the array, after an object"),
        ("r.json", '[\n{"a": 1},\n', ":3: is not valid JSON: the array is not closed"),
        ("r.json", '[{"a": 1}]\n\n[]', ":3: is not valid JSON: the array is not closed, or more follows"),
        ("r.json", '[\n{"a": 1' + "0" * 5000 + "}]", ":2: is not valid JSON: ValueError"),
        ("r.json", '[\n{"a": 1, "a": 2}]', ":2: names the field 'a' twice"),
    ],
)
def test_a_file_in_another_layout_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        read(path, content)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)
    assert "SECRET" not in str(raised.value)


def test_lines_of_lists_are_not_an_array(tmp_path: Path) -> None:
    """Some datasets hold a list of messages on each line; each is a row, which is no record."""
    assert read(tmp_path / "r.jsonl", '[{"a": 1}]\n[{"a": 2}]\n') == [(1, [{"a": 1}]), (2, [{"a": 2}])]


def test_an_array_on_one_line_is_read_in_linear_time(tmp_path: Path) -> None:
    """40,000 records. The reference is json's processor time for the text; a search back takes a thousandfold."""
    content = json.dumps([{"instruction": "Why? " * 10, "response": "Because. " * 10}] * 40_000)
    started = time.process_time()
    expected = json.loads(content)
    reference = time.process_time() - started
    started = time.process_time()
    rows = read(tmp_path / "r.json", content)
    assert time.process_time() - started < 50 * reference + 1
    assert [row for _, row in rows] == expected
    assert len({line for line, _ in rows}) == len(rows)
