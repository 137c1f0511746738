"""Schedules: every example once, and windows in which every supervised token has the same weight."""

import random
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

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


def indices(schedule: Iterable[MicroBatch]) -> list[int]:
    return [index for micro in schedule for row in micro.rows for index in row]


def schedules_of_ranks(
    lengths: list[int], supervised: list[int], config: BatchingConfig, **key: int
) -> list[list[MicroBatch]]:
    """The schedule of every rank."""
    return [training_schedule(lengths, supervised, config, rank=rank, **key) for rank in range(config.world_size)]


def windows(schedules: list[list[MicroBatch]], accumulate: int) -> list[list[MicroBatch]]:
    """The micro-batches of each optimizer step, over all ranks."""
    length = len(schedules[0])
    return [[m for schedule in schedules for m in schedule[s : s + accumulate]] for s in range(0, length, accumulate)]


# Epochs


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_visits_every_example_once(
    packing: bool, epoch: int, lengths: list[int], supervised: list[int]
) -> None:
    schedule = training_schedule(lengths, supervised, BatchingConfig(MAX_LENGTH, packing=packing), seed=1, epoch=epoch)
    assert sorted(indices(schedule)) == list(range(400))


def test_without_packing_a_row_is_one_example(lengths: list[int], supervised: list[int]) -> None:
    schedule = training_schedule(
        lengths, supervised, BatchingConfig(MAX_LENGTH, packing=False, batch_size=3), seed=1, epoch=0
    )
    assert {len(row) for micro in schedule for row in micro.rows} == {1}
    assert {len(micro.rows) for micro in schedule[:-1]} == {3}
    assert len(schedule[-1].rows) == 400 - 3 * 133


@pytest.mark.parametrize(
    "config",
    [BatchingConfig(MAX_LENGTH), BatchingConfig(MAX_LENGTH, packing=False), BatchingConfig(MAX_LENGTH, limit=0.3)],
)
def test_every_epoch_has_num_batches_micro_batches(
    config: BatchingConfig, lengths: list[int], supervised: list[int]
) -> None:
    """The learning-rate schedule and resume rely on it."""
    counts = {
        len(training_schedule(lengths, supervised, config, seed=seed, epoch=epoch))
        for seed in (0, 9)
        for epoch in range(6)
    }
    assert counts == {num_batches(num_rows(lengths, config), config)}


def test_num_steps_counts_the_last_short_window() -> None:
    assert [num_steps(batches, 4) for batches in (1, 3, 4, 5, 8, 9)] == [1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("packing", [True, False])
def test_the_order_differs_between_epochs_and_seeds(packing: bool, lengths: list[int], supervised: list[int]) -> None:
    config = BatchingConfig(MAX_LENGTH, packing=packing)
    keys = [(seed, epoch) for seed in (0, 1) for epoch in range(4)]
    orders = {tuple(indices(training_schedule(lengths, supervised, config, seed=s, epoch=e))) for s, e in keys}
    assert len(orders) == len(keys)


def test_packed_rows_group_other_examples_in_another_epoch(lengths: list[int], supervised: list[int]) -> None:
    """Ties between examples of equal length are broken differently in each epoch."""
    schedules = [
        training_schedule(lengths, supervised, BatchingConfig(MAX_LENGTH), seed=0, epoch=epoch) for epoch in (0, 1)
    ]
    first, second = ({frozenset(row) for micro in schedule for row in micro.rows} for schedule in schedules)
    assert len(first & second) < len(first) / 2


def test_an_epoch_is_a_pure_function_of_seed_and_epoch(lengths: list[int], supervised: list[int]) -> None:
    """Neither the global random state nor epochs that were scheduled before matter."""
    first = list(training_schedule(lengths, supervised, BatchingConfig(MAX_LENGTH), seed=7, epoch=3))
    random.seed(123)
    np.random.seed(123)
    training_schedule(lengths, supervised, BatchingConfig(MAX_LENGTH), seed=8, epoch=0)
    assert list(training_schedule(lengths, supervised, BatchingConfig(MAX_LENGTH), seed=7, epoch=3)) == first


# Windows


CONFIGS = [
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


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_supervised_tokens_of_a_window_have_equal_weight(
    config: BatchingConfig, lengths: list[int], supervised: list[int]
) -> None:
    """Lightning divides by accumulate and DDP by world_size; what remains must be 1 / supervised tokens of the window.

    Reference: the closed form. Tolerance: the rounding of a sum of at most a hundred float64 values.
    """
    schedules = schedules_of_ranks(lengths, supervised, config, seed=3, epoch=2)
    steps = windows(schedules, config.accumulate)
    assert len(steps) == num_steps(num_batches(num_rows(lengths, config), config), config.accumulate) > 0
    for window in steps:
        assert len({micro.loss_weight for micro in window}) == 1
        total = sum(micro.loss_weight * supervised[index] for micro in window for index in indices([micro]))
        assert total / (config.accumulate * config.world_size) == pytest.approx(1, abs=1e-12)


def test_configs_include_ragged_windows_and_idle_ranks(lengths: list[int], supervised: list[int]) -> None:
    """Otherwise the test above would not cover them."""
    ragged = [config for config in CONFIGS if num_batches(num_rows(lengths, config), config) % config.accumulate]
    assert len(ragged) >= 3
    assert any(config.limit for config in ragged)
    idle = [
        s
        for s in CONFIGS
        for schedule in schedules_of_ranks(lengths, supervised, s, seed=3, epoch=2)
        for m in schedule
        if not m.rows
    ]
    assert idle


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("limit", [None, 5])
def test_ranks_get_equally_many_batches_and_disjoint_examples(
    world_size: int, limit: int | None, lengths: list[int], supervised: list[int]
) -> None:
    config = BatchingConfig(MAX_LENGTH, batch_size=2, accumulate=3, world_size=world_size, limit=limit)
    schedules = schedules_of_ranks(lengths, supervised, config, seed=0, epoch=0)
    assert {len(schedule) for schedule in schedules} == {num_batches(num_rows(lengths, config), config)}
    visits = Counter(index for schedule in schedules for index in indices(schedule))
    assert set(visits.values()) == {1}
    if limit is None:
        assert len(visits) == 400


def test_a_limit_counts_micro_batches_of_each_rank(lengths: list[int]) -> None:
    """As in Lightning. 400 rows in micro-batches of 10 are 40 micro-batches, 20 for each of two ranks."""
    limits = [None, 5, 100, 0.5, 0.26, 1.0]
    configs = [BatchingConfig(MAX_LENGTH, packing=False, batch_size=10, world_size=2, limit=limit) for limit in limits]
    assert [num_batches(num_rows(lengths, config), config) for config in configs] == [20, 5, 20, 10, 5, 20]


def test_a_limited_epoch_is_the_start_of_the_whole_epoch(lengths: list[int], supervised: list[int]) -> None:
    whole = training_schedule(lengths, supervised, BatchingConfig(MAX_LENGTH), seed=0, epoch=0)
    limited = training_schedule(lengths, supervised, BatchingConfig(MAX_LENGTH, limit=9), seed=0, epoch=0)
    assert [micro.rows for micro in limited] == [micro.rows for micro in whole[:9]]


@pytest.mark.parametrize("packing", [True, False])
def test_steps_depend_only_on_the_rows_per_step(packing: bool, lengths: list[int], supervised: list[int]) -> None:
    """Eight rows per step from batch size, accumulation and ranks: the same examples and token weight in each step."""
    steps = []
    for batch_size, accumulate, world_size in [(8, 1, 1), (1, 8, 1), (2, 4, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]:
        config = BatchingConfig(MAX_LENGTH, packing, batch_size, accumulate, world_size)
        schedules = schedules_of_ranks(lengths, supervised, config, seed=5, epoch=1)
        step_windows = windows(schedules, accumulate)
        steps.append([(frozenset(indices(w)), w[0].loss_weight / (accumulate * world_size)) for w in step_windows])
    assert len(steps[0]) > 10
    for other in steps[1:]:
        assert [examples for examples, _ in other] == [examples for examples, _ in steps[0]]
        assert [weight for _, weight in other] == pytest.approx([weight for _, weight in steps[0]], rel=1e-15)


def test_no_two_micro_batches_of_a_run_share_a_dropout_seed(lengths: list[int], supervised: list[int]) -> None:
    """Across ranks, steps, epochs and seeds."""
    config = BatchingConfig(MAX_LENGTH, accumulate=4, world_size=3)
    keys = [(seed, epoch) for seed in (0, 1, 42) for epoch in range(4)]
    schedules = [
        schedule for s, e in keys for schedule in schedules_of_ranks(lengths, supervised, config, seed=s, epoch=e)
    ]
    seeds = [micro.seed for schedule in schedules for micro in schedule]
    assert len(seeds) > 1000
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds) <= max(seeds) < 2**63  # what torch.manual_seed takes


# Evaluation


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (3, 2), (4, 5)])
def test_evaluation_visits_every_example_once_over_all_ranks(
    packing: bool, batch_size: int, world_size: int, lengths: list[int]
) -> None:
    """Ranks run equally many micro-batches; otherwise one would wait for the others forever."""
    config = BatchingConfig(MAX_LENGTH, packing, batch_size, world_size=world_size)
    schedules = [evaluation_schedule(lengths, config, rank=rank) for rank in range(world_size)]
    assert sorted(index for schedule in schedules for index in indices(schedule)) == list(range(400))
    assert len({len(schedule) for schedule in schedules}) == 1
    assert {micro.loss_weight for schedule in schedules for micro in schedule} == {1.0}


def test_evaluation_without_packing_keeps_the_file_order(lengths: list[int]) -> None:
    assert indices(evaluation_schedule(lengths, BatchingConfig(MAX_LENGTH, packing=False))) == list(range(400))
