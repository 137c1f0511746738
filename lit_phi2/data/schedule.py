"""Schedule: rows -> micro-batches of one rank -> optimizer steps of an epoch.

    examples       ->  rows             up to max_length tokens (packing), or one example each
    rows           ->  micro-batches    batch_size rows each
    micro-batches  ->  windows          accumulate x world_size of them make one optimizer step

            rank 0   rank 1
    step 0  [r r]    [r r]    <- micro-batch 0        one accumulation window, when accumulate is 2
            [r r]    [r r]    <- micro-batch 1
    step 1  [r r]    [r]      <- ragged: the last window is smaller, and its loss_weight accounts for that

An epoch is a pure function of lengths, batching, seed, epoch and rank, and every epoch has equally many steps. The
number of optimizer steps is therefore the whole position of a run.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_phi2.data.packing import Array, Lengths, PackedRows, pack, unpacked_rows
from lit_phi2.types import Row
from lit_phi2.utils.sequences import LazySequence


@dataclass(frozen=True, slots=True)
class BatchingConfig:
    """How an epoch is divided.

    Attributes:
        max_length: tokens in a packed row.
        packing: several examples per row; otherwise one.
        batch_size: rows in a micro-batch.
        accumulate: micro-batches of each rank in an optimizer step.
        world_size: number of ranks.
        limit: micro-batches of each rank in an epoch: a number, a fraction, or None for all (Lightning's
            limit_train_batches).
    """

    max_length: int
    packing: bool = True
    batch_size: int = 1
    accumulate: int = 1
    world_size: int = 1
    limit: int | float | None = None

    def fingerprint(self) -> dict[str, Any]:
        """The values that must be equal for a resumed run to be the same run; a message shows the keys."""
        return {
            "data.max_length": self.max_length,
            "data.packing": self.packing,
            "data.batch_size": self.batch_size,
            # Not world_size: another number of processes with the same rows per step takes the same steps.
            "rows_per_step": self.batch_size * self.accumulate * self.world_size,
            "train_batches_all_ranks": self.limit * self.world_size if isinstance(self.limit, int) else self.limit,
        }


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rows that one rank runs through the model at once.

    Attributes:
        rows: indices of examples, row by row; empty where a rank has no rows left in a ragged window.
        loss_weight: factor on the summed nats: accumulate x world_size / supervised tokens of the window over all
            ranks. Lightning divides by accumulate and DDP by world_size, which leaves 1 / supervised tokens.
        seed: for dropout, derived from (seed, epoch, step, micro-batch, rank).
    """

    rows: tuple[Row, ...]
    loss_weight: float
    seed: int


def training_schedule(
    lengths: Lengths, supervised: Lengths, batching: BatchingConfig, *, seed: int, epoch: int, rank: int = 0
) -> "Schedule":
    """The micro-batches of one rank in one training epoch, in order.

    Args:
        lengths: (n,), tokens of each example.
        supervised: (n,), supervised tokens of each example.
        batching: how the epoch is divided.
        seed: of the run.
        epoch: from 0.
        rank: below world_size.
    """
    rng = np.random.default_rng([seed, epoch])
    permutation = rng.permutation(len(lengths))
    rows = pack(lengths, batching.max_length, permutation) if batching.packing else unpacked_rows(permutation)
    row_order = rng.permutation(len(rows)) if batching.packing else np.arange(len(rows))
    return Schedule(rows, row_order, np.asarray(supervised), batching, (seed, epoch), rank)


def evaluation_schedule(lengths: Lengths, batching: BatchingConfig, *, rank: int = 0) -> "Schedule":
    """The micro-batches of one rank that together visit every example once, always in the same order.

    loss_weight is 1, because evaluation adds up sums and counts and divides at the end.
    """
    permutation = np.arange(len(lengths))
    rows = pack(lengths, batching.max_length, permutation) if batching.packing else unpacked_rows(permutation)
    return Schedule(rows, np.arange(len(rows)), None, batching, (0, 0), rank)


def steps_of_examples(
    lengths: Lengths, supervised: Lengths, batching: BatchingConfig, *, seed: int, epoch: int
) -> Array:
    """(n,) int32: the optimizer step within an epoch, from 0, that each example is in; -1 for none.

    The arguments are those of `training_schedule`; the result is the same for every rank.
    """
    schedule = training_schedule(lengths, supervised, batching, seed=seed, epoch=epoch)
    rows_per_batch = batching.batch_size * batching.world_size
    row_steps = np.empty(len(schedule.row_order), np.int32)
    batches = np.arange(len(row_steps), dtype=np.int32) // rows_per_batch
    row_steps[schedule.row_order] = np.where(batches < len(schedule), batches // batching.accumulate, -1)
    steps = np.empty(len(lengths), np.int32)
    steps[schedule.rows.indices] = np.repeat(row_steps, np.diff(schedule.rows.ends, prepend=0))
    return steps


class Schedule(LazySequence[MicroBatch]):
    """The micro-batches of one rank in an epoch, each built when it is indexed.

    Args:
        rows: of the epoch, of all ranks.
        row_order: permutation of the rows.
        supervised: (n,), supervised tokens of each example; None gives every micro-batch loss_weight 1 and seed 0.
        batching: how the epoch is divided.
        key: (seed, epoch) for dropout.
        rank: below world_size.
    """

    def __init__(
        self,
        rows: PackedRows,
        row_order: Array,
        supervised: Array | None,
        batching: BatchingConfig,
        key: tuple[int, int],
        rank: int,
    ) -> None:
        self.rows = rows
        self.row_order = row_order
        self.supervised = supervised
        self.batching = batching
        self.key = key
        self.rank = rank

    def __len__(self) -> int:
        return num_batches(len(self.row_order), self.batching)

    def get(self, index: int) -> MicroBatch:
        rows = self._rows(index, self.rank)
        if self.supervised is None:
            return MicroBatch(rows, loss_weight=1.0, seed=0)
        batching = self.batching
        step, micro = divmod(index, batching.accumulate)
        window = range(index - micro, min(index - micro + batching.accumulate, len(self)))
        examples = [
            example
            for index in window
            for rank in range(batching.world_size)
            for row in self._rows(index, rank)
            for example in row
        ]
        loss_weight = batching.accumulate * batching.world_size / int(self.supervised[examples].sum())
        return MicroBatch(rows, loss_weight, _dropout_seed(*self.key, step, micro, self.rank))

    def _rows(self, index: int, rank: int) -> tuple[Row, ...]:
        """The rows of any rank's micro-batch; empty past the last row."""
        start = (index * self.batching.world_size + rank) * self.batching.batch_size
        return tuple(self.rows[row] for row in self.row_order[start : start + self.batching.batch_size])


def num_rows(lengths: Lengths, batching: BatchingConfig) -> int:
    """Rows in an epoch, the same in every epoch."""
    return len(pack(lengths, batching.max_length, np.arange(len(lengths)))) if batching.packing else len(lengths)


def num_batches(rows: int, batching: BatchingConfig) -> int:
    """Micro-batches of each rank in an epoch with that many rows."""
    total = -(-rows // (batching.batch_size * batching.world_size))
    if batching.limit is None:
        return total
    if isinstance(batching.limit, int):
        return min(batching.limit, total)
    return int(total * batching.limit)  # Lightning rounds a fraction down too


def num_steps(batches: int, accumulate: int) -> int:
    """Optimizer steps in an epoch with that many micro-batches; the last window may be short.

    >>> num_steps(10, 4)
    3
    """
    return -(-batches // accumulate)


def _dropout_seed(*key: int) -> int:
    """A seed that no other micro-batch of the run has, computed without any history."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
