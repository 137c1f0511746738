"""Sequences that build their items on access, and batches of an iterable.

LazySequence    [index] -> get(index) -> item;  [start:stop] -> a list of items;  nothing is stored
batched         a b c d e, by 2  ->  [a b] [c d] [e]
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar, overload

Item = TypeVar("Item")


class LazySequence(Sequence[Item]):
    """A sequence that builds each item when it is indexed, because millions of stored items would take gigabytes."""

    @abstractmethod
    def get(self, index: int) -> Item:
        """Build the item at `index`, which is in range(len(self))."""

    @overload
    def __getitem__(self, key: int) -> Item: ...
    @overload
    def __getitem__(self, key: slice) -> list[Item]: ...
    def __getitem__(self, key: int | slice) -> Item | list[Item]:
        if isinstance(key, slice):
            return [self.get(index) for index in range(len(self))[key]]
        return self.get(range(len(self))[key])


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items; the last may be shorter. itertools.batched needs Python 3.12.

    >>> list(batched("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
