"""Near duplicates: pairs of texts that share most of their wording, within and across splits.

    texts  ->  sets of three words in a row, numbers and names as they are  ->  MinHash  ->  candidate pairs
           ->  Jaccard similarity of the sets, exactly                       ->  pairs, the most similar first

MinHash with locality-sensitive hashing (Broder 1997; Leskovec et al., Mining of Massive Datasets, ch. 3) finds the
candidates without comparing all pairs; each candidate is then compared exactly, so a pair's similarity has no error.
"""

import importlib.util
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lit_phi2.errors import InputError

SHINGLE = 3  # words
NUM_HASHES = 128
_BATCH = 1000  # texts whose signatures are computed at once

_WORD = re.compile(r"\w+")


class Pair(NamedTuple):
    """Two texts by their indices, first < second, and the Jaccard similarity of their shingles."""

    similarity: float
    first: int
    second: int


def near_duplicates(texts: Sequence[str], threshold: float) -> list[Pair]:
    """The pairs of texts of at least that similarity, the most similar first; MinHash misses few of them.

    Args:
        texts: of records.
        threshold: Jaccard similarity in (0, 1].

    Raises:
        InputError: datasketch is not installed.
    """
    check_installed()
    from datasketch import MinHash, MinHashLSH

    shingles = [_shingles(text) for text in texts]
    # A lower threshold in the index: candidates are checked exactly, and a missed pair is lost.
    index = MinHashLSH(threshold=max(0.1, threshold - 0.15), num_perm=NUM_HASHES)
    pairs = []
    for start in range(0, len(texts), _BATCH):
        batch = shingles[start : start + _BATCH]
        signatures = MinHash.bulk([[shingle.encode() for shingle in each] for each in batch], num_perm=NUM_HASHES)
        for second, signature in enumerate(signatures, start):
            for first in index.query(signature):
                similarity = _jaccard(shingles[first], shingles[second])
                if similarity >= threshold:
                    pairs.append(Pair(similarity, first, second))
            index.insert(second, signature)
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair.first, pair.second))


def check_installed() -> None:
    """Fail before a model is loaded, not after.

    Raises:
        InputError: datasketch is not installed.
    """
    if importlib.util.find_spec("datasketch") is None:
        raise InputError("audit --what records needs datasketch for near duplicates: pip install 'lit-phi2[audit]'.")


def boilerplate_sizes(responses: Sequence[str]) -> np.ndarray:
    """(n,) int64: how many records have each response, apart from its numbers, case and spacing.

    >>> boilerplate_sizes(["See claim 12.", "see claim 15", "Denied."]).tolist()
    [2, 2, 1]
    """
    keys = [" ".join(_WORD.findall(re.sub(r"\d+", "0", response.casefold()))) for response in responses]
    _, inverse, counts = np.unique(np.array(keys, dtype=object), return_inverse=True, return_counts=True)
    return counts[inverse.ravel()]


def _shingles(text: str) -> set[str]:
    """Every three words in a row; a shorter text is one shingle."""
    words = _WORD.findall(text.casefold())
    return {" ".join(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1))}


def _jaccard(first: set[str], second: set[str]) -> float:
    return len(first & second) / len(first | second)
