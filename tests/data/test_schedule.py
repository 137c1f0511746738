"""Plans: every example once, rows well filled, windows that weigh every token the same."""

import random
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from lit_phi2.data.packing import pack
from lit_phi2.data.schedule import (
    BatchingConfig,
    MicroBatch,
    evaluation_schedule,
    num_batches,
    num_rows,
    num_steps,
    training_schedule,
)

MAX_LENGTH = 512


@pytest.fixture(scope="module")
def lengths() -> list[int]:
    """Tokens of 400 records as claims have them: log-normal around 140, the few long ones at the limit."""
    drawn = np.random.default_rng(0).lognormal(np.log(140), 0.6, size=400)
    return np.clip(drawn, 20, MAX_LENGTH).astype(int).tolist()


@pytest.fixture(scope="module")
def supervised(lengths: list[int]) -> list[int]:
    """Between one token and all but five of each record."""
    generator = random.Random(0)
    return [generator.randint(1, length - 5) for length in lengths]


def indices(plan: Iterable[MicroBatch]) -> list[int]:
    return [index for micro in plan for row in micro.rows for index in row]


def ranks(lengths: list[int], supervised: list[int], shape: BatchingConfig, **key: int) -> list[list[MicroBatch]]:
    """The plan of every rank."""
    return [training_schedule(lengths, supervised, shape, rank=rank, **key) for rank in range(shape.world_size)]


def windows(plans: list[list[MicroBatch]], accumulate: int) -> list[list[MicroBatch]]:
    """The micro-batches of each optimizer step, over all ranks."""
    length = len(plans[0])
    return [[m for plan in plans for m in plan[s : s + accumulate]] for s in range(0, length, accumulate)]


# Packing


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_visits_every_example_exactly_once(
    packing: bool, epoch: int, lengths: list[int], supervised: list[int]
) -> None:
    plan = training_schedule(lengths, supervised, BatchingConfig(MAX_LENGTH, packing=packing), seed=1, epoch=epoch)
    assert sorted(indices(plan)) == list(range(400))


def test_no_packed_row_is_longer_than_max_length(lengths: list[int]) -> None:
    filled = [sum(lengths[index] for index in row) for row in pack(lengths, MAX_LENGTH, range(400))]
    assert max(filled) <= MAX_LENGTH
    assert sum(filled) == sum(lengths)


@pytest.mark.parametrize("spread", [0.5, 0.6, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_packed_rows_waste_less_than_three_percent(spread: float, seed: int) -> None:
    """Of all places in rows, on records of several spreads around 140 tokens."""
    drawn = np.random.default_rng(seed).lognormal(np.log(140), spread, size=320)
    lengths = np.clip(drawn, 20, MAX_LENGTH).astype(int).tolist()
    rows = pack(lengths, MAX_LENGTH, range(320))
    assert 1 - sum(lengths) / (len(rows) * MAX_LENGTH) < 0.03


def test_without_packing_a_row_is_one_example(lengths: list[int], supervised: list[int]) -> None:
    plan = training_schedule(
        lengths, supervised, BatchingConfig(MAX_LENGTH, packing=False, batch_size=3), seed=1, epoch=0
    )
    assert {len(row) for micro in plan for row in micro.rows} == {1}
    assert {len(micro.rows) for micro in plan[:-1]} == {3}
    assert len(plan[-1].rows) == 400 - 3 * 133


def test_examples_that_fill_a_row_stand_alone() -> None:
    """By hand: 8 fills a row; 5 and 3 do so together; 4 and 4 too."""
    assert sorted(map(sorted, pack([8, 4, 3, 5, 4], 8, range(5)))) == [[0], [1, 4], [2, 3]]


# Epochs


@pytest.mark.parametrize(
    "shape",
    [BatchingConfig(MAX_LENGTH), BatchingConfig(MAX_LENGTH, packing=False), BatchingConfig(MAX_LENGTH, limit=0.3)],
)
def test_every_epoch_has_as_many_micro_batches_as_was_said_before(
    shape: BatchingConfig, lengths: list[int], supervised: list[int]
) -> None:
    """The learning rate schedule and resuming rely on it."""
    found = {
        len(training_schedule(lengths, supervised, shape, seed=seed, epoch=epoch))
        for seed in (0, 9)
        for epoch in range(6)
    }
    assert found == {num_batches(num_rows(lengths, shape), shape)}


def test_steps_are_windows_counted_with_the_last_short_one() -> None:
    assert [num_steps(batches, 4) for batches in (1, 3, 4, 5, 8, 9)] == [1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("packing", [True, False])
def test_the_order_differs_from_epoch_to_epoch_and_from_seed_to_seed(
    packing: bool, lengths: list[int], supervised: list[int]
) -> None:
    shape = BatchingConfig(MAX_LENGTH, packing=packing)
    keys = [(seed, epoch) for seed in (0, 1) for epoch in range(4)]
    orders = {tuple(indices(training_schedule(lengths, supervised, shape, seed=s, epoch=e))) for s, e in keys}
    assert len(orders) == len(keys)


def test_packed_rows_hold_other_neighbours_in_another_epoch(lengths: list[int], supervised: list[int]) -> None:
    """Examples of one length change places, so rows are not the same groups for ever."""
    plans = [
        training_schedule(lengths, supervised, BatchingConfig(MAX_LENGTH), seed=0, epoch=epoch) for epoch in (0, 1)
    ]
    first, second = ({frozenset(row) for micro in plan for row in micro.rows} for plan in plans)
    assert len(first & second) < len(first) / 2


def test_an_epoch_is_a_pure_function_of_seed_and_epoch(lengths: list[int], supervised: list[int]) -> None:
    """Whatever else drew random numbers, and whichever epochs were planned before."""
    first = list(training_schedule(lengths, supervised, BatchingConfig(MAX_LENGTH), seed=7, epoch=3))
    random.seed(123)
    np.random.seed(123)
    training_schedule(lengths, supervised, BatchingConfig(MAX_LENGTH), seed=8, epoch=0)
    assert list(training_schedule(lengths, supervised, BatchingConfig(MAX_LENGTH), seed=7, epoch=3)) == first


# Windows

SHAPES = [
    BatchingConfig(MAX_LENGTH, packing, batch_size, accumulate, world_size, limit)
    for packing, batch_size, accumulate, world_size, limit in [
        (True, 1, 1, 1, None),
        (True, 1, 4, 1, None),
        (True, 2, 4, 2, None),
        (True, 1, 3, 4, 7),
        (True, 1, 3, 2, 0.4),
        (False, 1, 1, 1, None),
        (False, 1, 7, 1, None),
        (False, 3, 5, 4, None),
        (False, 8, 4, 3, 10),
        (False, 2, 4, 2, 0.33),
    ]
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_every_window_each_supervised_token_weighs_the_same(
    shape: BatchingConfig, lengths: list[int], supervised: list[int]
) -> None:
    """Lightning divides by accumulate and DDP by world_size; what is left must be 1 / supervised tokens of the window.

    Closed form; the tolerance is that of adding at most a hundred float64.
    """
    plans = ranks(lengths, supervised, shape, seed=3, epoch=2)
    found = windows(plans, shape.accumulate)
    assert len(found) == num_steps(num_batches(num_rows(lengths, shape), shape), shape.accumulate) > 0
    for window in found:
        assert len({micro.loss_weight for micro in window}) == 1
        total = sum(micro.loss_weight * supervised[index] for micro in window for index in indices([micro]))
        assert total / (shape.accumulate * shape.world_size) == pytest.approx(1, abs=1e-12)


def test_the_shapes_above_include_ragged_windows_and_ranks_without_rows(
    lengths: list[int], supervised: list[int]
) -> None:
    """Or the test above would not be about them."""
    ragged = [shape for shape in SHAPES if num_batches(num_rows(lengths, shape), shape) % shape.accumulate]
    assert len(ragged) >= 3
    assert any(shape.limit for shape in ragged)
    empty = [s for s in SHAPES for plan in ranks(lengths, supervised, s, seed=3, epoch=2) for m in plan if not m.rows]
    assert empty


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("limit", [None, 5])
def test_ranks_get_equally_many_micro_batches_and_no_example_twice(
    world_size: int, limit: int | None, lengths: list[int], supervised: list[int]
) -> None:
    shape = BatchingConfig(MAX_LENGTH, batch_size=2, accumulate=3, world_size=world_size, limit=limit)
    plans = ranks(lengths, supervised, shape, seed=0, epoch=0)
    assert {len(plan) for plan in plans} == {num_batches(num_rows(lengths, shape), shape)}
    visits = Counter(index for plan in plans for index in indices(plan))
    assert set(visits.values()) == {1}
    if limit is None:
        assert len(visits) == 400


def test_a_limit_is_counted_in_micro_batches_of_each_rank_as_lightning_does(lengths: list[int]) -> None:
    """400 rows of one example, 10 a micro-batch: 40 of them, 20 for each of two ranks."""
    limits = [None, 5, 100, 0.5, 0.26, 1.0]
    shapes = [BatchingConfig(MAX_LENGTH, packing=False, batch_size=10, world_size=2, limit=limit) for limit in limits]
    assert [num_batches(num_rows(lengths, shape), shape) for shape in shapes] == [20, 5, 20, 10, 5, 20]


def test_a_limited_epoch_is_the_start_of_the_whole_one(lengths: list[int], supervised: list[int]) -> None:
    whole = training_schedule(lengths, supervised, BatchingConfig(MAX_LENGTH), seed=0, epoch=0)
    limited = training_schedule(lengths, supervised, BatchingConfig(MAX_LENGTH, limit=9), seed=0, epoch=0)
    assert [micro.rows for micro in limited] == [micro.rows for micro in whole[:9]]


@pytest.mark.parametrize("packing", [True, False])
def test_batch_size_accumulation_and_ranks_group_the_same_steps(
    packing: bool, lengths: list[int], supervised: list[int]
) -> None:
    """Eight rows in a step, however they are divided: the same examples and the same weight of a token in each."""
    steps = []
    for batch_size, accumulate, world_size in [(8, 1, 1), (1, 8, 1), (2, 4, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]:
        shape = BatchingConfig(MAX_LENGTH, packing, batch_size, accumulate, world_size)
        plans = ranks(lengths, supervised, shape, seed=5, epoch=1)
        found = windows(plans, accumulate)
        steps.append([(frozenset(indices(w)), w[0].loss_weight / (accumulate * world_size)) for w in found])
    assert len(steps[0]) > 10
    for other in steps[1:]:
        assert [examples for examples, _ in other] == [examples for examples, _ in steps[0]]
        assert [weight for _, weight in other] == pytest.approx([weight for _, weight in steps[0]], rel=1e-15)


def test_no_two_micro_batches_of_a_run_share_their_dropout(lengths: list[int], supervised: list[int]) -> None:
    """Over ranks, steps, epochs and seeds."""
    shape = BatchingConfig(MAX_LENGTH, accumulate=4, world_size=3)
    keys = [(seed, epoch) for seed in (0, 1, 42) for epoch in range(4)]
    plans = [plan for s, e in keys for plan in ranks(lengths, supervised, shape, seed=s, epoch=e)]
    seeds = [micro.seed for plan in plans for micro in plan]
    assert len(seeds) > 1000
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds) <= max(seeds) < 2**63  # what torch.manual_seed takes


# Evaluation


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (3, 2), (4, 5)])
def test_evaluation_visits_every_example_once_over_all_ranks(
    packing: bool, batch_size: int, world_size: int, lengths: list[int]
) -> None:
    """Ranks run equally many micro-batches, or the one with more would wait for the others for ever."""
    shape = BatchingConfig(MAX_LENGTH, packing, batch_size, world_size=world_size)
    plans = [evaluation_schedule(lengths, shape, rank=rank) for rank in range(world_size)]
    assert sorted(index for plan in plans for index in indices(plan)) == list(range(400))
    assert len({len(plan) for plan in plans}) == 1
    assert {micro.loss_weight for plan in plans for micro in plan} == {1.0}


def test_evaluation_without_packing_keeps_the_order_of_the_file(lengths: list[int]) -> None:
    assert indices(evaluation_schedule(lengths, BatchingConfig(MAX_LENGTH, packing=False))) == list(range(400))
