"""data/splits.py."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lit_phi2.data.packing import Array
from lit_phi2.data.records import InvalidRecord, Record
from lit_phi2.types import Example

EncodeResult = tuple[Record, Example | InvalidRecord]

ExampleSource = Callable[
    [list[InvalidRecord]], Iterable[EncodeResult]
]  # appends bad records to the list it is given, as it goes


@dataclass(slots=True)
class Split:
    """The examples of one use, and what happened on the way to them.

    Attributes:
        sources: where the records came from.
        examples: in the order of the records.
        records: that became examples.
        lengths: (n,) int32, tokens of each example.
        supervised: (n,) int32, those of them that are learned.
        digest: of every id, token and prompt length, in order: equal for runs that train on the same thing.
        trimmed: examples whose input section was shortened.
        bad: records that cannot be used.
        skipped: overlong records, where data.on_overlong is skip.
        num_rows: that they are packed into, once it was counted.
    """

    sources: list[str]
    examples: Sequence[Example]
    records: Sequence[Record]
    lengths: Array
    supervised: Array
    digest: str
    truncated: int = 0
    invalid: list[InvalidRecord] = field(default_factory=list)
    skipped: list[InvalidRecord] = field(default_factory=list)
    num_rows: int | None = None

    @property
    def left_out(self) -> list[InvalidRecord]:
        return self.invalid + self.skipped


class _SplitBuilder:
    """Lets examples through, and counts them."""

    def __init__(self, make: ExampleSource, *, skip: bool) -> None:
        self.make = make
        self.skip = skip  # whether what does not fit is left out; otherwise it is a bad record
        self.invalid: list[InvalidRecord] = []
        self.unfit: list[InvalidRecord] = []
        self.lengths, self.supervised = array("i"), array("i")
        self.truncated = 0
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[tuple[Record, Example]]:
        for record, settled in self.make(self.invalid):
            if isinstance(settled, InvalidRecord):
                self.unfit.append(settled)
                continue
            self.lengths.append(len(settled.ids))
            self.supervised.append(settled.supervised_tokens)
            self.truncated += settled.truncated
            self._digest.update(f"{len(settled.id)} {settled.id} {settled.prompt_length} {len(settled.ids)} ".encode())
            self._digest.update(array("i", settled.ids).tobytes())
            yield record, settled

    def split(self, sources: list[str], examples: Sequence[Example], records: Sequence[Record]) -> Split:
        invalid, skipped = (self.invalid, self.unfit) if self.skip else (self.invalid + self.unfit, [])
        lengths, supervised = np.array(self.lengths, np.int32), np.array(self.supervised, np.int32)
        digest = self._digest.hexdigest()[:16]
        return Split(sources, examples, records, lengths, supervised, digest, self.truncated, invalid, skipped)


def build_split(sources: list[str], make: ExampleSource, *, skip: bool) -> Split:
    """The examples as lists.

    Args:
        sources: as named in the config.
        make: gives the records as tokens.
        skip: whether records that do not fit are left out, instead of being bad records.
    """
    tally = _SplitBuilder(make, skip=skip)
    records, examples = [], []
    for record, example in tally:
        records.append(record)
        examples.append(example)
    return tally.split(sources, examples, records)
