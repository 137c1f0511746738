"""N-grams: what followed the last tokens in the training responses, or earlier in the sequence itself.

    tokens     p p r r r r E  p p r r r E      the end of each prompt, its response, EOS
    order      positions of r and E, sorted by the tokens before them, the nearest first
    lookup     ... a b c  ->  the positions after the longest match of (c, b, a, ...) are one range of `order`
               -> the most frequent next token of that range, then the most frequent one after it, ...

The index is looked up for all sequences of a pass at once. It holds the text of training responses, so it is kept in
the folder of a run and is never exported.
"""

import io
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_phi2.types import Example
from lit_phi2.utils.files import atomic_write

MAX_MATCH = 8  # tokens that a match may have; longer ones foretell no more (measured on the packaged records)
MAX_TOKENS = 4_000_000  # of an index: 32 MB in its file, 128 MB in memory
MAX_TOKEN_ID = 2**16 - 2  # four tokens and the absence of one are compared as one number of 64 bits
_MAX_SAMPLES = 16  # places of a match whose continuations are counted, evenly spaced over those that there are

Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Continuations:
    """What followed the last tokens of some sequences in the training responses.

    Attributes:
        ids: (S, K) the likeliest next tokens; any number where `support` is 0.
        shares: (S, K) of the places that agree up to the token before, how many have this one.
        support: (S, K) how many such places were counted.
        matched: (S,) last tokens of each sequence that the places share.
    """

    ids: NDArray[Any]
    shares: NDArray[Any]
    support: NDArray[Any]
    matched: NDArray[Any]


class NgramIndex:
    """Continuations by the tokens before them.

    Args:
        tokens: (n,) int32, as drawn above.
        order: (m,) int32, the sorted positions.
    """

    def __init__(self, tokens: Array, order: Array) -> None:
        self.tokens, self.order = tokens, order
        near, far = (numbers[order] for numbers in _contexts(tokens))
        self._near = near
        self._far_values, far_rank = np.unique(far, return_inverse=True)
        group = np.cumsum(np.diff(near, prepend=near[:1]) != 0, dtype=np.uint64)  # places with the same near tokens
        self._far = group << np.uint64(32) | far_rank.astype(np.uint64)

    def __len__(self) -> int:
        return len(self.order)

    def lookup(self, sequences: Sequence[Sequence[int]], count: int) -> Continuations:
        """The likeliest next tokens of each sequence.

        Args:
            sequences: token ids; the last MAX_MATCH of each are compared.
            count: K, at most so many tokens.
        """
        last = np.zeros((len(sequences), MAX_MATCH), np.uint64)
        for row, ids in zip(last, sequences, strict=True):
            tail = ids[: -MAX_MATCH - 1 : -1]
            row[: len(tail)] = np.add(tail, 1)
        begin, end, matched = self._matches(_pack(last[:, :4]), _pack(last[:, 4:]))
        return self._continuations(begin, end, np.minimum(matched, [len(ids) for ids in sequences]), count)

    def _matches(self, near: NDArray[Any], far: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """The range of `order` with the longest match of each context, and how long that is."""
        begin, end, matched = np.zeros((3, len(near)), np.int64)
        if not len(self):
            return begin, end, matched
        for length in range(1, 5):
            first, last = _bounds(near, length)
            longer = np.searchsorted(self._near, first), np.searchsorted(self._near, last, side="right")
            _keep_longer(begin, end, matched, longer, length)
        group = self._far[begin] >> np.uint64(32) << np.uint64(32)
        has_all_near = matched == 4
        for length in range(1, 5):
            first, last = _bounds(far, length)
            ranks = np.searchsorted(self._far_values, first), np.searchsorted(self._far_values, last, side="right")
            begin_far, end_far = (np.searchsorted(self._far, group | rank.astype(np.uint64)) for rank in ranks)
            longer = begin_far, np.where(has_all_near, end_far, begin_far)
            _keep_longer(begin, end, matched, longer, 4 + length)
        return begin, end, matched

    def _continuations(
        self, begin: NDArray[Any], end: NDArray[Any], matched: NDArray[Any], count: int
    ) -> Continuations:
        num_places = np.where(matched > 0, end - begin, 0)[:, None]
        samples = np.arange(_MAX_SAMPLES)
        agree = samples < num_places  # (S, samples)
        spread = np.where(num_places > _MAX_SAMPLES, samples * num_places // _MAX_SAMPLES, samples)
        places = self.order[np.where(agree, begin[:, None] + spread, 0)] if len(self.order) else 0 * spread
        rows = np.arange(len(begin))
        ids, shares, support = (np.zeros((len(begin), count), dtype) for dtype in (np.int64, np.float64, np.int64))
        for step in range(count):
            agree = agree & (places + step < len(self.tokens))
            tokens = self.tokens[np.where(agree, places + step, 0)] if len(self.tokens) else places
            equal = (tokens[:, :, None] == tokens[:, None, :]) & agree[:, None, :]
            votes = np.where(agree, equal.sum(-1), 0)
            best = votes.argmax(-1)
            support[:, step] = agree.sum(-1)
            ids[:, step] = tokens[rows, best]
            shares[:, step] = votes[rows, best] / np.maximum(support[:, step], 1)
            agree = agree & (tokens == ids[:, step, None])
        return Continuations(ids, shares, support, matched)

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
        in_range = in_range and tokens.min(initial=0) >= 0 and tokens.max(initial=0) <= MAX_TOKEN_ID
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
    if tokens.max(initial=0) > MAX_TOKEN_ID:
        raise ValueError(f"token {tokens.max()} of a training response; expected at most {MAX_TOKEN_ID}")
    near, far = _contexts(tokens)
    order = np.lexsort((far, near)).astype(np.int32)
    return NgramIndex(tokens, np.ascontiguousarray(order[in_response[order]]))


def _contexts(tokens: Array) -> tuple[NDArray[Any], NDArray[Any]]:
    """The MAX_MATCH tokens before each position as two numbers, in the order of those tokens, the nearest first."""
    padded = np.zeros(len(tokens) + MAX_MATCH, np.uint64)
    padded[MAX_MATCH:] = tokens
    padded[MAX_MATCH:] += np.uint64(1)
    before = [padded[MAX_MATCH - distance : len(padded) - distance] for distance in range(1, MAX_MATCH + 1)]
    return _pack(np.stack(before[:4], -1)), _pack(np.stack(before[4:], -1))


def _pack(tokens: NDArray[Any]) -> NDArray[Any]:
    """(n, 4) numbers below 2^16 -> (n,) numbers of 64 bits in the same order."""
    packed: NDArray[Any] = tokens @ np.array([1 << 48, 1 << 32, 1 << 16, 1], np.uint64)
    return packed


def _bounds(packed: NDArray[Any], length: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The smallest and the largest packed numbers that begin with the same tokens."""
    rest = np.uint64(2 ** (64 - 16 * length) - 1)
    return packed & ~rest, packed | rest


def _keep_longer(
    begin: NDArray[Any],
    end: NDArray[Any],
    matched: NDArray[Any],
    longer: tuple[NDArray[Any], NDArray[Any]],
    length: int,
) -> None:
    """Take the ranges of a longer match where they are not empty."""
    found = longer[1] > longer[0]
    begin[found], end[found], matched[found] = longer[0][found], longer[1][found], length


class SequenceIndex:
    """Where two tokens occurred last in a sequence that grows (prompt lookup, Saxena 2023)."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, int], int] = {}
        self._length = 2  # of the sequence, as far as pairs of its tokens are known

    def lookup(self, ids: Sequence[int], count: int) -> tuple[list[int], int]:
        """What followed the last two tokens where they occurred before, and how many tokens match there.

        >>> SequenceIndex().lookup([7, 1, 2, 3, 8, 9, 1, 2], 2)
        ([3, 8], 2)
        """
        for end in range(self._length, len(ids)):
            self._after[ids[end - 2], ids[end - 1]] = end
        self._length = max(2, len(ids))
        start = self._after.get((ids[-2], ids[-1])) if len(ids) >= 2 else None
        if start is None:
            return [], 0
        matched = 2
        while matched < MAX_MATCH and matched < start and ids[start - 1 - matched] == ids[-1 - matched]:
            matched += 1
        return list(ids[start : start + count]), matched
