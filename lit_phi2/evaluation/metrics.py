"""Metrics: score completions against their records, and average the scores.

    records, completions -> CompletionScores of each -> {metric: Interval}, the mean and its 95 % bootstrap interval

    fact recall       fraction of a record's facts that the completion contains; records without facts do not count
    facts KIND        the same, over the facts of one kind; form FORM and category CATEGORY: over the records of one
    ROUGE-L           longest common subsequence of words with the reference, as F1 (Lin 2004)
    chrF              F2 of character n-grams with the reference (Popovic 2015)
    length ratio      words of the completions per word of the references
    repeated 8-gram   fraction of completions that contain the same eight words in a row twice
    empty, echo       fraction of completions without a word, and of those that begin with a copy of the prompt
    unsupported KIND  fraction of completions with an amount, date or identifier that prompt and reference lack
    GROUP: METRIC     chrF and the four fractions over the records of one form or category

Facts are matched as text, so a completion may word everything else freely. A completion over MAX_LENGTH_RATIO times the
length of the reference matches no fact; otherwise one that lists every possible fact would score highest.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lit_phi2.data.records import Fact, Record
from lit_phi2.evaluation.faithfulness import VALUE_KINDS, unsupported_values

MAX_LENGTH_RATIO = 1.5  # characters of a completion per character of its reference

NUM_BOOTSTRAP = 1000

NGRAM = 8  # words, of a repetition and of an echo


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over `records` records and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    records: int


@dataclass(frozen=True, slots=True)
class CompletionScores:
    """The scores of one completion.

    Attributes:
        facts_matched: for each fact of the record, whether the completion contains it.
        rouge_l: F1 in [0, 1].
        num_words: words in the completion.
        has_repeated_ngram: the same eight words in a row occur twice.
        chrf: in [0, 1].
        is_empty: without a word.
        is_echo: begins with eight words in a row of the prompt, or with all of a shorter one.
        unsupported: number of values of each kind in faithfulness.VALUE_KINDS.
    """

    facts_matched: list[bool]
    rouge_l: float
    num_words: int
    has_repeated_ngram: bool
    chrf: float
    is_empty: bool
    is_echo: bool
    unsupported: dict[str, int]


def score_completions(records: Sequence[Record], completions: Sequence[str]) -> list[CompletionScores]:
    """Score each completion against its record."""
    references = [record.response for record in records]
    rouge_l, chrf = _rouge_l(completions, references), _chrf(completions, references)
    return [
        CompletionScores(
            facts_matched=match_facts(record.facts, completion, record.response),
            rouge_l=f1,
            num_words=len(completion.split()),
            has_repeated_ngram=has_repeated_ngram(completion),
            chrf=f2,
            is_empty=not completion.split(),
            is_echo=is_echo(completion, f"{record.instruction} {record.input}"),
            unsupported=unsupported_values(completion, (record.instruction, record.input, record.response)),
        )
        for record, completion, f1, f2 in zip(records, completions, rouge_l, chrf, strict=True)
    ]


def match_facts(facts: Sequence[Fact], completion: str, reference: str) -> list[bool]:
    """Whether the completion contains each fact; case and white space are normalized.

    >>> facts = [Fact("CLM-12", "copied"), Fact("peer-to-peer", "known")]
    >>> match_facts(facts, "Ask for a Peer-to-Peer\\n call.", "Ask for a peer-to-peer call on CLM-12.")
    [False, True]
    >>> match_facts(facts, "CLM-12 peer-to-peer " * 9, "Ask for a peer-to-peer call on CLM-12.")
    [False, False]
    """
    text = normalize(completion)
    if len(text) > MAX_LENGTH_RATIO * len(normalize(reference)):
        return [False] * len(facts)
    return [normalize(fact.text) in text for fact in facts]


def has_repeated_ngram(text: str) -> bool:
    """Whether the same eight words in a row occur twice; small models tend to loop.

    >>> has_repeated_ngram("a b c d e f g h a b c d e f g h"), has_repeated_ngram("a b c d e f g h")
    (True, False)
    """
    words = normalize(text).split()
    ngrams = Counter(tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1))
    return any(count > 1 for count in ngrams.values())


def is_echo(completion: str, prompt: str) -> bool:
    """Whether a completion begins with eight words in a row of the prompt, or with all words of a shorter one.

    >>> is_echo("why was it denied? It was late.", "Why was it denied?"), is_echo("It was late.", "Why was it denied?")
    (True, False)
    """
    words, prompt_words = normalize(completion).split()[:NGRAM], normalize(prompt).split()
    words = words[: len(prompt_words)]
    return len(words) == min(NGRAM, len(prompt_words)) and f" {' '.join(words)} " in f" {' '.join(prompt_words)} "


def normalize(text: str) -> str:
    """The text in one case, with single spaces.

    >>> normalize("The  Letter\\nof")
    'the letter of'
    """
    return " ".join(text.casefold().split())


def summarize(records: Sequence[Record], scores: Sequence[CompletionScores]) -> dict[str, Interval]:
    """Metric name -> its mean over the records it is defined for, in the order of the table's rows."""
    rows = {name: bootstrap(recalls) for name, recalls in _fact_recalls(records, scores).items()}
    rows["ROUGE-L"] = bootstrap([score.rouge_l for score in scores])
    rows["chrF"] = bootstrap([score.chrf for score in scores])
    # Divided by the mean length and not by each reference's, so that the mean is a ratio of totals.
    mean_reference_words = sum(len(record.response.split()) for record in records) / len(records)
    rows["length ratio"] = bootstrap([score.num_words / mean_reference_words for score in scores])
    rows["repeated 8-gram"] = bootstrap([float(score.has_repeated_ngram) for score in scores])
    rows |= _faults(scores)
    for group, members in _groups(records, scores).items():
        metrics = {"chrF": bootstrap([score.chrf for score in members]), **_faults(members)}
        rows |= {f"{group}: {name}": interval for name, interval in metrics.items()}
    return rows


def _faults(scores: Sequence[CompletionScores]) -> dict[str, Interval]:
    """The fractions of completions that are empty, copy the prompt, or have values that nothing supports."""
    rows = {
        "empty": bootstrap([float(score.is_empty) for score in scores]),
        "echo": bootstrap([float(score.is_echo) for score in scores]),
    }
    for kind in VALUE_KINDS:
        rows[f"unsupported {kind}"] = bootstrap([float(score.unsupported[kind] > 0) for score in scores])
    return rows


def _groups(records: Sequence[Record], scores: Sequence[CompletionScores]) -> dict[str, list[CompletionScores]]:
    """The scores of each form and category, by the name of their rows."""
    groups: dict[str, list[CompletionScores]] = {}
    for kind in ("form", "category"):
        for name in sorted({getattr(record, kind) for record in records} - {""}):
            pairs = zip(records, scores, strict=True)
            groups[f"{kind} {name}"] = [score for record, score in pairs if getattr(record, kind) == name]
    return groups


def bootstrap(values: Sequence[float]) -> Interval:
    """The mean, and the middle 95 % of the means of 1,000 resamples (percentile method, Efron 1979); seeded.

    >>> bootstrap([0.5, 0.5])
    Interval(mean=0.5, low=0.5, high=0.5, records=2)
    """
    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean())
    if sample.min() == sample.max():  # scipy refuses a single value
        return Interval(mean, mean, mean, len(sample))
    from scipy import stats  # slow to import, and only `test` needs it

    interval = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=NUM_BOOTSTRAP,
        batch=NUM_BOOTSTRAP // 10,  # 1.6 KB of memory per record
        vectorized=True,  # without it, scipy calls np.mean once per resample
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, float(interval.low), float(interval.high), len(sample))


def _fact_recalls(records: Sequence[Record], scores: Sequence[CompletionScores]) -> dict[str, list[float]]:
    """Metric name -> the recall of each record it is defined for."""
    recalls: dict[str, list[float]] = {}

    def add(name: str, matches: Iterable[list[bool]]) -> None:
        values = [sum(matched) / len(matched) for matched in matches if matched]
        if values:
            recalls[name] = values

    pairs = list(zip(records, scores, strict=True))
    add("fact recall", (score.facts_matched for score in scores))
    for kind in sorted({fact.kind for record in records for fact in record.facts}):
        add(f"facts {kind}", (_matches_of_kind(kind, record, score) for record, score in pairs))
    for group, members in _groups(records, scores).items():
        add(group, (score.facts_matched for score in members))
    return recalls


def _matches_of_kind(kind: str, record: Record, score: CompletionScores) -> list[bool]:
    return [matched for fact, matched in zip(record.facts, score.facts_matched, strict=True) if fact.kind == kind]


def _rouge_l(completions: Sequence[str], references: Sequence[str]) -> list[float]:
    from torchmetrics.functional.text import rouge_score  # slow to import, and only `test` needs it

    # rouge_keys: the default ones need nltk and a download.
    return [
        float(rouge_score(completion, reference, rouge_keys="rougeL")["rougeL_fmeasure"]) if completion.split() else 0.0
        for completion, reference in zip(completions, references, strict=True)
    ]


def _chrf(completions: Sequence[str], references: Sequence[str]) -> list[float]:
    from torchmetrics.functional.text import chrf_score

    if not completions:
        return []
    # n_word_order 0 is chrF; torchmetrics' default is chrF++.
    _, scores = chrf_score(
        completions, [[reference] for reference in references], n_word_order=0, return_sentence_level_score=True
    )
    return [float(score) for score in scores]
