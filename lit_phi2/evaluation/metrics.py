"""Quality: how good answers are, beside plain ways to get an answer without a model.

    records, texts that answer them -> Figures of each record -> their means, with bootstrap intervals -> a table

    fact recall      share of a record's facts that stand in the answer; none where it is over 1.5 times the reference
    ROUGE-L          longest common subsequence of words with the reference, as F1 (Lin 2004)
    length ratio     words of the answers for each word of the references
    repeats          whether eight words in a row come twice: a small model that goes round in circles

An answer is held against facts and not against a wording, because there are many ways to say a right thing.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lit_phi2.data.records import Fact, Record
from lit_phi2.evaluation.baselines import nearest_neighbors

MAX_LENGTH_RATIO = 1.5  # times the reference; an answer that says everything is no answer

NUM_BOOTSTRAP = 1000

NGRAM = 8


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over records and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    records: int


@dataclass(frozen=True, slots=True)
class CompletionScores:
    """One answer, judged.

    Attributes:
        facts_matched: for each fact of the record, whether the answer holds it.
        rouge_l: F1 in [0, 1].
        words: of the answer.
        repeats: eight words in a row come twice.
    """

    facts_matched: list[bool]
    rouge_l: float
    words: int
    has_repeated_ngram: bool


Table = dict[str, dict[str, Interval]]  # who answers -> figure -> interval


def compare_with_baselines(
    records: Sequence[Record], completed: dict[str, tuple[list[str], list[bool]]], train: Sequence[Record]
) -> Table:
    """Figures of every answerer, and of two that are no model.

    Args:
        records: asked, with responses as references.
        answered: who -> texts, and whether each ended by itself.
        train: the records of the nearest-record baseline; without any it is left out.

    Returns:
        The answerers in their order, then `copy_prompt`, the prompt given back, and `nearest`, the response of the training
        record whose prompt is most like it.
    """
    columns: Table = {}
    for name, (texts, ended) in completed.items():
        columns[name] = summarize(records, score_completions(records, texts))
        columns[name]["eos_rate"] = bootstrap([float(end) for end in ended])
    asked = [_prompt(record) for record in records]
    columns["copy_prompt"] = summarize(records, score_completions(records, asked))
    if train:
        found = nearest_neighbors([_prompt(record) for record in train], asked)
        columns["nearest"] = summarize(records, score_completions(records, [train[index].response for index in found]))
    return columns


def _prompt(record: Record) -> str:
    return f"{record.instruction}\n{record.input}"


def score_completions(records: Sequence[Record], texts: Sequence[str]) -> list[CompletionScores]:
    """Hold each text against the record that it answers."""
    rouge_l = _rouge_l(texts, [record.response for record in records])
    return [
        CompletionScores(
            match_facts(record.facts, text, record.response), score, len(text.split()), has_repeated_ngram(text)
        )
        for record, text, score in zip(records, texts, rouge_l, strict=True)
    ]


def match_facts(facts: Sequence[Fact], text: str, reference: str) -> list[bool]:
    """Which facts stand in a text, case and spaces folded; none in a text over 1.5 times the reference's length.

    >>> facts = [Fact("CLM-12", "copied"), Fact("peer-to-peer", "known")]
    >>> match_facts(facts, "Ask for a Peer-to-Peer\\n call.", "Ask for a peer-to-peer call on CLM-12.")
    [False, True]
    >>> match_facts(facts, "CLM-12 peer-to-peer " * 9, "Ask for a peer-to-peer call on CLM-12.")
    [False, False]
    """
    folded = normalize(text)
    if len(folded) > MAX_LENGTH_RATIO * len(normalize(reference)):
        return [False] * len(facts)
    return [normalize(fact.text) in folded for fact in facts]


def normalize(text: str) -> str:
    """Case and white space folded.

    >>> normalize("The  Letter\\nof")
    'the letter of'
    """
    return " ".join(text.casefold().split())


def has_repeated_ngram(text: str) -> bool:
    """Whether eight words in a row stand in the text twice.

    >>> has_repeated_ngram("a b c d e f g h a b c d e f g h"), has_repeated_ngram("a b c d e f g h")
    (True, False)
    """
    words = normalize(text).split()
    grams = Counter(tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1))
    return any(count > 1 for count in grams.values())


def summarize(records: Sequence[Record], figures: Sequence[CompletionScores]) -> dict[str, Interval]:
    """Name of a figure -> its mean over the records that have it, in the order of the table."""
    rows: dict[str, Interval] = {}
    recall = {name: bootstrap(values) for name, values in _recalls(records, figures).items()}
    rows.update(recall)
    rows["ROUGE-L"] = bootstrap([one.rouge_l for one in figures])
    reference_words = sum(len(record.response.split()) for record in records) / len(records)
    rows["length ratio"] = bootstrap([one.words / reference_words for one in figures])
    rows["repeated 8-gram"] = bootstrap([float(one.has_repeated_ngram) for one in figures])
    return rows


def bootstrap(values: Sequence[float]) -> Interval:
    """The mean, and the middle 95 % of the means of 1,000 samples drawn with replacement (Efron 1979); seeded.

    >>> bootstrap([0.5, 0.5])
    Interval(mean=0.5, low=0.5, high=0.5, records=2)
    """
    numbers = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(numbers), size=(NUM_BOOTSTRAP, len(numbers)))
    low, high = np.percentile(numbers[drawn].mean(axis=1), [2.5, 97.5])
    return Interval(float(numbers.mean()), float(low), float(high), len(numbers))


def _recalls(records: Sequence[Record], figures: Sequence[CompletionScores]) -> dict[str, list[float]]:
    """Group -> the recall of each record in it. A kind's recall counts a record's facts of that kind."""
    recalls: dict[str, list[float]] = {}

    def add(name: str, found: list[bool]) -> None:
        if found:
            recalls.setdefault(name, []).append(sum(found) / len(found))

    def add_groups(title: str, group_of: Callable[[Record], str]) -> None:
        for group in sorted({group_of(record) for record in records} - {""}):
            for record, one in zip(records, figures, strict=True):
                if group_of(record) == group:
                    add(f"{title} {group}", one.facts_matched)

    for one in figures:
        add("fact recall", one.facts_matched)
    for kind in sorted({fact.kind for record in records for fact in record.facts}):
        for record, one in zip(records, figures, strict=True):
            add(
                f"facts {kind}",
                [hit for hit, fact in zip(one.facts_matched, record.facts, strict=True) if fact.kind == kind],
            )
    add_groups("form", lambda record: record.form)
    add_groups("category", lambda record: record.category)
    return recalls


def _rouge_l(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    from torchmetrics.functional.text import rouge_score  # slow to import, and only tests need it

    # rouge_keys: with the default ones torchmetrics wants nltk and a download.
    return [
        float(rouge_score(text, reference, rouge_keys="rougeL")["rougeL_fmeasure"]) if text.split() else 0.0
        for text, reference in zip(texts, references, strict=True)
    ]
