"""Items of a slow source arrive in order, and nobody with other work waits for them."""

import threading
from collections.abc import Iterator

import pytest

from lit_phi2.utils.arrivals import arrivals


def test_every_item_arrives_in_order() -> None:
    assert list(arrivals(range(1000), lambda: True, ahead=3)) == list(range(1000))


def test_work_goes_on_while_nothing_arrives() -> None:
    """The source waits for the third piece of other work, so waiting for the source would never end."""
    worked = threading.Event()

    def source() -> Iterator[int]:
        yield 1
        assert worked.wait(60)
        yield 2

    seen, num_worked = [], 0
    for item in arrivals(source(), lambda: False, ahead=3):
        if item is not None:
            seen.append(item)
        else:
            num_worked += 1
            if num_worked == 3:
                worked.set()
    assert seen == [1, 2]
    assert num_worked >= 3


def test_an_error_of_the_source_follows_its_items() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    seen = []
    with pytest.raises(ValueError, match="damaged"):
        seen.extend(iter(seen.append(item) for item in arrivals(source(), lambda: True, ahead=3)))
    assert seen[0] == 1


def test_the_source_is_read_only_so_far_ahead() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    items = arrivals(source(), lambda: True, ahead=5)
    assert next(items) == 0
    assert len(taken) <= 8
    assert list(items) == list(range(1, 100))
