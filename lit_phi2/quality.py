"""Quality: how good answers are, beside plain ways to get an answer without a model.

    records, texts that answer them -> Figures of each record -> their means, with bootstrap intervals -> a table

    fact recall      share of a record's facts that stand in the answer; none where it is over 1.5 times the reference
    ROUGE-L          longest common subsequence of words with the reference, as F1 (Lin 2004)
    length ratio     words of the answers for each word of the references
    repeats          whether eight words in a row come twice: a small model that goes round in circles

An answer is held against facts and not against a wording, because there are many ways to say a right thing.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lit_phi2.data.records import Fact, Record
from lit_phi2.nearest import nearest

LONGEST = 1.5  # times the reference; an answer that says everything is no answer
RESAMPLES = 1000
GRAM = 8


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over records and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    records: int


@dataclass(frozen=True, slots=True)
class Figures:
    """One answer, judged.

    Attributes:
        found: for each fact of the record, whether the answer holds it.
        rouge_l: F1 in [0, 1].
        words: of the answer.
        repeats: eight words in a row come twice.
    """

    found: list[bool]
    rouge_l: float
    words: int
    repeats: bool


Table = dict[str, dict[str, Interval]]  # who answers -> figure -> interval


def compare(
    records: Sequence[Record], answered: dict[str, tuple[list[str], list[bool]]], train: Sequence[Record]
) -> Table:
    """Figures of every answerer, and of two that are no model.

    Args:
        records: asked, with responses as references.
        answered: who -> texts, and whether each ended by itself.
        train: the records of the nearest-record baseline; without any it is left out.

    Returns:
        The answerers in their order, then `echo`, the prompt given back, and `nearest`, the response of the training
        record whose prompt is most like it.
    """
    columns: Table = {}
    for name, (texts, ended) in answered.items():
        columns[name] = summarize(records, judge(records, texts))
        columns[name]["ends by itself"] = bootstrap([float(end) for end in ended])
    asked = [_prompt(record) for record in records]
    columns["echo"] = summarize(records, judge(records, asked))
    if train:
        found = nearest([_prompt(record) for record in train], asked)
        columns["nearest"] = summarize(records, judge(records, [train[index].response for index in found]))
    return columns


def _prompt(record: Record) -> str:
    return f"{record.instruction}\n{record.input}"


def judge(records: Sequence[Record], texts: Sequence[str]) -> list[Figures]:
    """Hold each text against the record that it answers."""
    rouge_l = _rouge_l(texts, [record.response for record in records])
    return [
        Figures(found_facts(record.facts, text, record.response), score, len(text.split()), repeats(text))
        for record, text, score in zip(records, texts, rouge_l, strict=True)
    ]


def found_facts(facts: Sequence[Fact], text: str, reference: str) -> list[bool]:
    """Which facts stand in a text, case and spaces folded; none in a text over 1.5 times the reference's length.

    >>> facts = [Fact("CLM-12", "copied"), Fact("peer-to-peer", "known")]
    >>> found_facts(facts, "Ask for a Peer-to-Peer\\n call.", "Ask for a peer-to-peer call on CLM-12.")
    [False, True]
    >>> found_facts(facts, "CLM-12 peer-to-peer " * 9, "Ask for a peer-to-peer call on CLM-12.")
    [False, False]
    """
    folded = fold(text)
    if len(folded) > LONGEST * len(fold(reference)):
        return [False] * len(facts)
    return [fold(fact.text) in folded for fact in facts]


def fold(text: str) -> str:
    """Case and white space folded.

    >>> fold("The  Letter\\nof")
    'the letter of'
    """
    return " ".join(text.casefold().split())


def repeats(text: str) -> bool:
    """Whether eight words in a row stand in the text twice.

    >>> repeats("a b c d e f g h a b c d e f g h"), repeats("a b c d e f g h")
    (True, False)
    """
    words = fold(text).split()
    grams = Counter(tuple(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1))
    return any(count > 1 for count in grams.values())


def summarize(records: Sequence[Record], figures: Sequence[Figures]) -> dict[str, Interval]:
    """Name of a figure -> its mean over the records that have it, in the order of the table."""
    rows: dict[str, Interval] = {}
    recall = {name: bootstrap(values) for name, values in _recalls(records, figures).items()}
    rows.update(recall)
    rows["ROUGE-L"] = bootstrap([one.rouge_l for one in figures])
    reference_words = sum(len(record.response.split()) for record in records) / len(records)
    rows["length ratio"] = bootstrap([one.words / reference_words for one in figures])
    rows["repeated 8-gram"] = bootstrap([float(one.repeats) for one in figures])
    return rows


def bootstrap(values: Sequence[float]) -> Interval:
    """The mean, and the middle 95 % of the means of 1,000 samples drawn with replacement (Efron 1979); seeded.

    >>> bootstrap([0.5, 0.5])
    Interval(mean=0.5, low=0.5, high=0.5, records=2)
    """
    numbers = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    low, high = np.percentile(numbers[drawn].mean(axis=1), [2.5, 97.5])
    return Interval(float(numbers.mean()), float(low), float(high), len(numbers))


def _recalls(records: Sequence[Record], figures: Sequence[Figures]) -> dict[str, list[float]]:
    """Group -> the recall of each record in it. A kind's recall counts a record's facts of that kind."""
    recalls: dict[str, list[float]] = {}

    def add(name: str, found: list[bool]) -> None:
        if found:
            recalls.setdefault(name, []).append(sum(found) / len(found))

    def add_groups(title: str, group_of: Callable[[Record], str]) -> None:
        for group in sorted({group_of(record) for record in records} - {""}):
            for record, one in zip(records, figures, strict=True):
                if group_of(record) == group:
                    add(f"{title} {group}", one.found)

    for one in figures:
        add("fact recall", one.found)
    for kind in sorted({fact.kind for record in records for fact in record.facts}):
        for record, one in zip(records, figures, strict=True):
            add(f"facts {kind}", [hit for hit, fact in zip(one.found, record.facts, strict=True) if fact.kind == kind])
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


def metric_name(figure: str) -> str:
    """As it is logged.

    >>> metric_name("form explain"), metric_name("ROUGE-L"), metric_name("length ratio")
    ('test/form_explain', 'test/rouge_l', 'test/length_ratio')
    """
    return "test/" + re.sub(r"\W+", "_", figure.lower())


def as_plain(columns: Table) -> dict[str, dict[str, dict[str, float]]]:
    """For JSON."""
    return {name: {figure: asdict(interval) for figure, interval in rows.items()} for name, rows in columns.items()}


def table(columns: Table) -> str:
    """Figures as text: a row a figure, a column an answerer; the first one's interval beside it.

    >>> rows = {"fact recall": Interval(0.5, 0.25, 0.75, 8)}
    >>> print(table({"adapter": rows, "base": rows}))
    .                    adapter                   base  records
    fact recall          0.500 [0.250, 0.750]     0.500        8
    """
    first, *others = columns
    names = list(dict.fromkeys(name for rows in columns.values() for name in rows))
    shown = {name: f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]" for name, one in columns[first].items()}
    width, wide = max(20, *map(len, names)), max(20, *map(len, shown.values()))  # a length ratio may have two digits
    lines = [f"{'.':<{width}} {first:<{wide}}" + "".join(f"{name:>10}" for name in others) + "  records"]
    for name in names:
        means = [f"{columns[other][name].mean:.3f}" if name in columns[other] else "-" for other in others]
        counted = next(rows[name].records for rows in columns.values() if name in rows)
        mine = shown.get(name, "-")
        lines.append(f"{name:<{width}} {mine:<{wide}}" + "".join(f"{mean:>10}" for mean in means) + f"{counted:>9}")
    return "\n".join(lines)
