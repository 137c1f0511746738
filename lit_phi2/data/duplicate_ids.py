"""data/duplicate_ids.py."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Position = tuple[int, int, int]  # number of the source, line, column; the last is 0 where a line holds one record


class DuplicateIdIndex:
    """Which ids were used, and where first, in 20 bytes an id: a dict of ten million takes gigabytes.

    Ids are told apart by 64 bits of their hash; among ten million different ones two share them once in 370,000 times.
    They are kept in sorted runs, each at least twice as long as the next, as in a log-structured merge tree.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = sources
        self.runs: list[tuple[Any, Any]] = []  # hashes (n,), places (n, 3)

    def add(self, ids: Sequence[str | None], places: Sequence[Position]) -> list[str | None]:
        """For each record the place where its id was used before, or None; then its own place is kept."""
        hashes = np.array([0 if id_ is None else hash(id_) for id_ in ids], np.int64)
        before = np.zeros((len(ids), 3), np.uint32)
        known = np.zeros(len(ids), bool)
        for run_hashes, run_places in self.runs:
            nearest = np.searchsorted(run_hashes, hashes).clip(max=len(run_hashes) - 1)
            hit = run_hashes[nearest] == hashes
            known |= hit
            before[hit] = run_places[nearest[hit]]
        first: list[str | None] = [None] * len(ids)
        fresh: dict[int, Position] = {}
        for index, (id_, digest) in enumerate(zip(ids, hashes.tolist(), strict=True)):
            if id_ is None:
                continue
            if known[index]:
                first[index] = self._named(before[index].tolist())
            elif digest in fresh:
                first[index] = self._named(fresh[digest])
            else:
                fresh[digest] = places[index]
        if fresh:
            self._keep(np.array(list(fresh), np.int64), np.array(list(fresh.values()), np.uint32))
        return first

    def _keep(self, hashes: Any, places: Any) -> None:
        order = np.argsort(hashes)
        self.runs.append((hashes[order], places[order]))
        while len(self.runs) > 1 and len(self.runs[-2][0]) < 2 * len(self.runs[-1][0]):
            hashes, places = map(np.concatenate, zip(*self.runs[-2:], strict=True))
            order = np.argsort(hashes, kind="stable")
            self.runs[-2:] = [(hashes[order], places[order])]

    def _named(self, place: Position) -> str:
        source, line, column = place
        return f"{self.sources[source]}:{line}" + (f":{column}" if column else "")
