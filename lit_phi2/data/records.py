"""Records: read files, check every record, and say of each fault where it is and how to mend it.

    claims.jsonl:17   {"id": "c-17", "instruction": "Why ...", "input": "EOB ...", "response": "The ..."}   -> Record
    claims.jsonl:18   {"id": "c-18", "instruction": "Why ..."}                                               -> Fault

A source is a path (.jsonl, .json, .csv, .parquet), `claims:SPLIT` (packaged with lit_phi2; `claims:train[:1700]` is
its first 1,700 records) or `hub:owner/name[:split]`. Faults are gathered, not raised, so that one pass over the data
names them all.

Files are parsed here, row by row; only hub datasets are streamed through `datasets`. Its own readers name no line, fail
as a whole on one bad record, and leave traces of private records in a cache in the home folder.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_phi2.data.duplicate_ids import DuplicateIdIndex, Place
from lit_phi2.data.prompts import find_template_header
from lit_phi2.data.sources import UnparsableRow, read_rows
from lit_phi2.data.text import describe_kind, is_valid_unicode, quote_list, shorten, to_raw_json
from lit_phi2.errors import InputError
from lit_phi2.utils.sequences import batched

SHOWN_FAULTS = 20

_BATCH = 1000  # rows whose ids are looked up at a time

_HALF = "holds half of a surrogate pair; expected whole characters."

_FACT = '{"text": "...", "kind": "..."}'


@dataclass(frozen=True, slots=True)
class FieldNames:
    """Under which names a source keeps the parts of a record; `input` and `id` may be absent from it."""

    instruction: str = "instruction"
    input: str = "input"
    response: str = "response"
    id: str = "id"


@dataclass(frozen=True, slots=True)
class Fact:
    """A short text that a right answer holds.

    Attributes:
        text: looked for with case and spaces folded.
        kind: where it comes from; the packaged claims know copied (from the prompt), known (from the domain) and
            reasoned (worked out).
    """

    text: str
    kind: str


@dataclass(frozen=True, slots=True)
class Record:
    """An instruction and its response.

    Attributes:
        id: unique within what was read together.
        instruction: what is asked.
        input: what it is asked about; empty where there is none.
        response: the answer to learn; empty where none is given, which only predict allows.
        place: `path:line`, for messages.
        category, form: groups that test tells apart; empty where there are none.
        facts: what test looks for in an answer; may be none.
    """

    id: str
    instruction: str
    input: str
    response: str
    location: str
    category: str = ""
    form: str = ""
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True, slots=True)
class InvalidRecord:
    """A record that cannot be used: its place, what was found and expected, and the record as it stands there."""

    location: str
    message: str
    raw: str

    def __str__(self) -> str:
        return f"{self.location}: {self.message}"


def read_records(
    sources: Sequence[str], fields: FieldNames, *, needs_response: bool, with_facts: bool = False
) -> tuple[list[Record], list[InvalidRecord]]:
    """All records of all sources, in order, and the faults of those that are none; see `each_record`."""
    records: list[Record] = []
    faults: list[InvalidRecord] = []
    for found in iter_records(sources, fields, needs_response=needs_response, with_facts=with_facts):
        records.append(found) if isinstance(found, Record) else faults.append(found)
    return records, faults


def iter_records(
    sources: Sequence[str], fields: FieldNames, *, needs_response: bool, with_facts: bool = False
) -> Iterator[Record | InvalidRecord]:
    """The records of all sources, in order, and what is wrong with those that are none, one after another.

    With `with_facts` their category, form and facts are read too, where there are any; only test has a use for them.

    Raises:
        InputError: a source is missing, empty, of an unknown format, or has none of the expected columns.
    """
    used = DuplicateIdIndex(sources)
    names: set[str] = set()  # of fields
    for batch in batched(_checked_rows(sources, fields, needs_response, with_facts), _BATCH):
        rows, checked, places = zip(*batch, strict=True)
        for row, found, first in zip(
            rows,
            checked,
            used.add([found.id if isinstance(found, Record) else None for found in checked], places),
            strict=True,
        ):
            if isinstance(row, dict):
                names.update(row)
            if first and isinstance(found, Record):
                told = f"id {shorten(found.id)!r} was already used at {first}; ids must be unique."
                yield InvalidRecord(found.location, told, to_raw_json(row))
            else:
                yield found
    for name in ("input", "id"):  # absent where nobody named them, a typo where somebody did
        field = getattr(fields, name)
        if field != name and field not in names:
            raise InputError(
                f"data.{name}_field: no record has a field {field!r}; there are {quote_list(sorted(names))}."
            )


def _checked_rows(
    sources: Sequence[str], fields: FieldNames, needs_response: bool, with_facts: bool
) -> Iterator[tuple[Any, Record | InvalidRecord, Place]]:
    """Each row as it was parsed, the record in it or what is wrong with it, and its place in numbers."""
    for number, (source, label) in enumerate(zip(sources, _labels(sources), strict=True)):
        found_any = False
        for line, row in read_rows(source, [fields.instruction] + [fields.response] * needs_response):
            found_any = True
            checked = _check(row, fields, f"{source}:{line}", f"{label}:{line}", needs_response)
            if with_facts and isinstance(checked, Record):
                checked = _with_facts(checked, row)
            first, _, column = str(line).partition(":")
            yield row, checked, (number, int(first), int(column or 0))
        if not found_any:
            raise InputError(f"{source}: is empty; expected at least one record.")


def raise_invalid(faults: Sequence[InvalidRecord], *, setting: str) -> None:
    """Raise for faulty records: the first of them, and how many there are.

    Raises:
        InputError: there is at least one fault.
    """
    if not faults:
        return
    lines = [str(fault) for fault in faults[:SHOWN_FAULTS]]
    if len(faults) > SHOWN_FAULTS:
        lines.append(f"... and {len(faults) - SHOWN_FAULTS} more")
    noun = "record" if len(faults) == 1 else "records"
    lines.append(
        f"{len(faults)} bad {noun} in {setting}. Mend them, or set data.on_bad_record to 'skip' to leave them out."
    )
    raise InputError("\n".join(lines))


def _labels(sources: Sequence[str]) -> list[str]:
    """What stands before the line in the id of a record that has none: the file's name, or its path if two share it."""
    names = Counter(Path(source).name for source in sources)
    return [name if names[name := Path(source).name] == 1 else source for source in sources]


def _check(row: Any, fields: FieldNames, place: str, default_id: str, needs_response: bool) -> Record | InvalidRecord:
    """The record in a parsed row, or what is wrong with it."""
    if isinstance(row, UnparsableRow):
        return InvalidRecord(place, row.message, row.raw)
    if not isinstance(row, dict):
        return InvalidRecord(
            place, f"is {describe_kind(row)}; expected an object with the fields of a record.", to_raw_json(row)
        )
    for name in [fields.instruction] + [fields.response] * needs_response:
        if message := _text_fault(row, name, required=True):
            return InvalidRecord(place, message, to_raw_json(row))
    for name in (fields.input, fields.response):
        if message := _text_fault(row, name, required=False):
            return InvalidRecord(place, message, to_raw_json(row))
    record_id = row.get(fields.id)
    if record_id is None or record_id == "":
        record_id = default_id
    if isinstance(record_id, bool) or not isinstance(record_id, str | int):
        return InvalidRecord(
            place,
            f"field {fields.id!r} is {describe_kind(record_id)}; expected a text or a whole number.",
            to_raw_json(row),
        )
    if not is_valid_unicode(str(record_id)):
        return InvalidRecord(place, f"field {fields.id!r} {_HALF}", to_raw_json(row))
    texts = {name: row.get(name) or "" for name in (fields.instruction, fields.input, fields.response)}
    for name, text in texts.items():
        if header := find_template_header(text):
            return InvalidRecord(
                place,
                f"field {name!r} has a line that begins with {header!r}, a section header of the template; the model "
                "could not tell the two apart. Reword or indent it.",
                to_raw_json(row),
            )
    given_input = texts[fields.input] if texts[fields.input].strip() else ""
    return Record(str(record_id), texts[fields.instruction], given_input, texts[fields.response], place)


def _with_facts(record: Record, row: dict[str, Any]) -> Record | InvalidRecord:
    """The record with its category, form and facts, or what is wrong with the facts."""
    facts = row.get("facts")
    facts = [] if facts in (None, "") else facts  # a table's empty cell
    if not isinstance(facts, list):
        return InvalidRecord(
            record.location, f"field 'facts' is {describe_kind(facts)}; expected a list of {_FACT}.", to_raw_json(row)
        )
    for fact in facts:
        texts = (fact.get("text"), fact.get("kind")) if isinstance(fact, dict) else (None, None)
        if not all(isinstance(text, str) and text.strip() for text in texts):
            return InvalidRecord(
                record.location, f"field 'facts' holds {to_raw_json(fact)}; expected {_FACT}.", to_raw_json(row)
            )
        if not all(is_valid_unicode(str(text)) for text in texts):
            return InvalidRecord(record.location, f"field 'facts' {_HALF}", to_raw_json(row))
    for name in ("category", "form"):
        if isinstance(row.get(name), str) and not is_valid_unicode(row[name]):
            return InvalidRecord(record.location, f"field {name!r} {_HALF}", to_raw_json(row))
    # Spaces folded, since a group is a row of a table.
    groups = {name: " ".join(row[name].split()) for name in ("category", "form") if isinstance(row.get(name), str)}
    return replace(record, **groups, facts=tuple(Fact(fact["text"], fact["kind"]) for fact in facts))


def _text_fault(row: dict[str, Any], name: str, *, required: bool) -> str | None:
    value = row.get(name)
    if value is None:
        if not required:
            return None
        if name in row:
            return f"field {name!r} has no value; expected a text."
        return f"has no field {name!r}; it has {quote_list(row)}. Expected a text there (data.*_field renames fields)."
    if not isinstance(value, str):
        return f"field {name!r} is {describe_kind(value)}; expected a text."
    if required and not value.strip():
        return f"field {name!r} is {'blank' if value else 'empty'}; expected a text."
    return None if is_valid_unicode(value) else f"field {name!r} {_HALF}"
