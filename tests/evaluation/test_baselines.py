"""The baselines, compared with values counted by hand and with cosines by brute force."""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from lit_phi2.data.records import Record
from lit_phi2.evaluation.baselines import compare_with_baselines, nearest_neighbors

NewRecord = Callable[..., Record]


def test_without_facts_there_are_all_rows_but_recall(new_record: NewRecord) -> None:
    records = [new_record("some words", form="explain", category="bundling")]
    columns = compare_with_baselines(records, {"base": (["some"], [True])}, records)
    faults = ["empty", "echo", "unsupported amounts", "unsupported dates", "unsupported identifiers"]
    others = ["ROUGE-L", "chrF", "length ratio", "repeated 8-gram", *faults]
    others += [f"{group}: {name}" for group in ("form explain", "category bundling") for name in ("chrF", *faults)]
    assert {name: list(rows) for name, rows in columns.items()} == {
        "base": [*others, "eos_rate"],
        "copy_prompt": others,
        "nearest": others,
    }


def test_eos_rate_is_the_fraction_of_uncut_completions(
    three_records: list[Record], three_completions: list[str]
) -> None:
    columns = compare_with_baselines(three_records, {"base": (three_completions, [True, False, False])}, [])
    assert columns["base"]["eos_rate"].mean == pytest.approx(1 / 3)


def test_copy_prompt_matches_exactly_the_facts_in_the_prompt(new_record: NewRecord) -> None:
    record = new_record(
        "CLM-12 was bundled, see code 97, it says.",
        ("CLM-12 denied", "copied"),
        ("code 97", "copied"),
        ("bundled", "known"),
        instruction="Why was CLM-12\ndenied",
        input="Code 97",
    )
    rows = compare_with_baselines([record], {"base": ([""], [True])}, [])["copy_prompt"]
    assert (rows["facts copied"].mean, rows["facts known"].mean) == (1.0, 0.0)
    assert rows["fact recall"].mean == pytest.approx(2 / 3)


def test_nearest_is_the_response_to_the_most_similar_prompt(new_record: NewRecord) -> None:
    train = [
        new_record("gggg", instruction="a late claim"),
        new_record("aaaa bbbb", instruction="a denied scan"),
        new_record("x", instruction="y"),
    ]
    records = [new_record("aaaa bbbb", ("aaaa", "known"), instruction="the scan, denied?")]
    columns = compare_with_baselines(records, {"base": ([""], [True])}, train)
    assert columns["nearest"]["ROUGE-L"].mean == pytest.approx(1.0)
    assert columns["nearest"]["fact recall"].mean == 1.0
    assert list(columns) == ["base", "copy_prompt", "nearest"]


def cosines(corpus: list[str], queries: list[str]) -> np.ndarray:
    """(queries, corpus) cosines of count * (ln((1 + N) / (1 + df)) + 1), dense, in float64."""
    tokens = [re.findall(r"\w+", text.lower()) for text in corpus + queries]
    words = sorted({word for text in tokens[: len(corpus)] for word in text})
    counts = np.array([[Counter(text)[word] for word in words] for text in tokens], dtype=np.float64)
    df = (counts[: len(corpus)] > 0).sum(axis=0)
    vectors = counts * (np.log((1 + len(corpus)) / (1 + df)) + 1)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-300)
    return vectors[len(corpus) :] @ vectors[: len(corpus)].T


@pytest.mark.parametrize("num_corpus", [6, 80])
@pytest.mark.parametrize("max_similarities", [1, 2**20])
def test_nearest_is_the_highest_tf_idf_cosine(num_corpus: int, max_similarities: int) -> None:
    """100 queries with frequent and rare words, one at a time and all at once; reference: numpy by brute force.

    Where the two highest cosines differ by less than 1e-6, either may win, since rounding decides; only few do.
    """
    rng = np.random.default_rng(0)
    words = np.array([f"Word{number}" for number in range(60)])
    probabilities = 1 / np.arange(1, 61)
    probabilities /= probabilities.sum()
    corpus, queries = (
        [" ".join(rng.choice(words, size=rng.integers(3, 20), p=probabilities)) + "?" for _ in range(count)]
        for count in (num_corpus, 100)
    )
    queries[5] += " unheard unheard unheard"
    expected = cosines(corpus, queries)
    ordered = np.sort(expected, axis=1)
    decided = ordered[:, -1] - ordered[:, -2] > 1e-6
    assert decided.sum() > 90
    nearest = np.array(nearest_neighbors(corpus, queries, max_similarities))
    assert (nearest == expected.argmax(axis=1))[decided].all()


def test_of_equally_near_texts_the_first_is_taken() -> None:
    """The same words in any order have the same cosine, to the last bit; without a common word it is 0 for all."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        far, near = [[f"{name}{n}" for n in rng.integers(20, size=25)] for name in ("far", "near")]
        corpus = [" ".join(far), " ".join(near), " ".join(reversed(near)), " ".join(rng.permutation(near)), "near1"]
        assert nearest_neighbors(corpus, [" ".join(near), " ".join(rng.permutation(near))]) == [1, 1]
    assert nearest_neighbors(["a b", "c d"], ["unheard", "?", "D!"]) == [0, 0, 1]


def test_a_corpus_without_words_gives_its_first_text() -> None:
    assert nearest_neighbors(["?", "!"], ["a claim", "?"]) == [0, 0]
