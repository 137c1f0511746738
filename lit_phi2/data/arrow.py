"""Arrow: the examples of a split in a folder on disk, and the split that reads them from there.

    SplitBuilder  ->  examples.arrow    one row per example, in batches of 1,000
                      metadata.json     sources, digest, and the records that were left out
    folder        ->  Split             examples and records are read when they are indexed

The Arrow file is memory-mapped, so memory holds only the lengths, 8 bytes per record.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lit_phi2.data.records import Fact, InvalidRecord, Record
from lit_phi2.data.splits import Split, SplitBuilder, id_hash, prompt_hash
from lit_phi2.errors import InputError
from lit_phi2.types import Example
from lit_phi2.utils.files import atomic_write
from lit_phi2.utils.sequences import Item, LazySequence, batched

EXAMPLES_FILE, METADATA_FILE = "examples.arrow", "metadata.json"

_BATCH_RECORDS = 1000  # records in an Arrow batch, which is the unit of a lookup
_TEXT_COLUMNS = ("id", "instruction", "input", "response", "location", "category", "form")


# Writing


def write_split(folder: Path, builder: SplitBuilder, sources: list[str]) -> None:
    """Write the examples of a builder into a folder.

    Raises:
        InputError: a source cannot be read.
        OSError: the disk is full or not writable.
    """
    _write_examples(folder / EXAMPLES_FILE, builder)
    split = builder.build(sources, [], [])
    metadata = {
        "sources": sources,
        "digest": split.digest,
        "truncated": split.truncated,
        "forms": split.forms,
        "redacted": split.redacted,
        "invalid": [asdict(record) for record in split.invalid],
        "skipped": [asdict(record) for record in split.skipped],
        "forgotten": [asdict(record) for record in split.forgotten],
    }
    atomic_write(folder / METADATA_FILE, json.dumps(metadata) + "\n")


def _write_examples(file: Path, builder: SplitBuilder) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]  # slow to import, and most runs do not need it

    text = pa.large_string()  # string columns are limited to 2 GB in a batch
    schema = pa.schema(
        [(name, text) for name in (*_TEXT_COLUMNS, "facts")]
        + [("prompt_hash", pa.uint64()), ("id_hash", pa.uint64())]
        + [("prompt_length", pa.int32()), ("truncated_tokens", pa.int32()), ("ids", pa.large_list(pa.int32()))]
    )
    try:
        with file.open("wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in batched(builder, _BATCH_RECORDS):
                rows = [_to_row(record, example) for record, example in batch]
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
            writer.close()
            sink.flush()
            os.fsync(sink.fileno())
    except OSError as error:  # name the folder: the file is in a temporary one
        raise OSError(error.errno, error.strerror, str(file.parent)) from error


def _to_row(record: Record, example: Example) -> dict[str, Any]:
    return {name: getattr(record, name) for name in _TEXT_COLUMNS} | {
        "facts": json.dumps([asdict(fact) for fact in record.facts]) if record.facts else "",
        "prompt_hash": prompt_hash(record),
        "id_hash": id_hash(record),
        "prompt_length": example.prompt_length,
        "truncated_tokens": example.truncated_tokens,
        "ids": example.ids,
    }


# Reading


def open_split(folder: Path) -> Split:
    """The split in a folder that `write_split` wrote.

    Raises:
        InputError: the folder is damaged.
    """
    import pyarrow as pa

    try:
        metadata = json.loads((folder / METADATA_FILE).read_text("utf-8"))
        file = pa.ipc.open_file(pa.memory_map(str(folder / EXAMPLES_FILE)))
        batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        lengths = [np.diff(batch["ids"].offsets.to_numpy()).astype(np.int32) for batch in batches]
        num_tokens = np.concatenate([np.zeros(0, np.int32), *lengths])
        prompt_lengths = np.concatenate([np.zeros(0, np.int32), *(batch["prompt_length"] for batch in batches)])
        return Split(
            sources=metadata["sources"],
            examples=ArrowSequence(batches, len(num_tokens), _read_example),
            records=ArrowSequence(batches, len(num_tokens), _read_record),
            lengths=num_tokens,
            supervised=num_tokens - prompt_lengths,
            prompt_hashes=pa.chunked_array([batch["prompt_hash"] for batch in batches], pa.uint64()),
            id_hashes=pa.chunked_array([batch["id_hash"] for batch in batches], pa.uint64()),
            truncated_tokens=pa.chunked_array([batch["truncated_tokens"] for batch in batches], pa.int32()),
            digest=metadata["digest"],
            truncated=metadata["truncated"],
            forms=metadata["forms"],
            invalid=[InvalidRecord(**fields) for fields in metadata["invalid"]],
            skipped=[InvalidRecord(**fields) for fields in metadata["skipped"]],
            redacted=metadata.get("redacted", {}),
            forgotten=[InvalidRecord(**fields) for fields in metadata["forgotten"]],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:  # Arrow's own errors are ValueErrors
        raise InputError(
            f"data.cache_dir: {folder} is damaged ({type(error).__name__}). Delete it; the next run builds it again."
        ) from error


class ArrowSequence(LazySequence[Item]):
    """Items that are read from rows of Arrow batches when they are indexed.

    Args:
        batches: Arrow batches of _BATCH_RECORDS rows; the last may be shorter.
        length: rows in all batches.
        read: batch, row -> item.
    """

    def __init__(self, batches: list[Any], length: int, read: Callable[[Any, int], Item]) -> None:
        self.batches = batches
        self.length = length
        self.read = read

    def __len__(self) -> int:
        return self.length

    def get(self, index: int) -> Item:
        batch, row = divmod(index, _BATCH_RECORDS)
        return self.read(self.batches[batch], row)


def _read_example(batch: Any, row: int) -> Example:
    values = {name: batch[name][row].as_py() for name in ("id", "prompt_length", "truncated_tokens", "location")}
    return Example(ids=batch["ids"][row].values.to_numpy().tolist(), **values)


def _read_record(batch: Any, row: int) -> Record:
    texts = {name: batch[name][row].as_py() for name in _TEXT_COLUMNS}
    facts = json.loads(batch["facts"][row].as_py() or "[]")
    return Record(**texts, facts=tuple(Fact(**fact) for fact in facts))
