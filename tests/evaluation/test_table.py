"""The table and the names under which metrics are logged."""

import pytest

from lit_phi2.evaluation.metrics import Interval
from lit_phi2.evaluation.table import format_table, metric_name


@pytest.mark.parametrize(
    ("metric", "logged"),
    [
        ("fact recall", "test/fact_recall"),
        ("facts copied", "test/facts_copied"),
        ("form Next steps", "test/form_next_steps"),
        ("ROUGE-L", "test/rouge_l"),
        ("repeated 8-gram", "test/repeated_8_gram"),
        ("eos_rate", "test/eos_rate"),
    ],
)
def test_logged_names_need_no_quoting(metric: str, logged: str) -> None:
    assert metric_name(metric) == logged


def test_the_columns_of_the_table_align() -> None:
    """Read back by position: each system's means end where its name ends, even if a length ratio is over 10."""
    rows = {
        "fact recall": Interval(0.5, 0.25, 0.75, 8),
        "category a long name of a category": Interval(1.0, 1.0, 1.0, 2),
        "length ratio": Interval(12.345, 10.5, 123.25, 1600),
    }
    columns = {"adapter": rows | {"eos_rate": Interval(0.125, 0.0, 0.25, 8)}, "base": rows, "nearest": rows}
    header, rule, *lines = format_table(columns).splitlines()
    assert set(rule) == {"|", "-"}
    assert len({len(line) for line in [header, rule, *lines]}) == 1
    assert len({tuple(at for at, char in enumerate(line) if char == "|") for line in [header, rule, *lines]}) == 1
    assert [line[: header.index("adapter")].strip("| ") for line in lines] == list(columns["adapter"])
    for line, (name, cell) in zip(lines, columns["adapter"].items(), strict=True):
        interval, mean = line[header.index("adapter") :].split("]")[0] + "]", f"{cell.mean:.3f}"
        assert interval == f"{mean} [{cell.low:.3f}, {cell.high:.3f}]"
        others = "-" if name == "eos_rate" else mean
        for other in ("base", "nearest"):
            end = header.index(other) + len(other)
            assert line[:end].endswith(f" {others}"), f"{other}:\n{header}\n{line}"
            assert line[end] == " "
        assert int(line.split("|")[-2]) == cell.records


@pytest.mark.parametrize(
    ("category", "shown"),
    [
        ("[red]denied[/red] [/]", "[red]denied[/red] [/]"),  # markup of rich
        (":warning: [link=https://example.org]x", ":warning: [link=https://example.org]x"),
        ("x" * 5000, "x" * 5000),  # wider than any terminal
        ("red \x1b[31m, bell \x07", r"red \x1b[31m, bell \x07"),
        ("two\nlines\tand a tab", "two lines and a tab"),
        ("保険", "保険"),
    ],
)
@pytest.mark.parametrize("environment", ["FORCE_COLOR", "TTY_INTERACTIVE", "JUPYTER_COLUMNS"])
def test_text_of_records_is_shown_whole_and_as_it_is(
    category: str, shown: str, environment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment, "1")
    monkeypatch.setenv("COLUMNS", "20")
    columns = {"base": {f"category {category}": Interval(0.5, 0.25, 0.75, 8)}}
    *_, line = format_table(columns).splitlines()
    assert line == f"| category {shown} | 0.500 [0.250, 0.750] |       8 |"
