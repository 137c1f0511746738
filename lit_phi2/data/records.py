"""Records: read sources and validate every row; an invalid one is named by path:line, with what was expected.

    claims.jsonl:17   {"id": "c-17", "instruction": "Why ...", "response": "The ..."}  ->  Record
    claims.jsonl:18   {"id": "c-18", "instruction": "Why ..."}                         ->  InvalidRecord

Invalid records are collected and not raised, so that one pass over the data names them all. Messages contain field
names and locations, and neither a text nor an id of a record: logs are shared more freely than claims.

With data.redact, identifiers become placeholders here, so that nothing after this module sees them.

This module loads neither torch nor transformers, so a file can be validated in a fraction of a second.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_phi2.audit.redaction import redact, redacted_id
from lit_phi2.data.chat import TURNS
from lit_phi2.data.duplicate_ids import DuplicateIdIndex, Position
from lit_phi2.data.facts import Fact, read_facts, read_groups
from lit_phi2.data.formats import (
    FieldNames,
    RecordForm,
    Texts,
    find_form,
    is_complete,
    missing_error,
    no_form_error,
    possible_forms,
    read_texts,
)
from lit_phi2.data.identity import content_digest, id_digest, raw_digest
from lit_phi2.data.invalid import InvalidRecord, RecordError, raise_invalid
from lit_phi2.data.readers.files import split_ending
from lit_phi2.data.readers.rows import UnparsableRow
from lit_phi2.data.sources import read_rows
from lit_phi2.data.text import NOT_UNICODE, describe_kind, is_valid_unicode, quote_names, to_raw_json
from lit_phi2.errors import InputError

__all__ = [
    "Fact",
    "FieldNames",
    "InvalidRecord",
    "ReadOptions",
    "Record",
    "iter_records",
    "raise_invalid",
    "read_records",
]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How rows become records.

    Attributes:
        fields: names of fields that the user gave.
        turns: which exchange of a conversation is the record; one of chat.TURNS.
        encoding: of text files; None is UTF-8, or UTF-16 by its byte order mark.
        without: digests of the ids (`identity.py`) of records to leave out.
        redact: kinds of identifiers that become placeholders, of identifiers.KINDS.
    """

    fields: FieldNames = FieldNames()  # noqa: RUF009  immutable
    turns: str = "error"
    encoding: str | None = None
    without: tuple[str, ...] = ()
    redact: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """An instruction and its response.

    Attributes:
        id: unique among all records that are read together.
        instruction: the question or task.
        input: the document that the instruction refers to; empty if there is none.
        response: the text to learn; empty only in predict, where it is optional.
        location: `path:line`, for messages.
        category, form: groups that test and audits report separately; empty if the record has none.
        facts: what test looks for in a completion; may be empty.
        redacted: the kind of each placeholder that data.redact put in, as often as it did.
    """

    id: str
    instruction: str
    input: str
    response: str
    location: str
    category: str = ""
    form: str = ""
    facts: tuple[Fact, ...] = ()
    redacted: tuple[str, ...] = ()


def read_records(
    sources: Sequence[str], options: ReadOptions, *, needs_response: bool, with_facts: bool = False
) -> tuple[list[Record], list[InvalidRecord]]:
    """All valid and all invalid records of the sources, each in order; see `iter_records`."""
    records: list[Record] = []
    invalid: list[InvalidRecord] = []
    for record in iter_records(sources, options, needs_response=needs_response, with_facts=with_facts):
        records.append(record) if isinstance(record, Record) else invalid.append(record)
    return records, invalid


def iter_records(
    sources: Sequence[str],
    options: ReadOptions,
    *,
    needs_response: bool,
    with_facts: bool = False,
    forms: dict[str, str] | None = None,
) -> Iterator[Record | InvalidRecord]:
    """The records of all sources in order, valid and invalid.

    Args:
        sources: paths of files, claims:SPLIT or hub:owner/name[:split].
        options: how rows become records.
        needs_response: whether a record without a response is invalid.
        with_facts: also read facts, which only test uses.
        forms: gets the name of each source's form when it is known.

    Raises:
        InputError: a source is missing, empty, of an unknown format, or a table without the columns of a record; an
            input or id field that the user named is in no record; or `turns` is unknown.
    """
    if options.turns not in TURNS:
        raise InputError(f"data.turns: {options.turns!r} is unknown; expected one of {', '.join(TURNS)}.")
    index = DuplicateIdIndex(sources)
    field_names: set[str] = set()
    prefixes = _default_id_prefixes(sources)
    for number, (source, prefix) in enumerate(zip(sources, prefixes, strict=True)):
        reader = _Reader(source, options, needs_response, with_facts, prefix)
        line: int | str | None = None
        for line, row in read_rows(source, encoding=options.encoding):
            if isinstance(row, dict):
                field_names.update(row)
            record = reader.read(line, row)
            first_use = index.add(record.id, _position(number, line)) if isinstance(record, Record) else None
            if options.redact:
                record = _redact(record, options.redact, f"{prefix}:{line}")
            if first_use and isinstance(record, Record):
                message = f"its id was already used at {first_use}; ids must be unique."
                record = _invalid(record, message, "" if options.redact else to_raw_json(row))
            if reader.form and forms is not None:
                forms[source] = reader.form.name
            yield record
        if line is None:
            raise InputError(f"{source}: is empty; expected at least one record.")
    _check_renamed_fields(options.fields, field_names)


def _redact(record: Record | InvalidRecord, kinds: tuple[str, ...], default_id: str) -> Record | InvalidRecord:
    """The record with placeholders for its identifiers; the default id in place of an id that holds one.

    The text of an invalid record is left out: it may be in a form in which identifiers cannot be recognised.
    """
    if isinstance(record, InvalidRecord):
        shown_id = record.record_id if record.forgotten else redacted_id(record.record_id, default_id, kinds)
        return replace(record, raw="", record_id=shown_id)
    facts = [text for fact in record.facts for text in (fact.text, fact.kind)]
    given = [record.instruction, record.input, record.response, record.category, record.form, *facts]
    (instruction, input, response, category, form, *facts), redacted = redact(given, kinds)
    return Record(
        redacted_id(record.id, default_id, kinds),
        *(instruction, input, response, record.location, category, form),
        tuple(Fact(*pair) for pair in zip(facts[::2], facts[1::2], strict=True)),
        tuple(redacted),
    )


class _Reader:
    """Reads the rows of one source, by the form of the first row that has one."""

    def __init__(
        self, source: str, options: ReadOptions, needs_response: bool, with_facts: bool, default_id_prefix: str
    ) -> None:
        self.source = source
        self.options = options
        self.needs_response = needs_response
        self.with_facts = with_facts
        self.default_id_prefix = default_id_prefix
        self.without = frozenset(options.without)
        self.forms = possible_forms(options.fields)
        self.form: RecordForm | None = None
        self.form_line: int | str = 0

    def read(self, line: int | str, row: Any) -> Record | InvalidRecord:
        location = f"{self.source}:{line}"
        if isinstance(row, UnparsableRow):
            return InvalidRecord(location, row.message, row.raw, once=row.once)
        try:
            if self.without and isinstance(row, dict) and (digest := id_digest(self._id(line, row))) in self.without:
                return self._forgotten(location, row, digest)
            return self._read(line, row, location)
        except RecordError as error:
            return InvalidRecord(location, str(error), to_raw_json(row), error.cause, error.once)

    def _read(self, line: int | str, row: Any, location: str) -> Record:
        if not isinstance(row, dict):
            raise RecordError(f"is {describe_kind(row)}; expected an object with the fields of a record.")
        texts = self._read_texts(line, row)
        record = Record(self._id(line, row), *texts, location)
        try:
            groups = read_groups(row)
        except RecordError:
            if self.with_facts:
                raise
            groups = {}  # nothing but test needs them
        if groups:
            record = replace(record, category=groups.get("category", ""), form=groups.get("form", ""))
        return replace(record, facts=read_facts(row)) if self.with_facts else record

    def _id(self, line: int | str, row: dict[str, Any]) -> str:
        record_id = _read_id(row, self.options.fields.id or "id")
        return f"{self.default_id_prefix}:{line}" if record_id is None else record_id

    def _forgotten(self, location: str, row: dict[str, Any], digest: str) -> InvalidRecord:
        """A record that data.without names; it must not decide the form of the file."""
        try:
            form = self.form or find_form(row, self.forms)
            texts = read_texts(row, form, turns=self.options.turns, needs_response=False) if form else None
        except RecordError:
            texts = None
        if texts:  # as the texts of every other record would be compared with it
            content = content_digest(*redact(list(texts), self.options.redact).texts)
        else:
            content = raw_digest(to_raw_json(row))
        message = "is left out by data.without."
        return InvalidRecord(location, message, "", record_id=digest, content=content, forgotten=True)

    def _read_texts(self, line: int | str, row: dict[str, Any]) -> Texts:
        if self.form is None:
            self.form, self.form_line = find_form(row, self.forms), line
            if _is_table(self.source):
                _check_columns(self.source, row, self.form, self.forms, self.needs_response)
            if self.form is None:
                raise no_form_error(row, self.forms)
        elif not is_complete(row, self.form):
            other = next((form for form in self.forms if is_complete(row, form)), None)
            if other:
                raise RecordError(
                    f"is of the form {other.name}, but the file is of the form {self.form.name} since line "
                    f"{self.form_line}; put the records of each form in a file of their own."
                )
        return read_texts(row, self.form, turns=self.options.turns, needs_response=self.needs_response)


def _invalid(record: Record, message: str, raw: str) -> InvalidRecord:
    """A record whose texts are known, and which cannot be used all the same."""
    content = content_digest(record.instruction, record.input, record.response)
    return InvalidRecord(record.location, message, raw, record_id=record.id, content=content)


def _is_table(source: str) -> bool:
    """Whether all rows have the same fields, so that the first row tells what every row lacks."""
    return source.startswith("hub:") or split_ending(source)[0] in (".csv", ".tsv", ".parquet")


def _check_columns(
    source: str, row: dict[str, Any], form: RecordForm | None, forms: Sequence[RecordForm], needs_response: bool
) -> None:
    """Raise an InputError if a table lacks a column: that is one fault, and not one of every row."""
    if form is None:
        raise InputError(f"{source}: {no_form_error(row, forms, 'column')}")
    if needs_response and form.response and not any(name in row for name in form.response):
        raise InputError(f"{source}: {missing_error(row, form.response, 'column')}")


def _read_id(row: dict[str, Any], name: str) -> str | None:
    """The id of a record, or None if it has none."""
    value = row.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RecordError(f"field {name!r} is {describe_kind(value)}; expected text or a whole number.")
    if not is_valid_unicode(record_id := str(value)):
        raise RecordError(f"field {name!r} {NOT_UNICODE}")
    return record_id


def _check_renamed_fields(fields: FieldNames, field_names: set[str]) -> None:
    """A source may lack `input` and `id`; but a name that the user gave and that no record has is a typo."""
    for part in ("input", "id"):
        name = getattr(fields, part)
        if name not in (None, part) and name not in field_names:
            raise InputError(
                f"data.{part}_field: no record has a field {name!r}; there are {quote_names(sorted(field_names))}."
            )


def _position(number: int, line: int | str) -> Position:
    line_number, _, column = str(line).partition(":")
    return number, int(line_number), int(column or 0)


def _default_id_prefixes(sources: Sequence[str]) -> list[str]:
    """The file's name, or its path where two sources share a name; a record without an id gets prefix:line."""
    names = Counter(Path(source).name for source in sources)
    return [name if names[name := Path(source).name] == 1 else source for source in sources]
