"""The sentences at the top of the page follow from the figures; each is written by hand here."""

import numpy as np
import pytest

from lit_phi2.evaluation.metrics import Interval
from lit_phi2.report.curves import Curve, Curves
from lit_phi2.report.summary import test_sentences as sentences_of_test
from lit_phi2.report.summary import training_sentences


@pytest.mark.parametrize(
    ("adapter", "base", "verdict"),
    [
        (Interval(0.8, 0.7, 0.9, 8), Interval(0.5, 0.4, 0.6, 8), "better than the base beyond"),
        (Interval(0.8, 0.6, 0.9, 8), Interval(0.5, 0.4, 0.7, 8), "does not tell them apart"),
        (Interval(0.5, 0.4, 0.7, 8), Interval(0.8, 0.6, 0.9, 8), "does not tell them apart"),
        (Interval(0.5, 0.4, 0.6, 8), Interval(0.8, 0.7, 0.9, 8), "worse than the base beyond"),
    ],
)
def test_a_difference_is_claimed_only_beyond_both_intervals(adapter: Interval, base: Interval, verdict: str) -> None:
    text = " ".join(sentences_of_test({"adapter": {"chrF": adapter}, "base": {"chrF": base}}))
    verdicts = ("better than the base beyond", "does not tell them apart", "worse than the base beyond")
    assert [each for each in verdicts if each in text] == [verdict]


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ({0: 2.0}, "Validation loss is 2.000 (the base)."),
        ({3: 2.0}, "Validation loss is 2.000 at step 3."),
        ({0: 2.0, 1: 2.5, 2: 2.25}, "did not fall below 2.000 (the base): training did not help."),
        ({0: 2.0, 4: 1.0}, "fell from 2.000 (the base) to 1.000 at step 4, the end of training."),
        ({0: 2.0, 4: 1.0, 8: 1.09}, "fell from 2.000 (the base) to 1.000 at step 4 and was 1.090 at step 8."),
        ({0: 2.0, 4: 1.0, 8: 1.11}, "to 1.000 at step 4 and was 1.110 at step 8, a sign of overfitting."),
    ],
)
def test_a_loss_is_described_by_where_it_was_lowest(losses: dict[int, float], sentence: str) -> None:
    """A sign of overfitting is a tenth of the fall."""
    curve = Curve(np.array(list(losses)), np.array(list(losses.values())))
    assert " ".join(training_sentences(Curves({"val/loss": curve}, None), {})).endswith(sentence)
