"""Plan: which examples share a row, which rows a micro-batch, which micro-batches an optimizer step.

    examples  ->  rows              up to max_length tokens each (packing), or one example each
    rows      ->  micro-batches     batch_size rows each
    micro-batches  ->  windows      accumulate x world_size of them make one optimizer step

            rank 0   rank 1
    step 0  [r r]    [r r]    <- micro-batch 0        a window, when accumulate is 2
            [r r]    [r r]    <- micro-batch 1
    step 1  [r r]    [r]      <- ragged: the last window is smaller, and its share says so

An epoch is a pure function of lengths, shape, seed, epoch and rank. Its number of steps does not depend on the epoch,
so the position of a run is its number of optimizer steps and nothing else.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_phi2.batch import MadeWhenAsked, Row

Array = NDArray[Any]  # of whole numbers
Lengths = Sequence[int] | Array


@dataclass(frozen=True, slots=True)
class Shape:
    """How an epoch is cut.

    Attributes:
        max_length: tokens in a packed row.
        packing: several examples to a row; otherwise one.
        batch_size: rows in a micro-batch.
        accumulate: micro-batches of each rank in an optimizer step.
        world_size: number of ranks.
        limit: of micro-batches of each rank in an epoch: a number, a fraction, or None (Lightning's limit_*_batches).
    """

    max_length: int
    packing: bool = True
    batch_size: int = 1
    accumulate: int = 1
    world_size: int = 1
    limit: int | float | None = None


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one rank runs through the model at once.

    Attributes:
        rows: indices of examples, row by row; empty where a rank has nothing left in a ragged window.
        share: what summed nats are multiplied by: accumulate x world_size / supervised tokens of the window over all
            ranks. Lightning divides by the first and DDP by the second, which leaves 1 / supervised tokens.
        seed: of its dropout, from (seed, epoch, step, micro-batch, rank).
    """

    rows: tuple[Row, ...]
    share: float
    seed: int


class Rows(MadeWhenAsked[Row]):
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


def pack(lengths: Lengths, max_length: int, order: Lengths) -> Rows:
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
    for length in in_pieces(lengths[order]):
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
    return Rows(order[np.argsort(filled, kind="stable")], np.bincount(filled, minlength=num_rows).cumsum())


class Plan(MadeWhenAsked[MicroBatch]):
    """The micro-batches of one rank in an epoch, each made when it is asked for.

    Args:
        rows: of the epoch.
        order: of the rows, by index.
        supervised: supervised tokens of each example; None where every share is 1.
        shape: how to cut.
        key: seed and epoch, of dropout.
        rank: of world_size.
    """

    def __init__(
        self, rows: Rows, order: Array, supervised: Array | None, shape: Shape, key: tuple[int, int], rank: int
    ) -> None:
        self.rows = rows
        self.order = order
        self.supervised = supervised
        self.shape = shape
        self.key = key
        self.rank = rank

    def __len__(self) -> int:
        return num_batches(len(self.order), self.shape)

    def make(self, index: int) -> MicroBatch:
        rows = self._rows(index, self.rank)
        if self.supervised is None:
            return MicroBatch(rows, share=1.0, seed=0)
        step, micro = divmod(index, self.shape.accumulate)
        window = range(index - micro, min(index - micro + self.shape.accumulate, len(self)))
        members = [
            member
            for index in window
            for rank in range(self.shape.world_size)
            for row in self._rows(index, rank)
            for member in row
        ]
        share = self.shape.accumulate * self.shape.world_size / int(self.supervised[members].sum())
        return MicroBatch(rows, share, _dropout_seed(*self.key, step, micro, self.rank))

    def _rows(self, index: int, rank: int) -> tuple[Row, ...]:
        """Of a rank at a place in the epoch; none where there is nothing left."""
        first = (index * self.shape.world_size + rank) * self.shape.batch_size
        return tuple(self.rows[row] for row in self.order[first : first + self.shape.batch_size])


def plan_epoch(lengths: Lengths, supervised: Lengths, shape: Shape, *, seed: int, epoch: int, rank: int = 0) -> Plan:
    """The micro-batches of one rank in one training epoch, in order.

    Args:
        lengths: tokens of each example.
        supervised: supervised tokens of each example.
        shape: how to cut.
        seed: of the run.
        epoch: from 0.
        rank: of world_size.
    """
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths))
    rows = pack(lengths, shape.max_length, shuffled) if shape.packing else _one_each(shuffled)
    order = random.permutation(len(rows)) if shape.packing else np.arange(len(rows))
    return Plan(rows, order, np.asarray(supervised), shape, (seed, epoch), rank)


def plan_evaluation(lengths: Lengths, shape: Shape, *, rank: int = 0) -> Plan:
    """The micro-batches of one rank that visit every example once, always in the same order.

    The share is 1: sums and counts are added up and divided at the end.
    """
    order = np.arange(len(lengths))
    rows = pack(lengths, shape.max_length, order) if shape.packing else _one_each(order)
    return Plan(rows, np.arange(len(rows)), None, shape, (0, 0), rank)


def num_rows(lengths: Lengths, shape: Shape) -> int:
    """Rows in an epoch, the same in every epoch."""
    return len(pack(lengths, shape.max_length, np.arange(len(lengths)))) if shape.packing else len(lengths)


def num_batches(rows: int, shape: Shape) -> int:
    """Micro-batches of each rank in an epoch of so many rows."""
    total = -(-rows // (shape.batch_size * shape.world_size))
    if shape.limit is None:
        return total
    if isinstance(shape.limit, int):
        return min(shape.limit, total)
    return int(total * shape.limit)  # as Lightning rounds a fraction


def num_steps(batches: int, accumulate: int) -> int:
    """Optimizer steps in an epoch of so many micro-batches; the last window may be short.

    >>> num_steps(10, 4)
    3
    """
    return -(-batches // accumulate)


def _one_each(order: Array) -> Rows:
    return Rows(order, np.arange(1, len(order) + 1))


def in_pieces(values: Array, size: int = 2**16) -> Iterator[int]:
    """Plain numbers, of which only so many are in memory at once."""
    for start in range(0, len(values), size):
        yield from values[start : start + size].tolist()


def _dropout_seed(*key: int) -> int:
    """A seed that no other micro-batch of the run shares, and that needs no history to compute."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
