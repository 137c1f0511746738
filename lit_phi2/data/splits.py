"""Splits: the examples of one split, and every record that was left out of it.

    records  ->  Example         ->  Split.examples, records, lengths, supervised      one entry each, in order
             ->  InvalidRecord   ->  Split.invalid, or Split.skipped where on_overlong is skip

Without val_files the training records are divided; the hash of the prompt decides, so records with the same prompt stay
together, and neither their order nor other records matter:

    hash of the prompt in [0, 1)    0 ------ val_fraction ------------------------------ 1
                                    |  val   |                  train                    |
"""

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from lit_phi2.data.invalid import InvalidRecord
from lit_phi2.data.packing import Array
from lit_phi2.data.prompts import format_prompt
from lit_phi2.data.records import Record
from lit_phi2.types import Example

EncodeResult = tuple[Record, Example | InvalidRecord]

# Reads and encodes the records of a split; invalid records are appended to the given list during the iteration, and
# the form of each source is added to the given dict.
ExampleSource = Callable[[list[InvalidRecord], dict[str, str]], Iterable[EncodeResult]]


@dataclass(slots=True)
class Split:
    """The examples of train, val, test or predict.

    Attributes:
        sources: files, claims: and hub:, in the order in which they were read.
        examples: in the order of the records.
        records: the record of each example.
        lengths: (n,) int32, tokens of each example.
        supervised: (n,) int32, supervised tokens of each example.
        prompt_hashes: (n,) uint64, `prompt_hash` of each record; an array, or what np.asarray makes one from.
        id_hashes: (n,) uint64, `id_hash` of each record, in the same way.
        truncated_tokens: (n,) int32, tokens that each input section lost, in the same way.
        digest: of every id, token and prompt length in order; equal for runs on the same data.
        truncated: number of examples whose input section was shortened.
        invalid: records that cannot be used.
        skipped: overlong records, if data.on_overlong is skip.
        forgotten: records that data.without names.
        forms: the form of the records of each source, such as "messages"; none for a source without a known form.
        redacted: how many placeholders of each kind data.redact put into the records.
        num_rows: rows in an epoch; None until they are counted.
    """

    sources: list[str]
    examples: Sequence[Example]
    records: Sequence[Record]
    lengths: Array
    supervised: Array
    prompt_hashes: ArrayLike
    id_hashes: ArrayLike
    truncated_tokens: ArrayLike
    digest: str
    truncated: int = 0
    invalid: list[InvalidRecord] = field(default_factory=list)
    skipped: list[InvalidRecord] = field(default_factory=list)
    forgotten: list[InvalidRecord] = field(default_factory=list)
    forms: dict[str, str] = field(default_factory=dict)
    redacted: dict[str, int] = field(default_factory=dict)
    num_rows: int | None = None

    @property
    def left_out(self) -> list[InvalidRecord]:
        return self.invalid + self.skipped


def build_split(sources: list[str], source: ExampleSource, *, skip: bool) -> Split:
    """The split with its examples and records in lists.

    Args:
        sources: the files that `source` reads.
        source: reads and encodes the records.
        skip: whether overlong records are skipped; otherwise they are invalid.
    """
    builder = SplitBuilder(source, skip=skip)
    records, examples = [], []
    for record, example in builder:
        records.append(record)
        examples.append(example)
    return builder.build(sources, examples, records)


class SplitBuilder:
    """Iterates over the examples of a source and collects what else a Split needs; iterate once, then call build."""

    def __init__(self, source: ExampleSource, *, skip: bool) -> None:
        self.source = source
        self.skip = skip
        self.invalid: list[InvalidRecord] = []
        self.overlong: list[InvalidRecord] = []
        self.forms: dict[str, str] = {}
        self.lengths, self.supervised = array("i"), array("i")
        self.prompt_hashes, self.id_hashes = array("Q"), array("Q")
        self.truncated_tokens = array("i")
        self.truncated = 0
        self.redacted: Counter[str] = Counter()
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[tuple[Record, Example]]:
        for record, example in self.source(self.invalid, self.forms):
            if isinstance(example, InvalidRecord):
                self.overlong.append(example)
                continue
            self.lengths.append(len(example.ids))
            self.supervised.append(example.supervised_tokens)
            self.prompt_hashes.append(prompt_hash(record))
            self.id_hashes.append(id_hash(record))
            self.truncated_tokens.append(example.truncated_tokens)
            self.truncated += example.truncated
            self.redacted.update(record.redacted)
            self._digest.update(f"{len(example.id)} {example.id} {example.prompt_length} {len(example.ids)} ".encode())
            self._digest.update(array("i", example.ids).tobytes())
            yield record, example

    def build(self, sources: list[str], examples: Sequence[Example], records: Sequence[Record]) -> Split:
        invalid = [record for record in self.invalid if not record.forgotten]
        forgotten = [record for record in self.invalid if record.forgotten]
        invalid, skipped = (invalid, self.overlong) if self.skip else (invalid + self.overlong, [])
        return Split(
            sources,
            examples,
            records,
            np.array(self.lengths, np.int32),
            np.array(self.supervised, np.int32),
            np.array(self.prompt_hashes, np.uint64),
            np.array(self.id_hashes, np.uint64),
            np.array(self.truncated_tokens, np.int32),
            self._digest.hexdigest()[:16],
            self.truncated,
            invalid,
            skipped,
            forgotten,
            self.forms,
            dict(self.redacted),
        )


def separate_invalid(records: Iterable[Record | InvalidRecord], invalid: list[InvalidRecord]) -> Iterator[Record]:
    """Yield the valid records and append the others to `invalid`."""
    for record in records:
        if isinstance(record, Record):
            yield record
        else:
            invalid.append(record)


# Hashes of 8 bytes, the same on every machine; among ten million records two share one once in 370,000 times


def prompt_hash(record: Record) -> int:
    """Equal for records with the same prompt."""
    return _hash(format_prompt(record.instruction, record.input))


def id_hash(record: Record) -> int:
    """Equal for records with the same id; 0 for a default id, which only says where the record is."""
    is_default = record.id in (record.location, os.path.basename(record.location))
    return 0 if is_default else _hash(record.id)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# Holding out validation records


def hold_out(
    records: Iterable[Record | InvalidRecord], split_name: str, val_fraction: float
) -> Iterator[Record | InvalidRecord]:
    """The records of "train" or of "val"; invalid records have no prompt to hash and count as training records."""
    for record in records:
        is_val = isinstance(record, Record) and is_held_out(record, val_fraction)
        if is_val == (split_name == "val"):
            yield record


def is_held_out(record: Record, val_fraction: float) -> bool:
    """Whether a record is used for validation: a function of its prompt alone, the same on every machine."""
    return prompt_hash(record) / 2**64 < val_fraction
