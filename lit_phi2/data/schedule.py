"""Plan: which examples share a row, which rows a micro-batch, which micro-batches an optimizer step.

    examples  ->  rows              up to max_length tokens each (packing), or one example each
    rows      ->  micro-batches     batch_size rows each
    micro-batches  ->  windows      accumulate x world_size of them make one optimizer step

            rank 0   rank 1
    step 0  [r r]    [r r]    <- micro-batch 0        a window, when accumulate is 2
            [r r]    [r r]    <- micro-batch 1
    step 1  [r r]    [r]      <- ragged: the last window is smaller, and its share says so

An epoch is a pure function of lengths, batching, seed, epoch and rank. Its number of steps does not depend on the epoch,
so the position of a run is its number of optimizer steps and nothing else.
"""

from dataclasses import dataclass

import numpy as np

from lit_phi2.data.packing import Array, Lengths, PackedRows, _unpacked_rows, pack
from lit_phi2.types import Row
from lit_phi2.utils.sequences import LazySequence


@dataclass(frozen=True, slots=True)
class BatchingConfig:
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
    loss_weight: float
    seed: int


class Schedule(LazySequence[MicroBatch]):
    """The micro-batches of one rank in an epoch, each made when it is asked for.

    Args:
        rows: of the epoch.
        order: of the rows, by index.
        supervised: supervised tokens of each example; None where every share is 1.
        batching: how to cut.
        key: seed and epoch, of dropout.
        rank: of world_size.
    """

    def __init__(
        self,
        rows: PackedRows,
        order: Array,
        supervised: Array | None,
        batching: BatchingConfig,
        key: tuple[int, int],
        rank: int,
    ) -> None:
        self.rows = rows
        self.order = order
        self.supervised = supervised
        self.batching = batching
        self.key = key
        self.rank = rank

    def __len__(self) -> int:
        return num_batches(len(self.order), self.batching)

    def make(self, index: int) -> MicroBatch:
        rows = self._rows(index, self.rank)
        if self.supervised is None:
            return MicroBatch(rows, loss_weight=1.0, seed=0)
        step, micro = divmod(index, self.batching.accumulate)
        window = range(index - micro, min(index - micro + self.batching.accumulate, len(self)))
        members = [
            member
            for index in window
            for rank in range(self.batching.world_size)
            for row in self._rows(index, rank)
            for member in row
        ]
        loss_weight = self.batching.accumulate * self.batching.world_size / int(self.supervised[members].sum())
        return MicroBatch(rows, loss_weight, _dropout_seed(*self.key, step, micro, self.rank))

    def _rows(self, index: int, rank: int) -> tuple[Row, ...]:
        """Of a rank at a place in the epoch; none where there is nothing left."""
        first = (index * self.batching.world_size + rank) * self.batching.batch_size
        return tuple(self.rows[row] for row in self.order[first : first + self.batching.batch_size])


def training_schedule(
    lengths: Lengths, supervised: Lengths, batching: BatchingConfig, *, seed: int, epoch: int, rank: int = 0
) -> Schedule:
    """The micro-batches of one rank in one training epoch, in order.

    Args:
        lengths: tokens of each example.
        supervised: supervised tokens of each example.
        batching: how to cut.
        seed: of the run.
        epoch: from 0.
        rank: of world_size.
    """
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths))
    rows = pack(lengths, batching.max_length, shuffled) if batching.packing else _unpacked_rows(shuffled)
    order = random.permutation(len(rows)) if batching.packing else np.arange(len(rows))
    return Schedule(rows, order, np.asarray(supervised), batching, (seed, epoch), rank)


def evaluation_schedule(lengths: Lengths, batching: BatchingConfig, *, rank: int = 0) -> Schedule:
    """The micro-batches of one rank that visit every example once, always in the same order.

    The share is 1: sums and counts are added up and divided at the end.
    """
    order = np.arange(len(lengths))
    rows = pack(lengths, batching.max_length, order) if batching.packing else _unpacked_rows(order)
    return Schedule(rows, np.arange(len(rows)), None, batching, (0, 0), rank)


def num_rows(lengths: Lengths, batching: BatchingConfig) -> int:
    """Rows in an epoch, the same in every epoch."""
    return len(pack(lengths, batching.max_length, np.arange(len(lengths)))) if batching.packing else len(lengths)


def num_batches(rows: int, batching: BatchingConfig) -> int:
    """Micro-batches of each rank in an epoch of so many rows."""
    total = -(-rows // (batching.batch_size * batching.world_size))
    if batching.limit is None:
        return total
    if isinstance(batching.limit, int):
        return min(batching.limit, total)
    return int(total * batching.limit)  # as Lightning rounds a fraction


def num_steps(batches: int, accumulate: int) -> int:
    """Optimizer steps in an epoch of so many micro-batches; the last window may be short.

    >>> num_steps(10, 4)
    3
    """
    return -(-batches // accumulate)


def _dropout_seed(*key: int) -> int:
    """A seed that no other micro-batch of the run shares, and that needs no history to compute."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
