"""Packing: rows filled by hand, and how much of a row stays free on lengths as claims have them."""

import numpy as np
import pytest

from lit_phi2.data.packing import pack

MAX_LENGTH = 512


def test_no_packed_row_is_longer_than_max_length(lengths: list[int]) -> None:
    row_lengths = [sum(lengths[index] for index in row) for row in pack(lengths, MAX_LENGTH, range(400))]
    assert max(row_lengths) <= MAX_LENGTH
    assert sum(row_lengths) == sum(lengths)


@pytest.mark.parametrize("spread", [0.5, 0.6, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_packed_rows_are_at_least_97_percent_full(spread: float, seed: int) -> None:
    """Over all rows, for log-normal lengths around 140 tokens with different spreads."""
    drawn = np.random.default_rng(seed).lognormal(np.log(140), spread, size=320)
    lengths = np.clip(drawn, 20, MAX_LENGTH).astype(int).tolist()
    rows = pack(lengths, MAX_LENGTH, range(320))
    assert 1 - sum(lengths) / (len(rows) * MAX_LENGTH) < 0.03


def test_examples_are_packed_into_full_rows() -> None:
    """By hand, with 8 tokens in a row: 8 alone, 5 with 3, and 4 with 4."""
    assert sorted(map(sorted, pack([8, 4, 3, 5, 4], 8, range(5)))) == [[0], [1, 4], [2, 3]]
