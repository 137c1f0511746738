"""CSV and TSV: well-formed files are read as they were written, and a stray quote costs one row."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import check_time_is_linear
from lit_phi2.data.readers.csv_rows import split_rows
from lit_phi2.data.readers.rows import UnparsableRow
from lit_phi2.data.sources import read_rows
from lit_phi2.errors import InputError

BROKEN = "is not valid CSV: a quote is not closed, or text follows a closing quote."


def read(path: Path, content: str | bytes) -> list[tuple[int | str, Any]]:
    """Write and read a file; a dict becomes its values, and an unparsable row its text."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [
        (line, row.raw if isinstance(row, UnparsableRow) else list(row.values())) for line, row in read_rows(str(path))
    ]


# Well-formed files


_ODD = " ab,;\t|\"'\r\n\x0b\x0c\x1c\x1e\x85\u2028\u2029é"
value = st.text(st.one_of(st.sampled_from(_ODD), st.characters(codec="utf-8")))
last = value.map(lambda text: text.rstrip("\r"))  # unquoted, it looks like the end of the line
tables = st.lists(st.tuples(value, value, last), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=tables,
    delimiter=st.sampled_from(",;\t|"),
    line_end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    codec=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_a_table_is_read_as_the_csv_module_wrote_it(
    tmp_path: Path, rows: list[tuple[str, ...]], delimiter: str, line_end: str, quoting: int, codec: str
) -> None:
    """The csv module leaves a lone carriage return unquoted; the reference is the rows that it was given."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=line_end, quoting=quoting)  # type: ignore[arg-type]
    writer.writerows([("instruction", "input", "response"), *rows])
    result = read(tmp_path / "r.csv", text.getvalue().encode(codec))
    assert [tuple(values) for _, values in result] == rows


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found_from_the_header(delimiter: str, tmp_path: Path) -> None:
    """The other delimiters in the second header and in the values are text."""
    others = ",;\t|".replace(delimiter, "")
    header = f'"a{others}",b,c'.replace(",b,c", f"{delimiter}b{delimiter}c")
    row = delimiter.join(["1", others, "3"])
    assert read(tmp_path / "r.csv", f"{header}\n{row}\n") == [(2, ["1", others, "3"])]


def test_a_tsv_file_is_separated_by_tabs(tmp_path: Path) -> None:
    assert read(tmp_path / "r.tsv", "a, b; c, d; e\tf\n1\t2\n") == [(2, ["1", "2"])]


@pytest.mark.parametrize("line", ["sep=;", "SEP=;", '"sep=;"', "sep=;;;"])
def test_a_line_with_sep_names_the_delimiter(line: str, tmp_path: Path) -> None:
    """The header alone, with more commas, would give the comma. Line numbers count the line with sep."""
    assert read(tmp_path / "r.csv", f"{line}\r\na, or, b;c\r\n1;2\r\n\r\n3;4\r\n") == [(3, ["1", "2"]), (5, ["3", "4"])]


def test_line_ends_of_old_macs_are_read(tmp_path: Path) -> None:
    assert read(tmp_path / "r.csv", 'a,b\r1,"x\ny"\r2,z\r') == [(2, ["1", "x\ny"]), (3, ["2", "z"])]


def test_only_a_line_feed_ends_a_row(tmp_path: Path) -> None:
    """Counted by hand: the value in quotes on lines 3 and 4 is the only one that spans lines."""
    odd = "x\ry\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029z"
    assert read(tmp_path / "r.csv", f'a,b\n1,{odd}\n2,"{odd}\n{odd}"\n3,z\n') == [
        (2, ["1", odd]),
        (3, ["2", f"{odd}\n{odd}"]),
        (5, ["3", "z"]),
    ]


def test_columns_without_a_name_may_repeat(tmp_path: Path) -> None:
    """Spreadsheets export empty columns beside the table."""
    (tmp_path / "r.csv").write_text("a,b,,\n1,2,,\n")
    assert [(row["a"], row["b"]) for _, row in read_rows(str(tmp_path / "r.csv"))] == [("1", "2")]


def test_a_repeated_column_is_shown_only_if_it_is_a_name(tmp_path: Path) -> None:
    """Without a header, the first line is a private record."""
    for header, shown in (("answer,answer", "'answer'"), ("Ann Lee 4417,Ann Lee 4417", "of one name")):
        (tmp_path / "r.csv").write_text(f"{header}\n1,2\n")
        with pytest.raises(InputError, match=f"r.csv:1: has several columns {shown}; expected each name once"):
            list(read_rows(str(tmp_path / "r.csv")))


# Stray quotes


GOOD = [f"Why {n}?,Because {n}." for n in range(100)]


@pytest.mark.parametrize("position", [0, 50, 99])
@pytest.mark.parametrize(
    "broken",
    [
        'Why?,"why "bad" thing"',
        'Why?,"why bad"" thing',
        'Why?,"never closed',
        '"Why" not?,Because',
        '"Why?,Because',
        'Why?,"5" pipe',
        'Why?,"one "two" is\nthree, four\n\nfive ""six""",',  # in a value of four lines
    ],
)
def test_a_stray_quote_costs_one_row(broken: str, position: int, tmp_path: Path) -> None:
    """The reference is the file without that row."""
    lines = [*GOOD[:position], broken, *GOOD[position:]]
    result = read(tmp_path / "r.csv", "\n".join(["instruction,response", *lines]) + "\n")
    texts = [value if isinstance(value, str) else ",".join(value) for _, value in result]
    assert [text for text in texts if text in GOOD] == GOOD
    assert [(line, text) for (line, _), text in zip(result, texts, strict=True) if text not in GOOD] == [
        (position + 2, broken)
    ]


def test_quoted_rows_after_a_stray_quote_are_read(tmp_path: Path) -> None:
    lines = ['"Why?","never closed', '"How?","So, it is"', 'When?,"In\nMay"', "Who?,We"]
    assert read(tmp_path / "r.csv", "\n".join(["a,b", *lines])) == [
        (2, lines[0]),
        (3, ["How?", "So, it is"]),
        (4, ["When?", "In\nMay"]),
        (6, ["Who?", "We"]),
    ]


def test_a_quote_closed_far_below_costs_one_row(tmp_path: Path) -> None:
    """csv would take the three lines for one row, of four values: more than the header has."""
    lines = ['1,2,"never closed', "4,5,6", '7,8,"9"""']
    assert read(tmp_path / "r.csv", "\n".join(["a,b,c", *lines])) == [
        (2, lines[0]),
        (3, ["4", "5", "6"]),
        (4, ["7", "8", '9"']),
    ]
    lines = ['1,"never, closed', "4,5,6", '7",8,9', "10,11,12"]
    assert [line for line, _ in read(tmp_path / "r.csv", "\n".join(["a,b,c", *lines]))] == [2, 5]


def test_quotes_inside_unquoted_values_are_text(tmp_path: Path) -> None:
    assert read(tmp_path / "r.csv", 'a,b\n6" nails,the "best"\n7",8"\n') == [
        (2, ['6" nails', 'the "best"']),
        (3, ['7"', '8"']),
    ]


def test_the_message_about_a_broken_row_holds_none_of_its_text(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text('instruction,response\nSECRET,"SECRET" SECRET\nWhy?,SECRET,SECRET\n')
    messages = [row.message for _, row in read_rows(str(path))]
    assert [message[:40] for message in messages] == [BROKEN[:40], "has 3 values but the header has 2 columns"[:40]]
    assert "SECRET" not in "".join(messages)


@pytest.mark.parametrize(
    "line",
    ['1,"x "y" z"\n', '1,"x\n', 'x",y"z,"open\n', '1,"x"\n2,"y\n', '1,"x\n2,""y\n', '1,"x\n2,3\n2,3\n4",5\n'],
)
def test_time_is_linear_with_a_stray_quote_on_each_line(line: str) -> None:
    """It is quadratic if each quote reads to the end again."""

    def read(count: int) -> None:
        lines = ["a,b\n", *(line * count).splitlines(keepends=True)]
        rows = list(split_rows(iter(lines), ","))
        assert "".join(row.text for row in rows).replace("\n", "") == "".join(lines).replace("\n", "")

    check_time_is_linear(read, 1000, 20_000)


def test_a_row_without_an_end_is_given_up(tmp_path: Path) -> None:
    """20 million characters after a quote; memory would otherwise hold the rest of a file of any size."""
    line = "x" * 999 + ",y\n"
    path = tmp_path / "r.csv"
    path.write_text('a,b\n1,"never closed\n' + line * 20_000)
    rows = list(read_rows(str(path)))
    assert len(rows) == 20_001
    assert [line for line, row in rows if isinstance(row, UnparsableRow)] == [2]
