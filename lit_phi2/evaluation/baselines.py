"""Baselines: what the same records score without a model, next to the completions of models.

    records, {"adapter": completions, "base": completions}, training records
      -> {"adapter": metrics, "base": metrics, "copy_prompt": metrics, "nearest": metrics}

    copy_prompt    the prompt itself: finds every fact that is copied from the prompt, and no other
    nearest        the response of the training record with the most similar prompt (TF-IDF, cosine)

Both are cheap, so an adapter that does not beat them has learned nothing useful. Only models have an `eos_rate`, the
fraction of completions that end with the EOS token and were not cut at max_new_tokens.
"""

import re
from collections.abc import Mapping, Sequence

from lit_phi2.data.records import Record
from lit_phi2.evaluation.metrics import CompletionScores, bootstrap, score_completions, summarize
from lit_phi2.evaluation.table import Table

MAX_SIMILARITIES = 2**20  # computed at a time: 20 bytes each, once in CSR form and once dense

_WORD = r"\w+"


def compare_with_baselines(
    records: Sequence[Record],
    completions: dict[str, tuple[list[str], list[bool]]],
    train: Sequence[Record],
    scores: Mapping[str, Sequence[CompletionScores]] | None = None,
) -> Table:
    """Metrics of every system that completed the records, and of the two baselines.

    Args:
        records: the test records; their responses are the references.
        completions: system -> its completions, and whether each ended with the EOS token.
        train: the training records for `nearest`, which is left out if there are none.
        scores: of the completions, by system; None computes them.

    Returns:
        The systems in their order, then `copy_prompt`, then `nearest`.
    """
    columns: Table = {}
    for name, (texts, ended) in completions.items():
        columns[name] = summarize(records, scores[name] if scores else score_completions(records, texts))
        columns[name]["eos_rate"] = bootstrap([float(has_eos) for has_eos in ended])
    prompts = [_prompt(record) for record in records]
    columns["copy_prompt"] = summarize(records, score_completions(records, prompts))
    if train:
        indices = nearest_neighbors([_prompt(record) for record in train], prompts)
        columns["nearest"] = summarize(records, score_completions(records, [train[i].response for i in indices]))
    return columns


def nearest_neighbors(
    corpus: Sequence[str], queries: Sequence[str], max_similarities: int = MAX_SIMILARITIES
) -> list[int]:
    """For each query, the index of the text in `corpus` with the highest TF-IDF cosine; the first of equals.

    A query that shares no word with any text gets index 0. The weight of a word is its count times
    ln((1 + N) / (1 + df)) + 1 (Salton and Buckley 1988, with scikit-learn's smoothing).

    >>> nearest_neighbors(["the claim was late", "the scan was denied"], ["a scan, denied?"])
    [1]
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import, and only `test` needs it
    from sklearn.metrics.pairwise import linear_kernel

    if not any(re.search(_WORD, text) for text in corpus):  # the vectorizer refuses an empty vocabulary
        return [0] * len(queries)
    vectorizer = TfidfVectorizer(preprocessor=str.casefold, token_pattern=_WORD)  # its default drops one-letter words
    corpus_vectors = vectorizer.fit_transform(corpus)
    chunk = max(1, max_similarities // len(corpus))
    nearest: list[int] = []
    for start in range(0, len(queries), chunk):
        query_vectors = vectorizer.transform(queries[start : start + chunk])
        # In this order scipy converts the few queries to the layout that it multiplies, not the whole corpus, and sums
        # every cosine over the words in the same order, so that texts of the same words are equals to the last bit.
        nearest += linear_kernel(corpus_vectors, query_vectors).argmax(axis=0).tolist()
    return nearest


def _prompt(record: Record) -> str:
    return f"{record.instruction}\n{record.input}"
