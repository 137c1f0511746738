"""A completion that loops is recognised; reference: sequences whose cycle is known by construction."""

import random

import pytest

from lit_phi2.generation.repetition import ends_in_cycle

TEXT = list(range(100, 160))  # sixty different tokens


@pytest.mark.parametrize("cycle", [1, 2, 3, 7, 19, 20, 21, 50, 100])
def test_a_tail_that_repeats_a_cycle_is_found(cycle: int) -> None:
    """Also where the completion was cut inside the cycle, and up to the fewest tokens that count."""
    tokens = list(range(cycle))
    for num_repeated in (max(cycle, 20), max(cycle, 20) + 1, 3 * cycle + 40):
        looped = (tokens * (num_repeated // cycle + 2))[: cycle + num_repeated]
        assert ends_in_cycle(TEXT + looped)
        assert ends_in_cycle(looped)


@pytest.mark.parametrize("cycle", [1, 2, 3, 7, 19, 20, 21, 50, 100])
def test_one_repeated_token_too_few_is_no_loop(cycle: int) -> None:
    tokens = list(range(cycle))
    num_repeated = max(cycle, 20) - 1
    looped = (tokens * (num_repeated // cycle + 2))[: cycle + num_repeated]
    assert not ends_in_cycle(TEXT + looped)


def test_a_loop_that_the_completion_left_does_not_count() -> None:
    assert ends_in_cycle([1, 2] * 40)
    assert not ends_in_cycle([1, 2] * 40 + [3])


def test_ordinary_completions_are_no_loops() -> None:
    draw = random.Random(0)
    assert not ends_in_cycle([])
    assert not ends_in_cycle([5])
    for length in (2, 40, 400):
        assert not ends_in_cycle([draw.randrange(50) for _ in range(length)])
