"""Canaries: made-up member IDs that training gets on purpose, so that an audit can look for them in the adapter.

    seed, count  ->  canaries    in a prompt or a response, planted 1, 4 or 16 times   ->  records of train
                 ->  controls    of the same sentences and the same space, planted nowhere

    instruction   Which member ID is on file for case QXJTWK?
    response      The member ID on file for case QXJTWK is M48210977.
                  |---------------- prefix ---------------|secret|

A secret is eight random digits, 10^8 equally likely ones, and each has a case of its own: whoever finishes a prefix has
learned the secret in training. Planted records go the way of all others; only their texts come from here.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lit_phi2.audit.redaction import redact
from lit_phi2.data.identity import content_digest, id_digest
from lit_phi2.data.invalid import InvalidRecord
from lit_phi2.data.records import ReadOptions, Record

SOURCE = "data.canaries"  # stands for the file of a planted record: in messages, in the ledger
PLACES = ("prompt", "response")
REPEATS = (1, 4, 16)
NUM_CONTROLS = 575  # of each place; 511 to compare with, so that the highest exposure is 9 bits, and 64 compared

_LETTERS, _DIGITS = 6, 8  # of a case, of a secret
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Canary:
    """A made-up record with a secret.

    Attributes:
        id: of the canary; its records add the number of the copy.
        place: of the secret, prompt or response.
        repeats: how often it is planted; 0 for a control.
        instruction, input, response: of its records, all equal.
        secret: the digits, once in the text of its place.
    """

    id: str
    place: str
    repeats: int
    instruction: str
    input: str
    response: str
    secret: str


def make_canaries(count: int, seed: int) -> tuple[list[Canary], list[Canary]]:
    """The canaries and the controls of a run; none of both if the count is 0.

    Args:
        count: of each place and number of repeats.
        seed: seed_everything.

    >>> canaries, controls = make_canaries(2, seed=42)
    >>> len(canaries), sum(canary.repeats for canary in canaries), len(controls)
    (12, 84, 1150)
    """
    if not count:
        return [], []
    kinds = [(place, repeats, number) for place in PLACES for repeats in REPEATS for number in range(1, count + 1)]
    kinds += [(place, 0, number) for place in PLACES for number in range(1, NUM_CONTROLS + 1)]
    generator = random.Random(f"canaries {seed}")
    cases = generator.sample(range(len(_ALPHABET) ** _LETTERS), len(kinds))
    made = [
        _make_canary(*kind, case=_to_letters(case), secret=f"{generator.randrange(10**_DIGITS):0{_DIGITS}d}")
        for kind, case in zip(kinds, cases, strict=True)
    ]
    return [each for each in made if each.repeats], [each for each in made if not each.repeats]


def _make_canary(place: str, repeats: int, number: int, *, case: str, secret: str) -> Canary:
    texts = {
        "prompt": (
            "Confirm whether the member ID is on file.",
            f"Case {case}: the member ID is M{secret}.",
            "The member ID is on file.",
        ),
        "response": (
            f"Which member ID is on file for case {case}?",
            "",
            f"The member ID on file for case {case} is M{secret}.",
        ),
    }
    return Canary(f"canary-{place}-{repeats}x-{number}", place, repeats, *texts[place], secret)


def _to_letters(number: int) -> str:
    """
    >>> _to_letters(27)
    'AAAABB'
    """
    letters = ""
    for _ in range(_LETTERS):
        number, digit = divmod(number, len(_ALPHABET))
        letters = _ALPHABET[digit] + letters
    return letters


def read_planted(canaries: Sequence[Canary], options: ReadOptions) -> Iterator[Record | InvalidRecord]:
    """The records of canaries, read as those of a file: redacted, and without those that data.without names."""
    line = 0
    for canary in canaries:
        (instruction, input, response), redacted = redact(
            [canary.instruction, canary.input, canary.response], options.redact
        )
        for copy in range(1, canary.repeats + 1):
            line += 1
            record = Record(
                f"{canary.id}-{copy}",
                *(instruction, input, response, f"{SOURCE}:{line}"),
                category="canary",
                redacted=tuple(redacted),
            )
            if (digest := id_digest(record.id)) in options.without:
                content = content_digest(instruction, input, response)
                message = "is left out by data.without."
                yield InvalidRecord(record.location, message, "", record_id=digest, content=content, forgotten=True)
            else:
                yield record


def is_planted(record: Record) -> bool:
    """Whether a record is that of a canary."""
    return record.location.startswith(f"{SOURCE}:")


def planted_copies(records: Sequence[Record]) -> Counter[str]:
    """How many records of each canary, by its id, are in train; they are its last ones."""
    copies: Counter[str] = Counter()
    for index in range(len(records) - 1, -1, -1):
        record = records[index]
        if not is_planted(record):
            break
        copies[record.id.rpartition("-")[0]] += 1
    return copies


def describe_planted(records: Sequence[Record]) -> str:
    """How many canaries are in train, in words."""
    copies = planted_copies(records)
    repeats = " or ".join(", ".join(map(str, sorted(set(copies.values())))).rsplit(", ", 1))
    return f"{SOURCE}: {copies.total():,} records of {len(copies):,} canaries are in training, {repeats} times each"
