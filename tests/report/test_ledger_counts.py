"""Counts of a ledger are those of its rows, which are written by hand here."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from lit_phi2.report.ledger_counts import read_ledger_counts

COUNTS = ("prompt_tokens", "supervised_tokens", "truncated_tokens")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three records of train, of which a step used one and one was left out; a record of test."""
    used = {"uses": [{"epoch": 0, "step": 7}], "left_out": None}
    rows: list[dict[str, Any]] = [
        {"split": "train", **dict(zip(COUNTS, (4, 3, 2), strict=True)), **used},
        {"split": "train", **dict(zip(COUNTS, (1, 2, 0), strict=True)), "uses": [], "left_out": None},
        {"split": "train", **dict.fromkeys(COUNTS), "uses": [], "left_out": "Claim CLM-2024-00017 is empty"},
    ]
    uses = pa.list_(pa.struct([("epoch", pa.int32()), ("step", pa.int64())]))
    columns = [(name, pa.int32()) for name in COUNTS]
    schema = pa.schema([("split", pa.string()), *columns, ("uses", uses), ("left_out", pa.string())])
    parquet.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "ledger.parquet")
    test = pa.Table.from_pylist([rows[1] | {"split": "test"}], schema)
    parquet.write_table(test, tmp_path / "test_ledger.parquet")
    return tmp_path


def test_only_records_that_a_step_trained_on_count_as_used(folder: Path) -> None:
    train = read_ledger_counts(folder, 8, packing=True)["train"]
    assert (len(train.prompt), train.num_used, train.num_truncated) == (2, 1, 1)
    assert (train.lengths.tolist(), train.median, train.longest) == ([7, 3], 5.0, 7)
    assert train.left_out == {"Claim [CLAIM_NUMBER_1] is empty": 1}


def test_rows_are_counted_only_where_records_were_packed(folder: Path) -> None:
    """By hand: 7 and 3 tokens are a row of 10, or two of 8. No row of 6 holds 7, and test packs none."""
    for max_length, rows in ((10, [10]), (8, [3, 7]), (6, [])):
        counts = read_ledger_counts(folder, max_length, packing=True)
        row_tokens = counts["train"].row_tokens
        assert row_tokens is not None
        assert sorted(row_tokens.tolist()) == rows
        assert counts["test"].row_tokens is None
    assert read_ledger_counts(folder, 8, packing=False)["train"].row_tokens is None
    assert read_ledger_counts(folder, None, packing=True)["train"].row_tokens is None
