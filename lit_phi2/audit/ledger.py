"""Ledger: ledger.parquet, a row for each record of a run and no text of it: what was trained on, and in which steps.

    split  id    file     line  prompt_tokens  ...  content_sha256  uses                         left_out
    train  c-17  a.jsonl  17    212            ...  (salted)        [{epoch 0, step 4}, {1, 31}]
    train        a.jsonl  18                        (salted)        []                           field 'response' ...
    val    v-1   b.jsonl  1     180            ...  (salted)        []

Epochs count from 0 and steps from 1, as the curves do. The schedule of an epoch is a function of lengths and seed, so
the steps of a record are computed when the ledger is written, and a killed run that is resumed has the ledger of an
undisturbed one. The supervised tokens of the rows that share a step add up to `train/supervised_tokens` there. A step
that was skipped, because float16 overflowed in it, used no record.

Records are written in groups, and the steps of all epochs wait on disk, so that memory holds those of one epoch.
"""

import hmac
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from lit_phi2.data.identity import content_digest, raw_digest
from lit_phi2.data.invalid import InvalidRecord
from lit_phi2.data.packing import Array
from lit_phi2.data.records import Record
from lit_phi2.data.schedule import BatchingConfig, steps_of_examples
from lit_phi2.data.splits import Split
from lit_phi2.errors import InputError
from lit_phi2.utils.files import flush
from lit_phi2.utils.json_objects import TEXT, check_values, read_json_object

LEDGER_FILE, TEST_LEDGER_FILE = "ledger.parquet", "test_ledger.parquet"
KEY_FILE = "ledger_key.json"  # the salt; it never leaves the folder of the run
LEDGER_FORMAT = 1  # raised when a column changes its name or meaning

_GROUP_RECORDS = 2**15  # records in a row group


@dataclass(frozen=True, slots=True)
class StepsTaken:
    """What decides the steps that use an example.

    Attributes:
        batching: how an epoch is divided.
        seed: of the run.
        steps: optimizer steps taken.
        steps_per_epoch: of a whole epoch.
        repeats_epoch: every epoch has the batches of the first (trainer.overfit_batches).
        skipped: those of the steps, from 1, that changed nothing, because float16 gradients overflowed.
    """

    batching: BatchingConfig
    seed: int
    steps: int
    steps_per_epoch: int
    repeats_epoch: bool = False
    skipped: tuple[int, ...] = ()


# The salt


def create_key(folder: Path, splits: Iterable[Split], replaces: Mapping[str, Any] | None = None) -> None:
    """Write a new salt into the folder of a run, unless it has one; only its owner can read it.

    Args:
        folder: of the run.
        splits: whose records data.without may have left out; their ids are kept as salted hashes.
        replaces: what identifies the run that this one replaces with fewer records.
    """
    salt = secrets.token_hex(32)
    digests = {record.record_id for split in splits for record in split.forgotten}
    forgotten = sorted(salted(digest, salt).hex() for digest in digests)
    content = json.dumps({"salt": salt, "forgotten": forgotten, "replaces": replaces if forgotten else None}) + "\n"
    try:
        descriptor = os.open(folder / KEY_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(content)


def read_key(folder: Path) -> dict[str, Any]:
    """What create_key wrote: the salt in hexadecimal, `forgotten` and `replaces`.

    Raises:
        InputError: there is no salt.
    """
    key = read_json_object(folder / KEY_FILE)
    check_values(key, {"salt": TEXT}, source=str(folder / KEY_FILE), required=["salt"])
    if not re.fullmatch(r"([0-9a-f]{2}){16,}", key["salt"]):
        raise InputError(f"{folder / KEY_FILE}: salt is no hexadecimal number; the file was changed.")
    return key


def salted(digest: str, salt: str) -> bytes:
    """A digest of `data/identity.py` as the ledger has it: HMAC-SHA256 under the salt of the run."""
    return hmac.digest(bytes.fromhex(salt), bytes.fromhex(digest), "sha256")


# Writing


def write_ledger(file: Path, splits: Mapping[str, Split], salt: str, taken: StepsTaken | None = None) -> None:
    """Write the ledger of these splits; a reader finds the old file or the new one, complete.

    Args:
        file: to write.
        splits: by name; the steps are those of "train".
        salt: of the run, in hexadecimal.
        taken: None if nothing was trained.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    import pyarrow.parquet as pq  # type: ignore[import-untyped]  # slow to import

    tmp_file = file.with_name(file.name + ".new")
    try:
        with tempfile.TemporaryFile(dir=file.parent) as steps_file:  # without a name, so that no kill leaves it
            steps = _steps_of_epochs(splits["train"], taken, steps_file) if taken and "train" in splits else None
            with pq.ParquetWriter(tmp_file, _schema(taken), compression="zstd") as writer:
                for name, split in splits.items():
                    for columns in _groups(name, split, salt, steps if name == "train" else None):
                        writer.write_table(_to_table(columns, taken))
        flush(tmp_file)
        tmp_file.replace(file)
        flush(file.parent)
    finally:
        tmp_file.unlink(missing_ok=True)


def _steps_of_epochs(split: Split, taken: StepsTaken, file: IO[bytes]) -> Array:
    """(epochs, n) int32, in that file: the step from 0 that uses each example in each epoch; -1 for none."""
    num_epochs = -(-taken.steps // taken.steps_per_epoch)
    shape = (max(num_epochs, 1), len(split.lengths))
    steps = np.memmap(file, np.int32, "w+", shape=shape)
    steps[:] = -1
    for epoch in range(num_epochs):
        number = 0 if taken.repeats_epoch else epoch
        steps_in_epoch = steps_of_examples(
            split.lengths, split.supervised, taken.batching, seed=taken.seed, epoch=number
        )
        steps_in_epoch[steps_in_epoch >= 0] += epoch * taken.steps_per_epoch
        is_taken = (steps_in_epoch < taken.steps) & ~np.isin(steps_in_epoch + 1, taken.skipped)
        steps[epoch] = np.where(is_taken, steps_in_epoch, -1)
    return steps


def _groups(name: str, split: Split, salt: str, steps: Array | None) -> Iterator[dict[str, Any]]:
    """The columns of some rows after another: the examples, then what is left out."""
    for start in range(0, len(split.lengths), _GROUP_RECORDS):
        group = slice(start, min(start + _GROUP_RECORDS, len(split.lengths)))
        records = [split.records[index] for index in range(group.start, group.stop)]
        supervised = split.supervised[group]
        columns = _record_columns(name, records, split.sources, salt)
        columns |= {
            "prompt_tokens": split.lengths[group] - supervised,
            "response_tokens": supervised - 1,  # without EOS
            "supervised_tokens": supervised,
            "truncated_tokens": np.asarray(split.truncated_tokens[group]),  # type: ignore[index]
            "uses": np.full((1, len(records)), -1, np.int32) if steps is None else steps[:, group],
            "left_out": [None] * len(records),
        }
        yield columns
    left_out = [*split.left_out, *split.forgotten]
    for start in range(0, len(left_out), _GROUP_RECORDS):
        yield _left_out_columns(name, left_out[start : start + _GROUP_RECORDS], split.sources, salt)


def _record_columns(name: str, records: Sequence[Record], sources: Sequence[str], salt: str) -> dict[str, Any]:
    digests = [content_digest(record.instruction, record.input, record.response) for record in records]
    return {
        **_place_columns(name, [record.location for record in records], sources),
        "id": [record.id for record in records],
        "category": [record.category or None for record in records],
        "form": [record.form or None for record in records],
        "content_sha256": [salted(digest, salt) for digest in digests],
    }


def _left_out_columns(name: str, invalid: Sequence[InvalidRecord], sources: Sequence[str], salt: str) -> dict[str, Any]:
    nothing = [None] * len(invalid)
    counts = ("prompt_tokens", "response_tokens", "supervised_tokens", "truncated_tokens")
    return {
        **_place_columns(name, [record.location for record in invalid], sources),
        "id": [None if record.forgotten else record.record_id or None for record in invalid],
        **dict.fromkeys(("category", "form", *counts), nothing),
        "content_sha256": [salted(digest, salt) if (digest := invalid_digest(record)) else None for record in invalid],
        "uses": np.full((1, len(invalid)), -1, np.int32),
        "left_out": [record.message for record in invalid],
    }


def invalid_digest(record: InvalidRecord) -> str | None:
    """The content digest of a record that cannot be used; None where data.redact left nothing of it."""
    return record.content or (raw_digest(record.raw) if record.raw else None)


def _place_columns(name: str, locations: Sequence[str], sources: Sequence[str]) -> dict[str, Any]:
    places = [split_location(location, sources) for location in locations]
    return {
        "split": [name] * len(places),
        "file": [file for file, _, _ in places],
        "line": [line for _, line, _ in places],
        "column": [column for _, _, column in places],
    }


def split_location(location: str, sources: Sequence[str]) -> tuple[str, int, int | None]:
    """File, line and column of a location; the column is that of a JSON object that begins inside a line.

    >>> split_location("a.json:18:42", ["a.json"]), split_location("day:3:1", ["day:3"])
    (('a.json', 18, 42), ('day:3', 1, None))
    """
    for source in sources:
        if location.startswith(source + ":") and re.fullmatch(r"\d+(:\d+)?", rest := location[len(source) + 1 :]):
            line, _, column = rest.partition(":")
            return source, int(line), int(column) if column else None
    file, _, line = location.rpartition(":")
    return file, int(line) if line.isdecimal() else 0, None


def _schema(taken: StepsTaken | None) -> Any:
    import pyarrow as pa

    use = pa.struct([("epoch", pa.int32()), ("step", pa.int64())])
    metadata: dict[str, Any] = {"format": LEDGER_FORMAT, "steps": taken.steps if taken else 0}
    counts = ("prompt_tokens", "response_tokens", "supervised_tokens", "truncated_tokens")
    return pa.schema(
        [("split", pa.string()), ("id", pa.string()), ("file", pa.string()), ("line", pa.int64())]
        + [("column", pa.int32()), ("category", pa.string()), ("form", pa.string())]
        + [(name, pa.int32()) for name in counts]
        + [("content_sha256", pa.binary(32)), ("uses", pa.list_(use)), ("left_out", pa.string())],
        metadata={"lit_phi2": json.dumps(metadata | ({"skipped": taken.skipped} if taken and taken.skipped else {}))},
    )


def _to_table(columns: Mapping[str, Any], taken: StepsTaken | None) -> Any:
    import pyarrow as pa

    schema = _schema(taken)
    steps = columns["uses"].T  # (records, epochs)
    is_used = steps >= 0
    offsets = np.concatenate([np.zeros(1, np.int32), is_used.sum(1).cumsum(dtype=np.int32)])
    epochs = np.broadcast_to(np.arange(steps.shape[1], dtype=np.int32), steps.shape)[is_used]
    numbers = steps[is_used].astype(np.int64) + 1
    use = pa.StructArray.from_arrays(
        [pa.array(epochs), pa.array(numbers)], fields=list(schema.field("uses").type.value_type)
    )
    arrays = [
        pa.ListArray.from_arrays(pa.array(offsets), use)
        if field.name == "uses"
        else pa.array(columns[field.name], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


# Reading


def find_in_ledger(file: Path, hashes: set[bytes]) -> Iterator[dict[str, Any]]:
    """The rows of a ledger whose content is one of these salted hashes.

    Raises:
        InputError: the file is no ledger.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as ledger:
            for batch in ledger.iter_batches(_GROUP_RECORDS):
                # A set, because Arrow's is_in hashes all that is wanted again for every batch.
                is_wanted = [value in hashes for value in batch["content_sha256"].to_pylist()]
                yield from batch.filter(pa.array(is_wanted, pa.bool_())).to_pylist()
    except (OSError, KeyError, ValueError) as error:  # Arrow's own errors are ValueErrors
        raise InputError(
            f"{file}: cannot be read as a ledger ({type(error).__name__}). fit writes it again."
        ) from error
