"""Scoring: completions of the test records -> text -> scores beside the baselines.

    {"adapter": [Completion, ...], "base": [Completion, ...]}  ->  Table with copy_prompt and nearest added

The metrics are those of `evaluation/`; this module only decodes, and finds the training records for the baseline.
"""

import logging
from collections.abc import Mapping, Sequence

from lit_phi2.errors import InputError
from lit_phi2.evaluation.baselines import compare_with_baselines
from lit_phi2.evaluation.table import Table
from lit_phi2.generation.engine import Completion
from lit_phi2.training.protocols import TrainingData, tokenizer_of

log = logging.getLogger(__name__)


def score_test_completions(
    completions: Mapping[str, Sequence[Completion]], data: TrainingData, count: int | None
) -> Table:
    """Score the completions of the first `count` test records, or of all; empty if there are no completions.

    Args:
        completions: by the name of the column: adapter, base.
        data: with the test split set up.
        count: None for all records.
    """
    if not completions:
        return {}
    tokenizer = tokenizer_of(data)
    texts = {
        name: (
            tokenizer.batch_decode([completion.ids for completion in column]),
            [completion.finish_reason == "stop" for completion in column],
        )
        for name, column in completions.items()
    }
    try:
        train = data.training_records()
    except InputError as error:
        log.warning("the nearest training record is left out of the baselines: %s", error)
        train = []
    return compare_with_baselines(data.splits["test"].records[:count], texts, train)
