"""Scoring: completions of the test records -> text -> scores beside the baselines.

    {"adapter": [Completion, ...], "base": [Completion, ...]}  ->  Table with copy_prompt and nearest added
    the same                                                   ->  test_completions.jsonl, a line a record

The metrics are those of `evaluation/`; this module only decodes, and finds the training records for the baseline.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_phi2.audit.redaction import redact, redacted_id
from lit_phi2.data.records import Record
from lit_phi2.errors import InputError
from lit_phi2.evaluation.baselines import compare_with_baselines
from lit_phi2.evaluation.metrics import CompletionScores, score_completions
from lit_phi2.evaluation.table import Table
from lit_phi2.generation.engine import Completion
from lit_phi2.training.output_files import to_line
from lit_phi2.training.protocols import TrainingData, tokenizer_of
from lit_phi2.utils.files import atomic_write

log = logging.getLogger(__name__)


class ScoredTest(NamedTuple):
    """The table of test, and an object for each record with its completions and their scores."""

    table: Table
    rows: list[dict[str, Any]]


def score_test_completions(
    completions: Mapping[str, Sequence[Completion]], data: TrainingData, count: int | None
) -> ScoredTest:
    """Score the completions of the first `count` test records, or of all; empty if there are no completions.

    Args:
        completions: by the name of the column: adapter, base.
        data: with the test split set up.
        count: None for all records.
    """
    if not completions:
        return ScoredTest({}, [])
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
    records = data.splits["test"].records[:count]
    scores = {name: score_completions(records, column) for name, (column, _) in texts.items()}
    table = compare_with_baselines(records, texts, train, scores)
    rows = [
        _to_row(
            record,
            {name: (texts[name][0][index], completions[name][index], scores[name][index]) for name in texts},
            data.output_kinds,
        )
        for index, record in enumerate(records)
    ]
    return ScoredTest(table, rows)


def write_test_completions(metrics_file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write test_completions.jsonl beside test_metrics.json, or remove that of an earlier test if there is none now.

    Args:
        metrics_file: test_metrics.json, or test_metrics.partial.json.
        rows: of `score_test_completions`.
    """
    file = metrics_file.with_name(metrics_file.name.replace("metrics", "completions")).with_suffix(".jsonl")
    if rows:
        atomic_write(file, map(to_line, rows))
    else:
        file.unlink(missing_ok=True)


def _to_row(
    record: Record, columns: Mapping[str, tuple[str, Completion, CompletionScores]], kinds: frozenset[str]
) -> dict[str, Any]:
    texts = [record.instruction, record.input, record.response, *(text for text, _, _ in columns.values())]
    instruction, input, reference, *redacted = redact(texts, kinds).texts
    return {
        "id": redacted_id(record.id, record.location, kinds),
        "instruction": instruction,
        "input": input,
        "reference": reference,
        "completions": {
            name: {
                "completion": text,
                "finish_reason": completion.finish_reason,
                "new_tokens": len(completion.ids),
                "chrF": round(scores.chrf, 4),
                "ROUGE-L": round(scores.rouge_l, 4),
                **_fact_recall(scores),
            }
            for (name, (_, completion, scores)), text in zip(columns.items(), redacted, strict=True)
        },
    }


def _fact_recall(scores: CompletionScores) -> dict[str, float]:
    matched = scores.facts_matched
    return {"fact recall": round(sum(matched) / len(matched), 4)} if matched else {}
