"""Records: read sources and validate every row; an invalid one is named by path:line, with what was expected.

    claims.jsonl:17   {"id": "c-17", "instruction": "Why ...", "response": "The ..."}  ->  Record
    claims.jsonl:18   {"id": "c-18", "instruction": "Why ..."}                         ->  InvalidRecord

Invalid records are collected and not raised, so that one pass over the data names them all. Messages contain field
names and ids but no text of a record (a malformed fact excepted): logs are shared more freely than claims.

This module loads neither torch nor transformers, so a file can be validated in a fraction of a second.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_phi2.data.duplicate_ids import DuplicateIdIndex, Position
from lit_phi2.data.prompts import find_template_header
from lit_phi2.data.sources import UnparsableRow, read_rows
from lit_phi2.data.text import describe_kind, is_valid_unicode, quote_list, shorten, to_raw_json
from lit_phi2.errors import InputError

MAX_SHOWN = 20  # invalid records that an error lists

_NOT_UNICODE = "holds half of a surrogate pair; expected whole characters."
_FACT_FORM = '{"text": "...", "kind": "..."}'


@dataclass(frozen=True, slots=True)
class FieldNames:
    """The names under which a source keeps the parts of a record; it may lack `input` and `id`."""

    instruction: str = "instruction"
    input: str = "input"
    response: str = "response"
    id: str = "id"


@dataclass(frozen=True, slots=True)
class Fact:
    """A short text that a correct completion contains.

    Attributes:
        text: compared without regard to case and whitespace.
        kind: where it comes from. The packaged claims use copied (from the prompt), known (from the domain) and
            reasoned (derived).
    """

    text: str
    kind: str


@dataclass(frozen=True, slots=True)
class Record:
    """An instruction and its response.

    Attributes:
        id: unique among all records that are read together.
        instruction: the question or task.
        input: the document that the instruction refers to; empty if there is none.
        response: the text to learn; empty only in predict, where it is optional.
        location: `path:line`, for messages.
        category, form: groups that test reports separately; empty if the record has none.
        facts: what test looks for in a completion; may be empty.
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
    """A record that cannot be used.

    Attributes:
        location: `path:line`.
        message: what was found and what was expected.
        raw: the record as it is in the file, for rejected.jsonl.
    """

    location: str
    message: str
    raw: str

    def __str__(self) -> str:
        return f"{self.location}: {self.message}"


def read_records(
    sources: Sequence[str], fields: FieldNames, *, needs_response: bool, with_facts: bool = False
) -> tuple[list[Record], list[InvalidRecord]]:
    """All valid and all invalid records of the sources, each in order; see `iter_records`."""
    records: list[Record] = []
    invalid: list[InvalidRecord] = []
    for record in iter_records(sources, fields, needs_response=needs_response, with_facts=with_facts):
        records.append(record) if isinstance(record, Record) else invalid.append(record)
    return records, invalid


def iter_records(
    sources: Sequence[str], fields: FieldNames, *, needs_response: bool, with_facts: bool = False
) -> Iterator[Record | InvalidRecord]:
    """The records of all sources in order, valid and invalid.

    Args:
        sources: paths, claims:SPLIT or hub:owner/name[:split].
        fields: the names of the fields.
        needs_response: whether a record without a response is invalid.
        with_facts: also read category, form and facts, which only test uses.

    Raises:
        InputError: a source is missing, empty, of an unknown format, or lacks a required column; or no record has a
            field that `fields` renames.
    """
    index = DuplicateIdIndex(sources)
    field_names: set[str] = set()
    for row, record, position in _validated_rows(sources, fields, needs_response, with_facts):
        if isinstance(row, dict):
            field_names.update(row)
        if isinstance(record, Record) and (first_use := index.add(record.id, position)):
            message = f"id {shorten(record.id)!r} was already used at {first_use}; ids must be unique."
            yield InvalidRecord(record.location, message, to_raw_json(row))
        else:
            yield record
    _check_renamed_fields(fields, field_names)


def raise_invalid(invalid: Sequence[InvalidRecord], *, setting: str) -> None:
    """Raise if there are invalid records: the first of them, and their number.

    Args:
        invalid: may be empty.
        setting: the config key that named their files.

    Raises:
        InputError: at least one record is invalid.
    """
    if not invalid:
        return
    lines = [str(record) for record in invalid[:MAX_SHOWN]]
    if len(invalid) > MAX_SHOWN:
        lines.append(f"... and {len(invalid) - MAX_SHOWN} more")
    noun, pronoun = ("record", "it") if len(invalid) == 1 else ("records", "them")
    lines.append(
        f"{len(invalid)} invalid {noun} in {setting}. "
        f"Fix {pronoun}, or set data.on_bad_record to 'skip' to leave {pronoun} out."
    )
    raise InputError("\n".join(lines))


def _validated_rows(
    sources: Sequence[str], fields: FieldNames, needs_response: bool, with_facts: bool
) -> Iterator[tuple[Any, Record | InvalidRecord, Position]]:
    """Each parsed row, the record in it, and its position."""
    required = [fields.instruction, fields.response] if needs_response else [fields.instruction]
    for number, (source, label) in enumerate(zip(sources, _default_id_prefixes(sources), strict=True)):
        is_empty = True
        for line, row in read_rows(source, required):
            is_empty = False
            record = _validate(row, fields, f"{source}:{line}", f"{label}:{line}", required)
            if with_facts and isinstance(record, Record):
                record = _add_facts(record, row)
            line_number, _, column = str(line).partition(":")
            yield row, record, (number, int(line_number), int(column or 0))
        if is_empty:
            raise InputError(f"{source}: is empty; expected at least one record.")


def _default_id_prefixes(sources: Sequence[str]) -> list[str]:
    """The file's name, or its path where two sources share a name; a record without an id gets prefix:line."""
    names = Counter(Path(source).name for source in sources)
    return [name if names[name := Path(source).name] == 1 else source for source in sources]


def _check_renamed_fields(fields: FieldNames, field_names: set[str]) -> None:
    """A source may lack `input` and `id`; but a name that the user gave and that no record has is a typo."""
    for part in ("input", "id"):
        name = getattr(fields, part)
        if name != part and name not in field_names:
            raise InputError(
                f"data.{part}_field: no record has a field {name!r}; there are {quote_list(sorted(field_names))}."
            )


def _validate(
    row: Any, fields: FieldNames, location: str, default_id: str, required: Sequence[str]
) -> Record | InvalidRecord:
    if isinstance(row, UnparsableRow):
        return InvalidRecord(location, row.message, row.raw)
    if not isinstance(row, dict):
        message = f"is {describe_kind(row)}; expected an object with the fields of a record."
        return InvalidRecord(location, message, to_raw_json(row))
    record_id = default_id if row.get(fields.id) in (None, "") else row[fields.id]
    if error := _row_error(row, fields, record_id, required):
        return InvalidRecord(location, error, to_raw_json(row))
    instruction, input_text, response = (
        row.get(name) or "" for name in (fields.instruction, fields.input, fields.response)
    )
    return Record(str(record_id), instruction, input_text if input_text.strip() else "", response, location)


def _row_error(row: dict[str, Any], fields: FieldNames, record_id: Any, required: Sequence[str]) -> str | None:
    for name in required:
        if error := _text_error(row, name, required=True):
            return error
    for name in (fields.input, fields.response):
        if error := _text_error(row, name, required=False):
            return error
    return _id_error(record_id, fields.id) or _header_error(row, fields)


def _text_error(row: dict[str, Any], name: str, *, required: bool) -> str | None:
    value = row.get(name)
    if value is None:
        if not required:
            return None
        if name in row:
            return f"field {name!r} has no value; expected text."
        return f"has no field {name!r}; it has {quote_list(row)}. Expected text there (data.*_field renames fields)."
    if not isinstance(value, str):
        return f"field {name!r} is {describe_kind(value)}; expected text."
    if required and not value.strip():
        return f"field {name!r} is {'blank' if value else 'empty'}; expected text."
    return None if is_valid_unicode(value) else f"field {name!r} {_NOT_UNICODE}"


def _id_error(record_id: Any, name: str) -> str | None:
    if isinstance(record_id, bool) or not isinstance(record_id, str | int):
        return f"field {name!r} is {describe_kind(record_id)}; expected text or a whole number."
    return None if is_valid_unicode(str(record_id)) else f"field {name!r} {_NOT_UNICODE}"


def _header_error(row: dict[str, Any], fields: FieldNames) -> str | None:
    for name in (fields.instruction, fields.input, fields.response):
        if header := find_template_header(row.get(name) or ""):
            return (
                f"field {name!r} has a line that begins with {header!r}, a section header of the template; the model "
                "could not tell the two apart. Reword or indent it."
            )
    return None


def _add_facts(record: Record, row: dict[str, Any]) -> Record | InvalidRecord:
    """The record with its category, form and facts."""
    facts = row.get("facts")
    if facts in (None, ""):  # "" is the empty cell of a CSV file
        facts = []
    if error := _facts_error(facts) or _groups_error(row):
        return InvalidRecord(record.location, error, to_raw_json(row))
    # Whitespace is collapsed because a group becomes a row of a table.
    groups = {name: " ".join(row[name].split()) for name in ("category", "form") if isinstance(row.get(name), str)}
    return replace(record, **groups, facts=tuple(Fact(fact["text"], fact["kind"]) for fact in facts))


def _facts_error(facts: Any) -> str | None:
    if not isinstance(facts, list):
        return f"field 'facts' is {describe_kind(facts)}; expected a list of {_FACT_FORM}."
    for fact in facts:
        texts = (fact.get("text"), fact.get("kind")) if isinstance(fact, dict) else (None, None)
        if not all(isinstance(text, str) and text.strip() for text in texts):
            return f"field 'facts' holds {to_raw_json(fact)}; expected {_FACT_FORM}."
        if not all(is_valid_unicode(str(text)) for text in texts):
            return f"field 'facts' {_NOT_UNICODE}"
    return None


def _groups_error(row: dict[str, Any]) -> str | None:
    for name in ("category", "form"):
        if isinstance(row.get(name), str) and not is_valid_unicode(row[name]):
            return f"field {name!r} {_NOT_UNICODE}"
    return None
