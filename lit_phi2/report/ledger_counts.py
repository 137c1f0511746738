"""Ledger counts: ledger.parquet -> records and tokens of each split, what was left out, and how full the rows were.

    ledger.parquet, data.max_length   ->   {"train": SplitCounts, "val": SplitCounts}, "test" from test_ledger.parquet

Only the columns of numbers are read. How full the rows are depends on the lengths alone, so the packing of any epoch
gives it.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_phi2.audit.ledger import LEDGER_FILE, TEST_LEDGER_FILE
from lit_phi2.data.packing import pack
from lit_phi2.errors import InputError
from lit_phi2.report.text import redacted

Array = NDArray[Any]

_COLUMNS = ("split", "prompt_tokens", "supervised_tokens", "truncated_tokens", "left_out", "uses")


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """The records of a split.

    Attributes:
        prompt, supervised: (n,) tokens of each record that can be used; EOS is supervised.
        num_truncated: records whose input section was shortened.
        num_used: records that at least one step trained on.
        left_out: reason -> records, the most frequent first.
        row_tokens: (rows,) tokens in each packed row; None where rows are not known.
    """

    prompt: Array
    supervised: Array
    num_truncated: int
    num_used: int
    left_out: dict[str, int]
    row_tokens: Array | None

    @property
    def lengths(self) -> Array:
        """(n,) tokens of each record."""
        return self.prompt + self.supervised

    @property
    def median(self) -> float:
        """Half of the records have as many tokens or fewer."""
        return float(np.median(self.lengths)) if len(self.prompt) else 0.0

    @property
    def longest(self) -> int:
        """Tokens of the longest record."""
        return int(self.lengths.max()) if len(self.prompt) else 0


def read_ledger_counts(folder: Path, max_length: int | None, *, packing: bool) -> dict[str, SplitCounts]:
    """The splits of a run, as far as it has their ledgers.

    Args:
        folder: of the run.
        max_length: tokens in a row; None if not known.
        packing: whether rows hold several records.

    Raises:
        InputError: a file is no ledger.
    """
    counts: dict[str, SplitCounts] = {}
    for name in (LEDGER_FILE, TEST_LEDGER_FILE):
        if (folder / name).is_file():
            counts |= _read(folder / name, max_length if packing else None)
    return counts


def _read(file: Path, max_length: int | None) -> dict[str, SplitCounts]:
    import pyarrow.compute as pc  # type: ignore[import-untyped]  # slow to import
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        table = pq.read_table(file, columns=list(_COLUMNS))
        uses = pc.list_value_length(table["uses"]).to_numpy()
        splits = np.array(table["split"].to_pylist(), object)
        left_out = np.array(table["left_out"].to_pylist(), object)
        is_usable = pc.is_null(table["left_out"]).to_numpy()
        tokens = {name: pc.fill_null(table[name], 0).to_numpy() for name in _COLUMNS[1:4]}
    except (OSError, KeyError, ValueError) as error:  # Arrow's own errors are ValueErrors
        raise InputError(f"{file}: cannot be read as a ledger ({type(error).__name__}).") from error
    counts = {}
    for name in dict.fromkeys(splits.tolist()):
        of_split = splits == name
        is_example = of_split & is_usable
        prompt, supervised = tokens["prompt_tokens"][is_example], tokens["supervised_tokens"][is_example]
        counts[name] = SplitCounts(
            prompt,
            supervised,
            num_truncated=int((tokens["truncated_tokens"][is_example] > 0).sum()),
            num_used=int((uses[is_example] > 0).sum()),
            left_out=_reasons(left_out[of_split & ~is_example]),
            row_tokens=_row_tokens(prompt + supervised, max_length) if max_length and name != "test" else None,
        )
    return counts


def _reasons(messages: Array) -> dict[str, int]:
    """How often each reason occurs; one may quote a record, so it is redacted."""
    return {redacted(message)[0]: count for message, count in Counter(messages.tolist()).most_common()}


def _row_tokens(lengths: Array, max_length: int) -> Array:
    if not len(lengths) or lengths.max() > max_length:  # the config was changed since
        return np.zeros(0, np.int64)
    rows = pack(lengths, max_length, np.arange(len(lengths)))
    return np.add.reduceat(lengths[rows.indices], np.concatenate([[0], rows.ends[:-1]]))
