"""Texts: what is completed.

packaged records, or a JSONL file with instruction, input and response  ->  Question (prompt ids, reference ids)
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lit_phi2.data.encode import encode
from lit_phi2.data.records import Record
from lit_phi2.pretrained import load_tokenizer, resolve_base_model
from lit_phi2.types import Example
from lit_phi2.utils.files import read_json_lines

CLAIMS = Path(__file__).resolve().parents[2] / "lit_phi2" / "assets" / "claims"
MAX_LENGTH = 1600  # tokens of a record; few are left out, and every base has the positions


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and the response of its record with the EOS token."""

    prompt: list[int]
    reference: list[int]


def read_questions(base: str, source: str, count: int | None = None) -> list[Question]:
    """The first questions of a source that fit.

    Args:
        base: whose tokenizer is used.
        source: claims:SPLIT, or a JSONL file.
        count: None for all.
    """
    return [Question(ids[:length], ids[length:]) for ids, length in _encode(base, source, count)]


def read_examples(base: str, source: str, count: int | None = None) -> list[Example]:
    """The same records as training examples, for the index of drafts."""
    return [Example("", ids, length) for ids, length in _encode(base, source, count)]


def draw_limits(count: int, low: int, high: int) -> list[int]:
    """Tokens of each completion, the same in every run."""
    rng = random.Random(0)
    return [rng.randint(low, high) for _ in range(count)]


def split_questions(source: str) -> tuple[str, str]:
    """Where drafts are learned and where they are used: a file train.jsonl has its validation.jsonl beside it."""
    validation = Path(source).with_name("validation.jsonl")
    return (source, str(validation)) if validation.is_file() else (source, source)


def _encode(base: str, source: str, count: int | None) -> Sequence[tuple[list[int], int]]:
    model = resolve_base_model(base)
    file = CLAIMS / f"{source.removeprefix('claims:')}.jsonl" if source.startswith("claims:") else Path(source)
    rows = list(
        islice(read_json_lines(file), None if count is None else 2 * count)
    )  # more than enough, where few are too long
    records = [
        Record(
            id=str(number),
            instruction=row["instruction"],
            input=row.get("input") or "",
            response=row["response"],
            location=f"{file}:{number}",
        )
        for number, row in enumerate(rows, start=1)
    ]
    encoded = encode(records, load_tokenizer(model), max_length=MAX_LENGTH, on_overlong="skip")
    return [(example.ids, example.prompt_length) for example in encoded.examples][:count]
