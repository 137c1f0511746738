"""Repetition: whether a completion ends in a loop.

    7 4 9 2 9 2 9 2 ... 9 2      the tail repeats the cycle 9 2        -> True
    7 4 9 2 8 1                  no tail of 20 tokens repeats          -> False

Greedy decoding that enters a cycle never leaves it, so such a completion stops only at max_new_tokens. The model needs
more training then; a higher limit only makes the loop longer.
"""

from collections.abc import Sequence

MIN_REPEATED = 20  # tokens; fewer are also in texts that do not loop: a line of dashes, a table of equal rows


def ends_in_cycle(ids: Sequence[int]) -> bool:
    """Whether the last tokens equal those one cycle before them, for a whole cycle and at least MIN_REPEATED tokens.

    Any length of the cycle counts, so a sentence or a paragraph that is repeated once in full is found too.

    >>> ends_in_cycle([1, 2, 3] + [4, 5] * 11)
    True
    >>> ends_in_cycle([1, 2, 3] + [4, 5] * 10)
    False
    """
    return any(_repeats(ids, cycle) for cycle in range(1, len(ids) // 2 + 1))


def _repeats(ids: Sequence[int], cycle: int) -> bool:
    """Whether the last tokens equal those `cycle` before them."""
    num_repeated = max(cycle, MIN_REPEATED)
    end = len(ids) - num_repeated
    return end >= cycle and all(ids[i] == ids[i - cycle] for i in range(len(ids) - 1, end - 1, -1))
