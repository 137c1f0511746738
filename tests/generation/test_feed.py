"""Feeding an engine: slots are full across calls, and no more prompts wait than allowed. The engine counts steps."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from lit_phi2.generation import feed as feed_module
from lit_phi2.generation.engine import Completion
from lit_phi2.generation.feed import feed


class CountingEngine:
    """Three slots; a prompt of n tokens is completed after n steps."""

    def __init__(self) -> None:
        self.queue: deque[tuple[int, int]] = deque()
        self.slots: list[list[int]] = []
        self.in_use: list[int] = []  # slots in each step
        self.most_waiting = 0

    @property
    def waiting(self) -> int:
        return len(self.queue)

    @property
    def active(self) -> int:
        return len(self.slots)

    def submit(self, key: int, prompt: Sequence[int]) -> None:
        self.queue.append((key, len(prompt)))
        self.most_waiting = max(self.most_waiting, self.waiting)

    def step(self) -> list[tuple[int, Completion]]:
        while self.queue and len(self.slots) < 3:
            self.slots.append(list(self.queue.popleft()))
        self.in_use.append(len(self.slots))
        for slot in self.slots:
            slot[1] -= 1
        ended = [slot[0] for slot in self.slots if not slot[1]]
        self.slots = [slot for slot in self.slots if slot[1]]
        return [(key, Completion([], "stop")) for key in ended]


def prompts_of(keys: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    return ((key, [0] * (1 + key % 5)) for key in keys)


@pytest.fixture(autouse=True)
def few_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "AHEAD", 4)


def test_slots_stay_full_from_one_call_to_the_next() -> None:
    """Batches of six prompts, as a loader gives them: only the last steps of all have a free slot."""
    engine: Any = CountingEngine()
    keys: list[int] = []
    for start in (0, 6, 12, 18):
        keys += [key for key, _ in feed(engine, prompts_of(range(start, start + 6)), drain=start == 18)]
    assert sorted(keys) == list(range(24))
    first_free = engine.in_use.index(2) if 2 in engine.in_use else len(engine.in_use)
    assert set(engine.in_use[:first_free]) == {3}
    assert len(engine.in_use) - first_free <= 5, "the longest completion takes five steps"
    assert engine.most_waiting <= 5


def test_a_source_is_asked_only_for_what_may_wait() -> None:
    """An endless source: its completions come while it goes on."""
    engine: Any = CountingEngine()
    asked: list[int] = []

    def endless() -> Iterator[tuple[int, list[int]]]:
        while True:
            asked.append(len(asked))
            yield asked[-1], [0]

    completions = feed(engine, endless())
    for _ in range(50):
        next(completions)
        assert len(asked) <= 50 + 4 + 3 + 1


def test_a_pause_of_the_source_is_used_to_decode() -> None:
    engine: Any = CountingEngine()
    paused = [(0, [0] * 3), None, None, None, (1, [0])]
    ended_at = {key: len(engine.in_use) for key, _ in feed(engine, paused)}
    assert ended_at == {0: 3, 1: 4}
