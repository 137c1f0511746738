"""Samples: what the model wrote, beside its base and the reference.

    test_completions.jsonl  ->  the three best and the three worst completions of test, by chrF with the reference
    samples.jsonl           ->  four validation prompts, before the first step and after the last

Identifiers in completions of test become placeholders. The samples are shown as the run wrote them: they were asked
for, and data.redact_output decides about them.
"""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_phi2.report.text import redacted, shorten
from lit_phi2.utils.files import read_json_lines

TEST_COMPLETIONS_FILE, SAMPLES_FILE = "test_completions.jsonl", "samples.jsonl"
NUM_SHOWN = 3  # best, and worst
NUM_SAMPLES = 4
RANKED_BY = "chrF"


@dataclass(frozen=True, slots=True)
class Text:
    """One of the texts that stand side by side.

    Attributes:
        title: what it is.
        text: maybe shortened.
        note: its scores, or how it ended.
        kind: reference, adapter or base, for its colour.
    """

    title: str
    text: str
    note: str
    kind: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, its reference and its completions.

    Attributes:
        title: of the card.
        prompt: parts with their name.
        texts: side by side.
    """

    title: str
    prompt: dict[str, str]
    texts: list[Text]


@dataclass(frozen=True, slots=True)
class RankedSamples:
    """The ends of the ranking.

    Attributes:
        best, worst: best first, worst first; no record is in both.
        num_records: ranked.
        system: whose completions are ranked.
    """

    best: list[Sample]
    worst: list[Sample]
    num_records: int
    system: str


def ranked_samples(folder: Path) -> RankedSamples | None:
    """The best and the worst completions of `test`; None if the run has none.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / TEST_COMPLETIONS_FILE
    rows = list(_scored_rows(file)) if file.is_file() else []
    if not rows:
        return None
    num_shown = min(NUM_SHOWN, -(-len(rows) // 2))
    # By the place in the file where scores are equal.
    worst = heapq.nsmallest(num_shown, rows, key=lambda row: (row[0], row[1]))
    best = heapq.nsmallest(min(num_shown, len(rows) - len(worst)), rows, key=lambda row: (-row[0], row[1]))
    if not best:
        best, worst = worst, []
    system = "adapter" if "adapter" in rows[0][2]["completions"] else "base"
    return RankedSamples(
        [_test_sample(row) for _, _, row in best], [_test_sample(row) for _, _, row in worst], len(rows), system
    )


def training_samples(folder: Path) -> list[Sample]:
    """The samples of fit: the completions of the base, and those after the last validation.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / SAMPLES_FILE
    by_id: dict[str, list[dict[str, Any]]] = {}
    for row in read_json_lines(file) if file.is_file() else ():
        if isinstance(row.get("step"), int) and _are_texts(row, "id", "prompt", "reference", "completion"):
            by_id.setdefault(row["id"], []).append(row)
    samples = []
    for rows in list(by_id.values())[:NUM_SAMPLES]:
        first, last = rows[0], rows[-1]
        texts = [Text("Reference", shorten(first["reference"]), "the response of the record", "reference")]
        if last is not first:
            texts.append(Text("Adapter", shorten(last["completion"]), f"after step {last['step']:,}", "adapter"))
        name, note = ("Base", "before training") if first["step"] == 0 else ("Adapter", f"after step {first['step']:,}")
        texts.append(Text(name, shorten(first["completion"]), note, name.lower()))
        samples.append(Sample(first["id"], {"Prompt": shorten(first["prompt"].strip())}, texts))
    return samples


def _scored_rows(file: Path) -> Iterator[tuple[float, int, dict[str, Any]]]:
    for index, row in enumerate(read_json_lines(file)):
        columns = row.get("completions")
        if not _are_texts(row, "id", "instruction", "input", "reference") or not isinstance(columns, dict):
            continue
        if all(isinstance(each, dict) and _are_texts(each, "completion") for each in columns.values()):
            main: dict[str, Any] = columns.get("adapter") or columns.get("base") or {}
            if isinstance(main.get(RANKED_BY), int | float):
                yield float(main[RANKED_BY]), index, row


def _test_sample(row: Mapping[str, Any]) -> Sample:
    columns = row["completions"]
    texts = [
        row["id"],
        row["instruction"],
        row["input"],
        row["reference"],
        *(each["completion"] for each in columns.values()),
    ]
    name, instruction, input, reference, *completions = map(shorten, redacted(*texts))
    shown = [Text("Reference", reference, "the response of the record", "reference")]
    for (system, column), completion in zip(columns.items(), completions, strict=True):
        shown.append(Text(redacted(system)[0].capitalize(), completion, _scores(column), system))
    return Sample(name, {"Instruction": instruction} | ({"Input": input} if input else {}), shown)


def _scores(column: Mapping[str, Any]) -> str:
    names = [name for name in (RANKED_BY, "fact recall") if isinstance(column.get(name), int | float)]
    ended = {"stop": "", "length": "cut at the limit"}.get(str(column.get("finish_reason")), "")
    return ", ".join([*(f"{name} {column[name]:.2f}" for name in names), *filter(None, [ended])])


def _are_texts(row: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(row.get(name), str) for name in names)
