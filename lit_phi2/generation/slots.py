"""Slots: which sequence is in which slot, and what the cache still holds of earlier ones.

slot 0   prompt of key 7, completion so far        in use
slot 1   prompt of key 3, ended                    free; its prompt's keys and values are there until it is refilled
"""

from collections.abc import Sequence
from dataclasses import dataclass

MIN_SHARED_PREFIX = 16  # tokens; fewer are computed again as fast as they are copied


@dataclass(slots=True)
class Generated:
    """A prompt with its completion so far.

    Attributes:
        key: names it.
        ids: of the prompt, then of the completion.
        prompt_length: tokens of the prompt.
        max_length: of ids.
    """

    key: int
    ids: list[int]
    prompt_length: int
    max_length: int


class Slots:
    """The slots of a cache.

    Args:
        num_slots: of the cache.
    """

    def __init__(self, num_slots: int) -> None:
        self.sequences: list[Generated | None] = [None] * num_slots
        self._prompts: list[list[int]] = [[] for _ in range(num_slots)]  # whose keys and values each slot holds

    def __len__(self) -> int:
        return len(self.sequences)

    def active(self) -> list[tuple[int, Generated]]:
        """The slots in use."""
        return [(slot, sequence) for slot, sequence in enumerate(self.sequences) if sequence is not None]

    def free(self) -> list[int]:
        """The slots that a prompt may take."""
        return [slot for slot, sequence in enumerate(self.sequences) if sequence is None]

    def fill(self, slots: Sequence[int], sequences: Sequence[Generated]) -> list[tuple[int, int | None]]:
        """Put sequences into free slots.

        Returns:
            Of each: how many of its first tokens a slot holds already, and which; None for the sequence's own slot. A
            slot that is itself filled comes before those that copy from it.
        """
        previous = [self._prompts[slot] for slot in slots]
        for slot in slots:
            self._prompts[slot] = []  # overwritten in the coming pass, so nothing may be copied from it
        shared = []
        for slot, sequence, own in zip(slots, sequences, previous, strict=True):
            shared.append(self._shared_prefix(sequence.ids, slot, own))
            self.sequences[slot] = sequence
            self._prompts[slot] = sequence.ids[:]
        return shared

    def release(self, slot: int) -> None:
        """Free a slot; its prompt stays in the cache."""
        self.sequences[slot] = None

    def _shared_prefix(self, ids: list[int], slot: int, own: list[int]) -> tuple[int, int | None]:
        best, source = common_prefix(ids, own), None
        for other, prompt in enumerate(self._prompts):
            if other != slot and (length := common_prefix(ids, prompt)) > best:
                best, source = length, other
        best = min(best, len(ids) - 1)  # the last token is computed: its hidden state chooses the first new one
        return (best, source) if best >= MIN_SHARED_PREFIX else (0, None)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
