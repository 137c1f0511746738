"""Metrics of completions, compared with values counted by hand and with closed forms."""

import math
import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from torchmetrics.text import CHRFScore

from lit_phi2.data.records import Fact, Record
from lit_phi2.evaluation.metrics import (
    Interval,
    bootstrap,
    has_repeated_ngram,
    match_facts,
    score_completions,
    summarize,
)

NewRecord = Callable[..., Record]
Recalls = dict[str, tuple[float, int]]


@pytest.mark.parametrize(
    ("fact", "text"),
    [
        ("Peer-to-Peer call", "ask for a PEER-TO-PEER CALL now"),
        ("letter of appeal", "a letter  of\tappeal"),
        ("letter of appeal", "a letter\n\nof appeal"),
        ("letter\n of appeal", "a Letter of Appeal"),
        ("Straße", "an der STRASSE"),
    ],
)
def test_facts_match_in_any_case_and_white_space(fact: str, text: str) -> None:
    assert match_facts([Fact(fact, "known")], text, reference=text) == [True]


def test_each_fact_is_matched_by_its_own_words_only() -> None:
    facts = [Fact("180 days", "known"), Fact("half a year", "known"), Fact("in writing", "known")]
    assert match_facts(facts, "Appeal within 180 days, in writing.", "Appeal within half a year.  " * 2) == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(("length", "matched"), [(14, True), (15, True), (16, False)])
def test_over_one_and_a_half_references_no_fact_matches(length: int, matched: bool) -> None:
    """The reference has ten characters, so 15 are allowed and 16 are not."""
    text = "fact" + "x" * (length - 4)
    assert match_facts([Fact("fact", "known")], text, "r" * 10) == [matched]


def test_extra_white_space_adds_no_length() -> None:
    assert match_facts([Fact("a b", "known")], "a" + " \n" * 50 + "b", "a b") == [True]
    assert match_facts([Fact("a b", "known")], "a b, c d", "a" + " \n" * 50 + "b") == [False]


def test_eight_words_that_occur_twice_repeat_and_seven_do_not() -> None:
    seven, eight = "a b c d e f g", "a b c d e f g h"
    assert has_repeated_ngram(f"{eight} and then {eight}")
    assert has_repeated_ngram(f"{eight} A B  C D E\nF G H"), "case and white space are normalized"
    assert has_repeated_ngram("no " * 9), "the two occurrences may overlap"
    assert not has_repeated_ngram("no " * 8)
    assert not has_repeated_ngram(f"{seven} x {seven} y")
    assert not has_repeated_ngram("")


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(new_record: NewRecord) -> None:
    """By hand: "the cat on mats" is common and in order, 4 of 5 words and 4 of 6, so F1 is 2 * 4 / (5 + 6).
    Of the reversed sentence, "the lay the" is in order: 2 * 3 / (6 + 6)."""
    records = [new_record("The cat lay on the mats.")] * 4
    completions = ["the Cat sat on mats", "the cat lay on the mats", "mats the on lay cat the", "  "]
    scores = [score.rouge_l for score in score_completions(records, completions)]
    assert scores == pytest.approx([8 / 11, 1.0, 2 * 3 / 12, 0.0], abs=1e-6)


def test_length_ratio_is_total_words_over_total_reference_words(new_record: NewRecord) -> None:
    """By hand: 3 + 1 words for 2 + 6; a mean of the two ratios would be 0.83."""
    records = [new_record("two words"), new_record("a b c d e f")]
    rows = summarize(records, score_completions(records, ["x y z", "x"]))
    assert rows["length ratio"].mean == pytest.approx(4 / 8)


def test_the_interval_of_equal_values_is_their_value() -> None:
    """scipy warns of constant samples and refuses single values; neither may reach the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bootstrap([0.5] * 7) == Interval(0.5, 0.5, 0.5, 7)
        assert bootstrap([1.0]) == Interval(1.0, 1.0, 1.0, 1)
        third = bootstrap([1 / 3] * 1000)
    assert third.low == third.mean == third.high == pytest.approx(1 / 3)


def test_bootstrap_interval_is_near_the_normal_approximation() -> None:
    """600 of 2,000: mean +- 1.96 sqrt(p (1 - p) / n). 1,000 resamples leave an error of about 0.001 in either end; a
    90 % interval would be 0.003 off."""
    interval = bootstrap([1.0] * 600 + [0.0] * 1400)
    half_width = 1.96 * math.sqrt(0.3 * 0.7 / 2000)
    assert interval.mean == pytest.approx(0.3)
    assert (interval.low, interval.high) == pytest.approx((0.3 - half_width, 0.3 + half_width), abs=0.002)
    assert interval.records == 2000


def test_bootstrap_does_not_depend_on_global_random_state() -> None:
    values = list(np.random.default_rng(1).random(50))
    first = bootstrap(values)
    np.random.seed(7)
    np.random.random(3)
    assert bootstrap(values) == first
    assert first.low < first.mean < first.high


@pytest.fixture
def recalls(three_records: list[Record], three_completions: list[str]) -> Recalls:
    rows = summarize(three_records, score_completions(three_records, three_completions))
    return {name: (interval.mean, interval.records) for name, interval in rows.items()}


def test_recall_is_a_mean_over_records_and_not_over_facts(recalls: Recalls) -> None:
    """By hand: (2/3 + 0 + 1) / 3; over facts it would be 4/6."""
    assert recalls["fact recall"] == (pytest.approx(5 / 9), 3)


def test_recall_by_kind_counts_only_facts_of_that_kind(recalls: Recalls) -> None:
    """By hand: copied (1 + 1) / 2; known (1/2 + 0) / 2; reasoned 1 / 1."""
    by_kind = {name: value for name, value in recalls.items() if name.startswith("facts ")}
    assert by_kind == {"facts copied": (1.0, 2), "facts known": (0.25, 2), "facts reasoned": (1.0, 1)}


def test_recall_by_form_and_category_counts_only_their_records(recalls: Recalls) -> None:
    """By hand: explain (2/3 + 1) / 2, draft 0; bundling (2/3 + 0) / 2, timely filing 1."""
    groups = ("form ", "category ")
    by_group = {name: value for name, value in recalls.items() if name.startswith(groups) and ": " not in name}
    assert by_group == {
        "form draft": (0.0, 1),
        "form explain": (pytest.approx(5 / 6), 2),
        "category bundling": (pytest.approx(1 / 3), 2),
        "category timely filing": (1.0, 1),
    }


def test_faults_are_fractions_over_all_records_and_each_group(new_record: NewRecord) -> None:
    """By hand: the first is empty, the second begins with its prompt, the third has an amount from nowhere."""
    instruction = "Why was the claim of last spring denied again?"
    texts = [("draft", ""), ("draft", f"{instruction} Because."), ("explain", "You owe $12.00.")]
    records = [new_record("Because.", instruction=instruction, form=form) for form, _ in texts]
    rows = summarize(records, score_completions(records, [text for _, text in texts]))
    faults = {name: row.mean for name, row in rows.items() if name in ("empty", "echo", "unsupported amounts")}
    assert faults == {name: pytest.approx(1 / 3) for name in ("empty", "echo", "unsupported amounts")}
    assert (rows["form draft: empty"].mean, rows["form explain: empty"].mean) == (0.5, 0.0)
    assert (rows["form draft: echo"].mean, rows["form explain: unsupported amounts"].mean) == (0.5, 1.0)
    assert rows["form draft: echo"].low < 0.5 < rows["form draft: echo"].high
    assert rows["unsupported dates"].mean == rows["unsupported identifiers"].mean == 0.0


def test_chrf_is_the_f2_of_character_ngrams(new_record: NewRecord) -> None:
    """Reference: its definition (Popovic 2015) with a counter of n-grams; torchmetrics adds 1e-16 to denominators."""
    completion, reference = "the claim was denyed", "the claims were denied"

    def ngrams(text: str, n: int) -> Counter[str]:
        text = text.replace(" ", "")
        return Counter(text[start : start + n] for start in range(len(text) - n + 1))

    precision, recall = [], []
    for n in range(1, 7):
        first, second = ngrams(completion, n), ngrams(reference, n)
        matches = (first & second).total()
        precision.append(matches / first.total())
        recall.append(matches / second.total())
    scores = [5 * p * r / (4 * p + r) if p + r else 0.0 for p, r in zip(precision, recall, strict=True)]
    score = score_completions([new_record(reference)], [completion])[0].chrf
    assert score == pytest.approx(sum(scores) / 6, abs=1e-6)


def test_chrf_is_torchmetrics_own_of_each_completion(new_record: NewRecord) -> None:
    """Reference: its CHRFScore without word n-grams, on each pair alone."""
    pairs = [
        ("The claim was denied.", "The claim was denied."),
        ("the claim was denyed", "The claims were denied, 12/04."),
        ("Call us", "Send the appeal within 180 days of the notice, with its number."),
        ("Ünrelated: żółć!", "Kappa \u2013 a b c"),
        ("", "Denied."),
    ]
    scores = score_completions([new_record(reference) for _, reference in pairs], [first for first, _ in pairs])
    expected = [float(CHRFScore(n_word_order=0)([completion], [[reference]])) for completion, reference in pairs]
    assert [score.chrf for score in scores] == pytest.approx(expected, abs=1e-6)
    assert expected[0] == pytest.approx(1.0, abs=1e-6)
    assert 0 < expected[1] < 1


def test_a_record_without_facts_counts_except_in_recall(
    new_record: NewRecord, three_records: list[Record], three_completions: list[str]
) -> None:
    records = [*three_records, new_record("r" * 60, form="explain", category="bundling")]
    rows = summarize(records, score_completions(records, [*three_completions, "words"]))
    assert (rows["fact recall"].records, rows["form explain"].records, rows["category bundling"].records) == (3, 2, 2)
    assert {rows[name].records for name in ("ROUGE-L", "length ratio", "repeated 8-gram")} == {4}
