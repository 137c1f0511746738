"""Nearest: the training record whose prompt is most like another, by TF-IDF; a baseline that knows no language.

    texts known, texts asked -> for each asked, the index of the known text with the highest cosine

Words are weighted by count times (ln((1 + N) / (1 + df)) + 1), rows scaled to length 1: Salton and Buckley 1988, with
the smoothing of scikit-learn's TfidfVectorizer.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 64  # texts asked at a time, so that a large training set needs little memory


def nearest_neighbors(known: Sequence[str], asked: Sequence[str]) -> list[int]:
    """Index into `known` for each text of `asked`; the first of equals.

    >>> nearest_neighbors(["the claim was late", "the scan was denied"], ["a scan, denied?"])
    [1]
    """
    counts = [Counter(_words(text)) for text in known]
    frequency = Counter(word for count in counts for word in count)
    weights = {word: math.log((1 + len(known)) / (1 + df)) + 1 for word, df in frequency.items()}
    column = {word: number for number, word in enumerate(weights)}
    rows = _matrix(counts, weights, column)
    found: list[int] = []
    for start in range(0, len(asked), _CHUNK):
        some = [Counter(_words(text)) for text in asked[start : start + _CHUNK]]
        similarity = torch.sparse.mm(rows, _matrix(some, weights, column).to_dense().T)
        found += similarity.argmax(dim=0).tolist()
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _matrix(counts: Sequence[Counter[str]], weights: dict[str, float], column: dict[str, int]) -> Tensor:
    """(texts, words) sparse, each row of length 1; words that no known text holds are left out."""
    places: tuple[list[int], list[int]] = ([], [])
    values: list[float] = []
    for row, count in enumerate(counts):
        # Sorted, because rounding depends on the order: texts of the same words in another order must stay equals.
        weighted = {word: count[word] * weights[word] for word in sorted(count) if word in weights}
        length = math.sqrt(sum(value**2 for value in weighted.values())) or 1.0
        for word, value in weighted.items():
            places[0].append(row)
            places[1].append(column[word])
            values.append(value / length)
    size = (len(counts), len(column))
    return torch.sparse_coo_tensor(torch.tensor(places, dtype=torch.int64), values, size, check_invariants=True)
