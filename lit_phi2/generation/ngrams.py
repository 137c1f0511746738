"""N-grams: what followed the last tokens in the training responses, or in the prompt itself.

    tokens     p p r r r r E  p p r r r E      the end of each prompt, its response, EOS
    order      positions of r and E, sorted by the tokens before them, the nearest first
    lookup     ... a b c  ->  the positions after the longest match of (c, b, a, ...) are one range of `order`
               -> the most frequent next token of that range, then the most frequent one after it, ...

The index is two arrays of 4 bytes a token, whatever the length of a match. It holds the text of training responses, so
it is kept in the folder of a run and is never exported.
"""

import io
import zipfile
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_phi2.types import Example
from lit_phi2.utils.files import atomic_write

MAX_MATCH = 8  # tokens that a match may have; longer ones foretell no more (measured on the packaged records)
MAX_TOKENS = 4_000_000  # of an index: 32 MB
_MAX_CONTINUATIONS = 32  # of a match that are counted, evenly spaced over those that there are

Array = NDArray[np.int32]


class NgramIndex:
    """Continuations by the tokens before them.

    Args:
        tokens: (n,) int32, as drawn above.
        order: (m,) int32, the sorted positions.
    """

    def __init__(self, tokens: Array, order: Array) -> None:
        self.tokens, self.order = tokens, order
        self._tokens, self._order = tokens.data, order.data  # their items are Python's ints, read faster

    def __len__(self) -> int:
        return len(self.order)

    def lookup(self, ids: Sequence[int], count: int) -> tuple[list[int], int]:
        """The likeliest next tokens after `ids`, and the number of tokens that matched.

        Args:
            ids: the last MAX_MATCH of them are compared.
            count: at most so many tokens.
        """
        begin, end, matched = 0, len(self.order), 0
        for distance, token in enumerate(islice(reversed(ids), MAX_MATCH), start=1):

            def before(position: int, distance: int = distance) -> int:
                return self._tokens[position - distance] if position >= distance else -1

            left = bisect_left(self._order, token, begin, end, key=before)
            right = bisect_right(self._order, token, left, end, key=before)
            if left == right:
                break
            begin, end, matched = left, right, distance
        if not matched:
            return [], 0
        step = max(1, (end - begin) // _MAX_CONTINUATIONS)
        return self._frequent_continuation(self.order[begin:end:step].tolist(), count), matched

    def _frequent_continuation(self, positions: list[int], count: int) -> list[int]:
        """The most frequent token, of those followed by it the most frequent next token, and so on."""
        continuation: list[int] = []
        while len(continuation) < count and positions:
            token = Counter(self._tokens[position] for position in positions).most_common(1)[0][0]
            continuation.append(token)
            last = len(self._tokens) - 1
            positions = [p + 1 for p in positions if self._tokens[p] == token and p < last]
        return continuation

    def save(self, file: Path) -> None:
        """Write the index in numpy's .npz form; a reader finds the old file or the new one."""
        content = io.BytesIO()
        np.savez(content, tokens=self.tokens, order=self.order)
        atomic_write(file, content.getvalue())

    @classmethod
    def load(cls, file: Path) -> "NgramIndex | None":
        """The index in a file; None if it cannot be read, so that the caller builds it again."""
        try:
            with np.load(file, allow_pickle=False) as arrays:
                tokens, order = arrays["tokens"], arrays["order"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        valid = all(array.ndim == 1 and array.dtype == np.int32 for array in (tokens, order))
        in_range = valid and (not len(order) or (order.min() >= 0 and order.max() < len(tokens)))
        return cls(tokens, order) if in_range else None


def build_index(examples: Iterable[Example], *, max_tokens: int = MAX_TOKENS) -> NgramIndex:
    """The index of the responses of examples, of the first ones if there are more than `max_tokens` tokens."""
    pieces, starts, num_tokens = [], [], 0
    for example in examples:
        begin = max(0, example.prompt_length - MAX_MATCH)
        pieces.append(np.array(example.ids[begin:], np.int32))
        starts.append((num_tokens, num_tokens + example.prompt_length - begin))
        num_tokens += len(pieces[-1])
        if num_tokens >= max_tokens:
            break
    tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    in_response = np.ones(len(tokens), bool)
    for begin, end in starts:
        in_response[begin:end] = False
    order = _sort_by_context(tokens)
    return NgramIndex(tokens, np.ascontiguousarray(order[in_response[order]]))


def _sort_by_context(tokens: Array) -> Array:
    """All positions, sorted by the MAX_MATCH tokens before them, the nearest first.

    Prefix doubling (Manber and Myers 1990): the rank by 2 w tokens is that by the pair of ranks by w tokens.
    """
    rank = np.zeros(len(tokens), np.int64)  # of the position's context, of `width` tokens; 0 before the first token
    rank[1:] = tokens[:-1].astype(np.int64) + 1
    width = 1
    while width < MAX_MATCH:
        further = np.zeros_like(rank)
        further[width:] = rank[:-width]
        rank = np.unique(rank * (rank.max(initial=0) + 1) + further, return_inverse=True)[1]
        width *= 2
    return np.argsort(rank, kind="stable").astype(np.int32)


def lookup_prompt(ids: Sequence[int], count: int) -> tuple[list[int], int]:
    """What followed the latest of the longest matches of the last tokens in `ids` itself, and the length of the match.

    Prompt lookup (Saxena 2023). A match has at least 2 tokens: one token alone foretells little.

    >>> lookup_prompt([7, 1, 2, 3, 8, 9, 1, 2], 2)
    ([3, 8], 2)
    """
    array = np.asarray(ids, np.int32)
    ends = np.flatnonzero(array[:-1] == array[-1]) if len(array) else np.empty(0, np.int64)
    matched = 0
    for distance in range(1, MAX_MATCH + 1):
        if not len(ends):
            break
        longest, matched = ends, distance
        ends = ends[ends >= distance]
        ends = ends[array[ends - distance] == array[-1 - distance]] if distance < len(array) else ends[:0]
    if matched < 2:
        return [], 0
    start = int(longest[-1]) + 1
    return list(ids[start : start + count]), matched
