"""Packing: lengths of examples -> rows of indices, each row at most max_length tokens.

    lengths     0: 3   1: 5   2: 2   3: 4         max_length 8
    rows        [1 1 1 1 1 0 0 0]                 5 + 3
                [3 3 3 3 2 2 . .]                 4 + 2, two tokens free

Best fit, longest first. The number of rows depends on the lengths alone, not on the order, so every epoch has equally
many; the order decides only which examples of equal length share a row.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_phi2.types import Row
from lit_phi2.utils.sequences import LazySequence

Array = NDArray[Any]  # of integers
Lengths = Sequence[int] | Array


def pack(lengths: Lengths, max_length: int, permutation: Lengths) -> "PackedRows":
    """Put each example, longest first, into the fullest row that has enough free tokens.

    Args:
        lengths: (n,), tokens of each example, at most max_length.
        max_length: tokens in a row.
        permutation: (n,), order of the examples; it breaks ties between examples of equal length.

    Returns:
        Rows of indices into lengths.

    >>> list(pack([3, 5, 2, 4], max_length=8, permutation=range(4)))
    [(1, 0), (3, 2)]
    """
    lengths, permutation = np.asarray(lengths, np.int32), np.asarray(permutation, np.int32)
    permutation = permutation[np.argsort(-lengths[permutation], kind="stable")]
    row_of = array("i")  # the row of each example, in the order of the permutation
    rows_by_free = [array("i") for _ in range(max_length + 1)]  # open rows by their number of free tokens
    free_mask = 0  # bit f is set while a row with f free tokens is open, so best fit is the lowest set bit
    num_rows = 0
    for length in iter_chunked(lengths[permutation]):
        fitting = free_mask >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                free_mask &= ~(1 << free)
        else:
            free, row = max_length, num_rows
            num_rows += 1
        row_of.append(row)
        remaining = free - length
        if remaining:
            rows_by_free[remaining].append(row)
            free_mask |= 1 << remaining
    rows = np.frombuffer(row_of, np.int32) if row_of else np.zeros(0, np.int32)
    return PackedRows(permutation[np.argsort(rows, kind="stable")], np.bincount(rows, minlength=num_rows).cumsum())


def unpacked_rows(permutation: Array) -> "PackedRows":
    """One example per row, in the given order."""
    return PackedRows(permutation, np.arange(1, len(permutation) + 1))


class PackedRows(LazySequence[Row]):
    """Rows of indices in one array; a tuple for each of millions of rows would take gigabytes.

    Args:
        indices: (n,), row after row.
        ends: (rows,), where each row ends in indices.
    """

    def __init__(self, indices: Array, ends: Array) -> None:
        self.indices = indices
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends)

    def get(self, index: int) -> Row:
        start = self.ends[index - 1] if index else 0
        return tuple(self.indices[start : self.ends[index]].tolist())


def iter_chunked(values: Array, chunk_size: int = 2**16) -> Iterator[int]:
    """The values as Python integers, of which only chunk_size exist at once."""
    for start in range(0, len(values), chunk_size):
        yield from values[start : start + chunk_size].tolist()
