"""Records: read files, check every record, and say of each fault where it is and how to mend it.

    claims.jsonl:17   {"id": "c-17", "instruction": "Why ...", "input": "EOB ...", "response": "The ..."}   -> Record
    claims.jsonl:18   {"id": "c-18", "instruction": "Why ..."}                                               -> Fault

A source is a path (.jsonl, .json, .csv, .parquet), `claims:SPLIT` (packaged with lit_phi2; `claims:train[:1700]` is
its first 1,700 records) or `hub:owner/name[:split]`. Faults are gathered, not raised, so that one pass over the data
names them all.

Files are parsed here, row by row; only hub datasets are streamed through `datasets`. Its own readers name no line, fail
as a whole on one bad record, and leave traces of private records in a cache in the home folder.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from lit_phi2.batch import Item
from lit_phi2.data.prompts import header_within
from lit_phi2.errors import InputError

CLAIMS = Path(__file__).parent.parent / "assets" / "claims"
SHOWN_FAULTS = 20
_BATCH = 1000  # rows whose ids are looked up at a time
_ENDINGS = ".jsonl, .json, .csv or .parquet"
_HALF = "holds half of a surrogate pair; expected whole characters."
_FACT = '{"text": "...", "kind": "..."}'


Place = tuple[int, int, int]  # number of the source, line, column; the last is 0 where a line holds one record


@dataclass(frozen=True, slots=True)
class Fields:
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
    place: str
    category: str = ""
    form: str = ""
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    """A record that cannot be used: its place, what was found and expected, and the record as it stands there."""

    place: str
    message: str
    raw: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


def read_records(
    sources: Sequence[str], fields: Fields, *, needs_response: bool, with_facts: bool = False
) -> tuple[list[Record], list[Fault]]:
    """All records of all sources, in order, and the faults of those that are none; see `each_record`."""
    records: list[Record] = []
    faults: list[Fault] = []
    for found in each_record(sources, fields, needs_response=needs_response, with_facts=with_facts):
        records.append(found) if isinstance(found, Record) else faults.append(found)
    return records, faults


def each_record(
    sources: Sequence[str], fields: Fields, *, needs_response: bool, with_facts: bool = False
) -> Iterator[Record | Fault]:
    """The records of all sources, in order, and what is wrong with those that are none, one after another.

    With `with_facts` their category, form and facts are read too, where there are any; only test has a use for them.

    Raises:
        InputError: a source is missing, empty, of an unknown format, or has none of the expected columns.
    """
    used = _UsedIds(sources)
    names: set[str] = set()  # of fields
    for batch in batched(_checked_rows(sources, fields, needs_response, with_facts), _BATCH):
        rows, checked, places = zip(*batch, strict=True)
        for row, found, first in zip(rows, checked, used.add(checked, places), strict=True):
            if isinstance(row, dict):
                names.update(row)
            if first and isinstance(found, Record):
                told = f"id {short(found.id)!r} was already used at {first}; ids must be unique."
                yield Fault(found.place, told, _raw(row))
            else:
                yield found
    for name in ("input", "id"):  # absent where nobody named them, a typo where somebody did
        field = getattr(fields, name)
        if field != name and field not in names:
            raise InputError(f"data.{name}_field: no record has a field {field!r}; there are {_listed(sorted(names))}.")


def _checked_rows(
    sources: Sequence[str], fields: Fields, needs_response: bool, with_facts: bool
) -> Iterator[tuple[Any, Record | Fault, Place]]:
    """Each row as it was parsed, the record in it or what is wrong with it, and its place in numbers."""
    for number, (source, label) in enumerate(zip(sources, _labels(sources), strict=True)):
        found_any = False
        for line, row in _read_rows(source, fields, needs_response):
            found_any = True
            checked = _check(row, fields, f"{source}:{line}", f"{label}:{line}", needs_response)
            if with_facts and isinstance(checked, Record):
                checked = _with_facts(checked, row)
            first, _, column = str(line).partition(":")
            yield row, checked, (number, int(first), int(column or 0))
        if not found_any:
            raise InputError(f"{source}: is empty; expected at least one record.")


class _UsedIds:
    """Which ids were used, and where first, in 20 bytes an id: a dict of ten million takes gigabytes.

    Ids are told apart by 64 bits of their hash; among ten million different ones two share them once in 370,000 times.
    They are kept in sorted runs, each at least twice as long as the next, as in a log-structured merge tree.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = sources
        self.runs: list[tuple[Any, Any]] = []  # hashes (n,), places (n, 3)

    def add(self, batch: Sequence[Record | Fault], places: Sequence[Place]) -> list[str | None]:
        """For each record the place where its id was used before, or None; then its own place is kept."""
        hashes = np.array([hash(found.id) if isinstance(found, Record) else 0 for found in batch], np.int64)
        before = np.zeros((len(batch), 3), np.uint32)
        known = np.zeros(len(batch), bool)
        for run_hashes, run_places in self.runs:
            nearest = np.searchsorted(run_hashes, hashes).clip(max=len(run_hashes) - 1)
            hit = run_hashes[nearest] == hashes
            known |= hit
            before[hit] = run_places[nearest[hit]]
        first: list[str | None] = [None] * len(batch)
        fresh: dict[int, Place] = {}
        for index, (found, digest) in enumerate(zip(batch, hashes.tolist(), strict=True)):
            if not isinstance(found, Record):
                continue
            if known[index]:
                first[index] = self._named(before[index].tolist())
            elif digest in fresh:
                first[index] = self._named(fresh[digest])
            else:
                fresh[digest] = places[index]
        if fresh:
            self._keep(np.array(list(fresh), np.int64), np.array(list(fresh.values()), np.uint32))
        return first

    def _keep(self, hashes: Any, places: Any) -> None:
        order = np.argsort(hashes)
        self.runs.append((hashes[order], places[order]))
        while len(self.runs) > 1 and len(self.runs[-2][0]) < 2 * len(self.runs[-1][0]):
            hashes, places = map(np.concatenate, zip(*self.runs[-2:], strict=True))
            order = np.argsort(hashes, kind="stable")
            self.runs[-2:] = [(hashes[order], places[order])]

    def _named(self, place: Place) -> str:
        source, line, column = place
        return f"{self.sources[source]}:{line}" + (f":{column}" if column else "")


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of so many, the last of what is left; itertools has it from Python 3.12 on."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def raise_faults(faults: Sequence[Fault], *, setting: str) -> None:
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


def _read_rows(source: str, fields: Fields, needs_response: bool) -> Iterator[tuple[int | str, Any]]:
    """(line or row number from 1, the parsed row or a _Unreadable) for everything a source holds; no number twice."""
    if source.startswith("hub:"):
        yield from enumerate(_hub_rows(source), start=1)
        return
    if source.startswith("claims:"):
        named = re.fullmatch(r"claims:(\w+)(?:\[:([1-9]\d*)\])?", source)
        path = CLAIMS / f"{named[1] if named else ''}.jsonl"
        if named is None or not path.is_file():
            raise InputError(
                f"{source}: is not packaged; there are "
                + ", ".join(f"claims:{p.stem}" for p in sorted(CLAIMS.glob("*.jsonl")))
                + ", and claims:train[:1700] for the first 1,700 records of one."
            )
        yield from islice(_jsonl_rows(path), int(named[2]) if named[2] else None)
        return
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"{source}: no such file. Paths are taken from the folder you are in, {Path.cwd()}.")
    if not path.is_file():
        raise InputError(f"{source}: is not a file; expected one ending in {_ENDINGS}.")
    readers = {".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    if path.suffix == ".csv":
        yield from _csv_rows(path, fields, needs_response)
    elif path.suffix in readers:
        yield from readers[path.suffix](path)
    else:
        raise InputError(f"{source}: unknown format {path.suffix!r}; expected a file ending in {_ENDINGS}.")


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """A line that could not be parsed at all."""

    message: str
    raw: str


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as some spreadsheets write
            if line.strip():
                yield number, _parse_json_line(line.rstrip(b"\r\n"))


class _DuplicateKeyError(ValueError):
    """An object that names a field twice: json would keep the last and drop the rest in silence."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _DuplicateKeyError(f"names the field {short(twice)!r} twice; expected each name once.")
    return found


def _parse_json_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        message = str(error)
    except UnicodeDecodeError as error:
        message = f"is not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}. Save it as UTF-8."
    except json.JSONDecodeError as error:
        message = f"is not valid JSON: {error.msg} at column {error.colno}; expected one object on the line."
    except (RecursionError, ValueError) as error:
        message = f"is not valid JSON: {type(error).__name__}; expected one object of plain texts."
    return _Unreadable(message, line.decode("utf-8", errors="replace"))


def _json_rows(path: Path) -> Iterator[tuple[int | str, Any]]:
    """The objects of a top-level array, each with the line on which it begins; the second on a line as line:column."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: is not UTF-8. Save the file as UTF-8.") from error
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    position = _skip_space(text, 0)
    if not text[position:]:
        return
    if text[position] != "[":
        raise InputError(f"{path}: holds no JSON array of objects; one object a line is .jsonl.")
    line, previous, counted = 1, 0, 0
    position = _skip_space(text, position + 1)
    while text[position : position + 1] not in ("]", ""):
        line += text.count("\n", counted, position)
        counted = position
        column = position - text.rfind("\n", 0, position)
        try:
            row, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            found = f"{path}:{error.lineno}: is not valid JSON: {error.msg} at column {error.colno}"
            raise InputError(f"{found}; expected an array of objects.") from error
        except _DuplicateKeyError as error:
            raise InputError(f"{path}:{line}: {error}") from error
        except (RecursionError, ValueError) as error:
            found = f"{path}:{line}: is not valid JSON: {type(error).__name__}"
            raise InputError(f"{found}; expected objects of plain texts.") from error
        yield f"{line}:{column}" if line == previous else line, row
        previous = line
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise InputError(f"{path}:{line}: is not valid JSON: expected ',' or ']' after an object.")
    end = _skip_space(text, position + 1)
    if not text[position:] or text[end:]:
        line += text.count("\n", counted, end)
        raise InputError(f"{path}:{line}: is not valid JSON: the array is not closed, or more follows it.")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _csv_rows(path: Path, fields: Fields, needs_response: bool) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 would refuse a long chart extract
    # surrogateescape keeps bytes that are not UTF-8 recognisable, so that they cost a record and not the file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        columns: list[str] = []
        while True:
            line = reader.line_num + 1  # where the row begins; a quoted field may run over several lines
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, _Unreadable(f"is not valid CSV: {error}; nothing after it was read.", "")
                return
            if not values:
                continue  # an empty line
            if columns:
                yield line, _csv_row(columns, values)
                continue
            columns = values
            _check_columns(f"{path}:{line}", columns)
            needed = [fields.instruction] + [fields.response] * needs_response
            if missing := [column for column in needed if column not in columns]:
                # The names only where they look like names: a file without a header begins with a record.
                named = all(re.fullmatch(r"[\w .-]{1,40}", column) for column in columns)
                found = f"its columns are {_listed(columns)}" if named else "its first line does not hold column names"
                raise InputError(
                    f"{path}:{line}: has no column {', '.join(map(repr, missing))}; {found}. Name "
                    "them with data.instruction_field, data.input_field, data.response_field and data.id_field."
                )


def _check_columns(place: str, columns: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise InputError(f"{place}: has several columns {short(twice[0])!r}; expected each name once.")


def _csv_row(columns: list[str], values: list[str]) -> Any:
    raw = json.dumps(values)
    if len(values) > len(columns):
        message = f"has {len(values)} values but the header has {len(columns)} columns"
        return _Unreadable(f"{message}; put a value that holds a comma between quotes.", raw)
    if any("\udc80" <= character <= "\udcff" for value in values for character in value):
        return _Unreadable("is not UTF-8. Save the file as UTF-8.", raw)
    return dict(zip_longest(columns, values))  # columns that the row does not reach are None


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]  # slow to import, seldom needed

    try:
        file = parquet.ParquetFile(path)
        _check_columns(str(path), file.schema_arrow.names)
        batches = file.iter_batches(batch_size=1000)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except InputError:
        raise
    except (ArrowException, OSError, ValueError) as error:  # ValueError: a text that is not UTF-8
        raise InputError(f"{path}: cannot be read as Parquet ({type(error).__name__}: {error}).") from error


def _hub_rows(source: str) -> Iterator[Any]:
    from datasets import load_dataset

    name, _, split = source.removeprefix("hub:").partition(":")
    try:
        yield from load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # network, name, split or format: the hub client raises many kinds
        raise InputError(
            f"{source}: the dataset could not be read ({type(error).__name__}). Expected hub:owner/name[:split] and a "
            "network, or a file on this machine."
        ) from error


def _check(row: Any, fields: Fields, place: str, default_id: str, needs_response: bool) -> Record | Fault:
    """The record in a parsed row, or what is wrong with it."""
    if isinstance(row, _Unreadable):
        return Fault(place, row.message, row.raw)
    if not isinstance(row, dict):
        return Fault(place, f"is {_kind(row)}; expected an object with the fields of a record.", _raw(row))
    for name in [fields.instruction] + [fields.response] * needs_response:
        if message := _text_fault(row, name, required=True):
            return Fault(place, message, _raw(row))
    for name in (fields.input, fields.response):
        if message := _text_fault(row, name, required=False):
            return Fault(place, message, _raw(row))
    record_id = row.get(fields.id)
    if record_id is None or record_id == "":
        record_id = default_id
    if isinstance(record_id, bool) or not isinstance(record_id, str | int):
        return Fault(place, f"field {fields.id!r} is {_kind(record_id)}; expected a text or a whole number.", _raw(row))
    if not _is_whole(str(record_id)):
        return Fault(place, f"field {fields.id!r} {_HALF}", _raw(row))
    texts = {name: row.get(name) or "" for name in (fields.instruction, fields.input, fields.response)}
    for name, text in texts.items():
        if header := header_within(text):
            return Fault(
                place,
                f"field {name!r} has a line that begins with {header!r}, a section header of the template; the model "
                "could not tell the two apart. Reword or indent it.",
                _raw(row),
            )
    given_input = texts[fields.input] if texts[fields.input].strip() else ""
    return Record(str(record_id), texts[fields.instruction], given_input, texts[fields.response], place)


def _with_facts(record: Record, row: dict[str, Any]) -> Record | Fault:
    """The record with its category, form and facts, or what is wrong with the facts."""
    facts = row.get("facts")
    facts = [] if facts in (None, "") else facts  # a table's empty cell
    if not isinstance(facts, list):
        return Fault(record.place, f"field 'facts' is {_kind(facts)}; expected a list of {_FACT}.", _raw(row))
    for fact in facts:
        texts = (fact.get("text"), fact.get("kind")) if isinstance(fact, dict) else (None, None)
        if not all(isinstance(text, str) and text.strip() for text in texts):
            return Fault(record.place, f"field 'facts' holds {_raw(fact)}; expected {_FACT}.", _raw(row))
        if not all(_is_whole(str(text)) for text in texts):
            return Fault(record.place, f"field 'facts' {_HALF}", _raw(row))
    for name in ("category", "form"):
        if isinstance(row.get(name), str) and not _is_whole(row[name]):
            return Fault(record.place, f"field {name!r} {_HALF}", _raw(row))
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
        return f"has no field {name!r}; it has {_listed(row)}. Expected a text there (data.*_field renames fields)."
    if not isinstance(value, str):
        return f"field {name!r} is {_kind(value)}; expected a text."
    if required and not value.strip():
        return f"field {name!r} is {'blank' if value else 'empty'}; expected a text."
    return None if _is_whole(value) else f"field {name!r} {_HALF}"


def _is_whole(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds: list[tuple[type, str]] = [
        (bool, "true or false"),
        (int, "a number"),
        (float, "a number"),
        (str, "a text"),
        (list, "a list"),
        (dict, "an object"),
    ]
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)


def short(text: str) -> str:
    """A name to show, which in a faulty file may be megabytes long."""
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(names: Iterable[Any]) -> str:
    shown = [repr(short(str(name))) for name in names]
    return ", ".join(shown[:10]) + (", ..." if len(shown) > 10 else "") if shown else "none"


def _raw(row: Any) -> str:
    """The row as JSON; half of a surrogate pair, which no file can hold, as the escape that it came from."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
