"""data/packing.py."""

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_phi2.types import Row
from lit_phi2.utils.sequences import LazySequence

Array = NDArray[Any]  # of whole numbers

Lengths = Sequence[int] | Array


class PackedRows(LazySequence[Row]):
    """Rows of indices, all in one array: a tuple for each of millions would take gigabytes.

    Args:
        members: the indices, row after row.
        ends: where each row ends among them.
    """

    def __init__(self, members: Array, ends: Array) -> None:
        self.members = members
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends)

    def make(self, index: int) -> Row:
        start = self.ends[index - 1] if index else 0
        return tuple(self.members[start : self.ends[index]].tolist())


def pack(lengths: Lengths, max_length: int, order: Lengths) -> PackedRows:
    """Best fit, longest first: each example goes to the fullest row that still has room for it.

    Args:
        lengths: tokens of each example, at most max_length each.
        max_length: tokens that a row holds.
        order: of the examples, by index; it decides among examples of the same length. So the number of rows does not
            depend on it.

    Returns:
        Rows of indices into lengths.

    >>> list(pack([3, 5, 2, 4], max_length=8, order=range(4)))
    [(1, 0), (3, 2)]
    """
    lengths, order = np.asarray(lengths, np.int32), np.asarray(order, np.int32)
    order = order[np.argsort(-lengths[order], kind="stable")]
    row_of = array("i")  # of each example, in that order
    open_rows = [array("i") for _ in range(max_length + 1)]  # by the room they have left
    rooms = 0  # bit r is set while a row with room r is open, so the tightest fit is one bit operation away
    num_rows = 0
    for length in iter_chunked(lengths[order]):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms &= ~(1 << room)
        else:
            room, row = max_length, num_rows
            num_rows += 1
        row_of.append(row)
        left = room - length
        if left:
            open_rows[left].append(row)
            rooms |= 1 << left
    filled = np.frombuffer(row_of, np.int32) if row_of else np.zeros(0, np.int32)
    return PackedRows(order[np.argsort(filled, kind="stable")], np.bincount(filled, minlength=num_rows).cumsum())


def _unpacked_rows(order: Array) -> PackedRows:
    return PackedRows(order, np.arange(1, len(order) + 1))


def iter_chunked(values: Array, size: int = 2**16) -> Iterator[int]:
    """Plain numbers, of which only so many are in memory at once."""
    for start in range(0, len(values), size):
        yield from values[start : start + size].tolist()
