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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_phi2.batch import Row


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


def pack(lengths: Sequence[int], max_length: int, order: Sequence[int]) -> list[Row]:
    """Best fit, longest first: each example goes to the fullest row that still has room for it.

    Args:
        lengths: tokens of each example, at most max_length each.
        max_length: tokens that a row holds.
        order: of the examples, by index; it decides among examples of the same length. So the number of rows does not
            depend on it.

    Returns:
        Rows of indices into lengths.

    >>> pack([3, 5, 2, 4], max_length=8, order=range(4))
    [(1, 0), (3, 2)]
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(max_length + 1)]  # by the room they have left
    rooms = 0  # bit r is set while a row with room r is open, so the tightest fit is one bit operation away
    for index in sorted(order, key=lambda index: -lengths[index]):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms &= ~(1 << room)
        else:
            room, row = max_length, len(rows)
            rows.append([])
        rows[row].append(index)
        left = room - length
        if left:
            open_rows[left].append(row)
            rooms |= 1 << left
    return [tuple(row) for row in rows]


def plan_epoch(
    lengths: Sequence[int], supervised: Sequence[int], shape: Shape, *, seed: int, epoch: int, rank: int = 0
) -> list[MicroBatch]:
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
    shuffled = random.permutation(len(lengths)).tolist()
    if shape.packing:
        rows = pack(lengths, shape.max_length, shuffled)
        rows = [rows[index] for index in random.permutation(len(rows))]
    else:
        rows = [(index,) for index in shuffled]
    columns = _columns(rows, shape)  # [position in the epoch][rank]
    plan: list[MicroBatch] = []
    for start in range(0, len(columns), shape.accumulate):
        window = columns[start : start + shape.accumulate]
        tokens = sum(supervised[index] for column in window for rows_ in column for row in rows_ for index in row)
        share = shape.accumulate * shape.world_size / tokens
        for micro, column in enumerate(window):
            plan.append(
                MicroBatch(
                    rows=column[rank],
                    share=share,
                    seed=_dropout_seed(seed, epoch, start // shape.accumulate, micro, rank),
                )
            )
    return plan


def plan_evaluation(lengths: Sequence[int], shape: Shape, *, rank: int = 0) -> list[MicroBatch]:
    """The micro-batches of one rank that visit every example once, always in the same order.

    The share is 1: sums and counts are added up and divided at the end.
    """
    order = range(len(lengths))
    rows = pack(lengths, shape.max_length, order) if shape.packing else [(index,) for index in order]
    return [MicroBatch(column[rank], share=1.0, seed=0) for column in _columns(rows, shape)]


def num_batches(lengths: Sequence[int], shape: Shape) -> int:
    """Micro-batches of each rank in an epoch, the same in every epoch."""
    if not shape.packing:
        return _num_columns(len(lengths), shape)
    return _num_columns(len(pack(lengths, shape.max_length, range(len(lengths)))), shape)


def num_steps(batches: int, accumulate: int) -> int:
    """Optimizer steps in an epoch of so many micro-batches; the last window may be short.

    >>> num_steps(10, 4)
    3
    """
    return -(-batches // accumulate)


def _num_columns(num_rows: int, shape: Shape) -> int:
    total = -(-num_rows // (shape.batch_size * shape.world_size))
    if shape.limit is None:
        return total
    if isinstance(shape.limit, int):
        return min(shape.limit, total)
    return int(total * shape.limit)  # as Lightning rounds a fraction


def _columns(rows: Sequence[Row], shape: Shape) -> list[list[tuple[Row, ...]]]:
    """Micro-batches by position in the epoch and rank; ranks without rows at the end get empty ones."""
    size, world = shape.batch_size, shape.world_size
    micro_batches = [tuple(rows[start : start + size]) for start in range(0, len(rows), size)]
    micro_batches += [()] * (-len(micro_batches) % world)
    columns = [micro_batches[start : start + world] for start in range(0, len(micro_batches), world)]
    return columns[: _num_columns(len(rows), shape)]


def _dropout_seed(*key: int) -> int:
    """A seed that no other micro-batch of the run shares, and that needs no history to compute."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
