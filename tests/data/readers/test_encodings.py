"""Encodings: a byte order mark or data.encoding decides; a file in another one is refused in one line that names it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lit_phi2.data.readers.encodings import check_encoding, guess_codec
from lit_phi2.data.readers.rows import UnparsableRow
from lit_phi2.data.sources import read_rows
from lit_phi2.errors import InputError

ROWS = [{"instruction": f"Why {n}?", "response": "Café, naïve \u2013 “so”"} for n in range(3)]


def write(path: Path, codec: str, mark: str = "") -> Path:
    """Three records in the format of the path's ending; in .csv, .json and .jsonl the first is on line 2."""
    if path.suffix == ".jsonl":
        text = "\n" + "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)
    elif path.suffix == ".json":
        text = json.dumps(ROWS, ensure_ascii=False).replace("{", "\n{")
    else:
        text = "instruction,response\n" + "".join(f'{row["instruction"]},"{row["response"]}"\r\n' for row in ROWS)
    path.write_bytes((mark + text).encode(codec))
    return path


def read(path: Path, encoding: str | None = None) -> list[tuple[int | str, Any]]:
    return list(read_rows(str(path), encoding=encoding))


def refusal(path: Path, encoding: str | None = None) -> str:
    """The message that refuses a file, without its folder; it must be one line."""
    with pytest.raises(InputError) as raised:
        read(path, encoding)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(f"{path.parent}/")


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("codec", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_decides_the_encoding(codec: str, ending: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"r.{ending}", codec, mark="\ufeff")
    for encoding in (None, "cp1252"):  # a mark is stronger than data.encoding, so that files may be mixed
        assert read(path, encoding) == list(enumerate(ROWS, start=2))


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("codec", ["cp1252", "mac_roman"])
def test_another_encoding_is_named_with_its_first_place(codec: str, ending: str, tmp_path: Path) -> None:
    """Counted by hand: the é is the fourth letter of the response."""
    column = {"jsonl": 43, "json": 43, "csv": 12}[ending]
    path = write(tmp_path / f"r.{ending}", codec)
    byte = "é".encode(codec)[0]
    assert refusal(path).startswith(
        f"r.{ending}:2: is not UTF-8 (byte 0x{byte:02x} at column {column}) but probably {codec}"
    )
    assert f"Set data.encoding to {codec}" in refusal(path)
    assert read(path, codec) == list(enumerate(ROWS, start=2))


@pytest.mark.parametrize(
    ("text", "codec"),
    [
        ("the patient\u2019s “visit”, $120 \u2013 denied", "cp1252"),
        ("the patient\u2019s “visit”, $120 \u2013 denied", "mac_roman"),
        ("Müller, Größe, RÉSUMÉ, piñata, §3", "cp1252"),
        ("Müller, Größe, piñata, déjà vu", "mac_roman"),
        ("Müller, Größe, piñata, déjà vu", "cp850"),
    ],
)
def test_the_encoding_of_western_text_is_guessed(text: str, codec: str) -> None:
    assert guess_codec(text.encode(codec)) == codec


@pytest.mark.parametrize(("text", "codec"), [("Почему отказано?", "cp1251"), ("为什么被拒绝", "gb18030")])
def test_an_encoding_that_is_not_recognized_is_not_guessed(text: str, codec: str, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(f"a,b\n{text},1\n".encode(codec))
    assert "its encoding is not recognized" in refusal(path)
    assert read(path, codec) == [(2, {"a": text, "b": "1"})]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_named(codec: str, ending: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"r.{ending}", codec)
    assert refusal(path) == f"r.{ending}:1: is not UTF-8 but probably UTF-16. Set data.encoding to {codec}."
    assert read(path, codec) == list(enumerate(ROWS, start=2))


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_a_damaged_line_of_a_utf_8_file_costs_one_record(ending: str, tmp_path: Path) -> None:
    """One line of three is cut inside a character; the others show that the file is UTF-8."""
    path = write(tmp_path / f"r.{ending}", "utf-8")
    damaged = path.read_bytes().replace(b"\xc3\xa9", b"\xc3", 1)
    path.write_bytes(damaged)
    (line, row), *others = read(path)
    assert others == list(enumerate(ROWS, start=2))[1:]
    assert line == 2
    assert isinstance(row, UnparsableRow)
    assert row.message.startswith("is not UTF-8 at column ")
    assert "Caf\ufffd, naïve" in row.raw


def test_a_few_damaged_lines_of_a_plain_file_cost_one_record_each(tmp_path: Path) -> None:
    """None of 30 lines shows that the file is UTF-8, but bytes that no Western text has are no other encoding."""
    lines = [f'{{"a": {n}}}'.encode() for n in range(30)]
    lines[7], lines[20] = b'{"a": "caf\xc3"}', b"\xff\xfe\x00\x81"
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\n".join(lines))
    rows = read(path)
    assert [line for line, _ in rows] == list(range(1, 31))
    assert [line for line, row in rows if isinstance(row, UnparsableRow)] == [8, 21]


def test_utf_16_that_is_cut_off_names_the_place(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", "utf-16-le", mark="\ufeff")
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(path).startswith("r.jsonl:4: cannot be decoded as utf-16 at column ")


def test_a_wrong_data_encoding_names_the_place(tmp_path: Path) -> None:
    """Byte 0x81 means nothing in cp1252."""
    path = tmp_path / "r.csv"
    path.write_bytes(b"a,b\n1,2\nx\x81,3\n")
    assert refusal(path, "cp1252").startswith("r.csv:3: cannot be decoded as cp1252 at column 2. Set data.encoding")


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("codec", ["cp1252", "latin-1", "mac_roman"])
def test_utf_8_is_not_read_as_another_encoding(codec: str, ending: str, tmp_path: Path) -> None:
    """latin-1 and mac_roman decode any bytes, each é to two other characters; cp1252 does not know a byte of the ”."""
    message = refusal(write(tmp_path / f"r.{ending}", "utf-8"), codec)
    assert f"is UTF-8, and data.encoding '{codec}' would read it as other characters" in message


@pytest.mark.parametrize("name", ["klingon", "", "hex", "rot13", "cp1252\0"])
def test_an_unknown_encoding_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"data.encoding: {name!r} is unknown")):
        check_encoding(name)
    with pytest.raises(InputError, match=re.escape(f"data.encoding: {name!r} is unknown")):
        read(write(tmp_path / "r.csv", "utf-8"), name)


@pytest.mark.parametrize("name", [None, "cp1252", "latin-1", "UTF-16", "utf_16_le", "shift_jis", "mac_roman"])
def test_encodings_that_python_knows_are_accepted(name: str | None) -> None:
    check_encoding(name)
