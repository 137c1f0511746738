"""Cache: the examples of large files, in Arrow on disk.

    files of up to 64 MiB    ->  lists in memory, nothing on disk    splits.py
    larger files             ->  <cache_dir>/<hash of the key>/      examples.arrow, metadata.json

Arrow files are memory-mapped, so memory holds only the lengths, 8 bytes per record. The key contains everything that
decides the examples: the state of the files, template, tokenizer and limits. A cache is written under a lock into a
folder `<hash>.new` and then renamed, so that two runs that start together write it once, and a kill leaves no folder
that looks complete.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_phi2.data.prompts import TEMPLATE_VERSION
from lit_phi2.data.records import Fact, InvalidRecord, Record
from lit_phi2.data.splits import ExampleSource, Split, SplitBuilder
from lit_phi2.errors import InputError
from lit_phi2.types import Example
from lit_phi2.utils.files import atomic_write, tree_digest
from lit_phi2.utils.sequences import Item, LazySequence, batched

log = logging.getLogger(__name__)

MAX_IN_MEMORY_BYTES = 64 * 2**20  # size of the files; their examples take up to ten times as much memory
CACHE_FORMAT = 2  # of the files below; part of the key

_BATCH_RECORDS = 1000  # records in an Arrow batch, which is the unit of a lookup
_TEXT_COLUMNS = ("id", "instruction", "input", "response", "location", "category", "form")


def is_large(sources: list[str]) -> bool:
    """Whether the files of the sources together exceed MAX_IN_MEMORY_BYTES; packaged and hub sources do not count."""
    files = [Path(source).expanduser() for source in sources]
    return sum(file.stat().st_size for file in files if file.is_file()) > MAX_IN_MEMORY_BYTES


def cache_key(sources: list[str], tokenizer: PreTrainedTokenizerBase, **options: Any) -> dict[str, Any]:
    """Everything that decides the examples.

    Args:
        sources: as named in the config.
        tokenizer: of the base.
        options: fields, limits and hold-out, as values that JSON can hold.
    """
    return {
        "format": CACHE_FORMAT,
        "sources": sources,
        "files": [_file_state(Path(source).expanduser()) for source in sources],
        "template": TEMPLATE_VERSION,
        "tokenizer": tree_digest([tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id]),
        **options,
    }


def load_or_build_cache(
    sources: list[str], source: ExampleSource, *, skip: bool, cache_dir: Path, key: dict[str, Any]
) -> Split:
    """The split from the cache; the first run writes it.

    Args:
        sources: as named in the config.
        source: reads and encodes the records.
        skip: whether overlong records are skipped; otherwise they are invalid.
        cache_dir: contains the caches.
        key: from `cache_key`.

    Raises:
        InputError: the cache is damaged.
        OSError: the disk is full or not writable.
    """
    names = ", ".join(sources)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir / digest
    if not folder.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(
            cache_dir / f"{digest}.lock", f"{names}: waiting for another run that is tokenizing the same files"
        ):
            if not folder.is_dir():  # another run may have written it while this one waited
                log.info("%s: large, so tokenized once, into %s", names, folder)
                _write(folder, SplitBuilder(source, skip=skip), sources)
    size = sum(file.stat().st_size for file in folder.iterdir())
    log.info("%s: reading tokens from %s, %.1f GB", names, folder, size / 1e9)
    return _open(folder, sources)


def _file_state(file: Path) -> list[Any] | None:
    """Values that change whenever the file changes; None for a source that is not a local file."""
    if not file.is_file():
        return None
    stat = file.stat()
    return [str(file.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


@contextmanager
def _locked(file: Path, waiting_message: str) -> Iterator[None]:
    """Hold an exclusive lock between processes; the system releases it however the process ends."""
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info(waiting_message)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# Writing


def _write(folder: Path, builder: SplitBuilder, sources: list[str]) -> None:
    tmp_folder = folder.with_name(folder.name + ".new")
    shutil.rmtree(tmp_folder, ignore_errors=True)  # left by a run that was killed
    tmp_folder.mkdir()
    try:
        _write_examples(tmp_folder / "examples.arrow", builder)
        split = builder.build(sources, [], [])
        metadata = {
            "sources": sources,
            "digest": split.digest,
            "truncated": split.truncated,
            "invalid": [asdict(record) for record in split.invalid],
            "skipped": [asdict(record) for record in split.skipped],
        }
        atomic_write(tmp_folder / "metadata.json", json.dumps(metadata) + "\n")
        tmp_folder.replace(folder)
    except BaseException:
        shutil.rmtree(tmp_folder, ignore_errors=True)
        raise


def _write_examples(file: Path, builder: SplitBuilder) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]  # slow to import, and most runs do not need it

    text = pa.large_string()  # string columns are limited to 2 GB in a batch
    schema = pa.schema(
        [(name, text) for name in (*_TEXT_COLUMNS, "facts")]
        + [("prompt_length", pa.int32()), ("truncated", pa.bool_()), ("ids", pa.large_list(pa.int32()))]
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
        "prompt_length": example.prompt_length,
        "truncated": example.truncated,
        "ids": example.ids,
    }


# Reading


def _open(folder: Path, sources: list[str]) -> Split:
    import pyarrow as pa

    try:
        metadata = json.loads((folder / "metadata.json").read_text("utf-8"))
        file = pa.ipc.open_file(pa.memory_map(str(folder / "examples.arrow")))
        batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        lengths = [np.diff(batch["ids"].offsets.to_numpy()).astype(np.int32) for batch in batches]
        prompt_lengths = [batch["prompt_length"].to_numpy() for batch in batches]
        digest, truncated = metadata["digest"], metadata["truncated"]
        invalid, skipped = ([InvalidRecord(**fields) for fields in metadata[name]] for name in ("invalid", "skipped"))
    except (OSError, ValueError, KeyError, TypeError) as error:  # Arrow's own errors are ValueErrors
        raise InputError(
            f"data.cache_dir: {folder} is damaged ({error}). Delete it; the next run builds it again."
        ) from error
    num_tokens = np.concatenate([np.zeros(0, np.int32), *lengths])
    return Split(
        sources,
        ArrowSequence(batches, len(num_tokens), _read_example),
        ArrowSequence(batches, len(num_tokens), _read_record),
        num_tokens,
        num_tokens - np.concatenate([np.zeros(0, np.int32), *prompt_lengths]),
        digest,
        truncated,
        invalid,
        skipped,
    )


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
    record_id, prompt_length, truncated = (batch[name][row].as_py() for name in ("id", "prompt_length", "truncated"))
    return Example(record_id, batch["ids"][row].values.to_numpy().tolist(), prompt_length, truncated)


def _read_record(batch: Any, row: int) -> Record:
    texts = {name: batch[name][row].as_py() for name in _TEXT_COLUMNS}
    facts = json.loads(batch["facts"][row].as_py() or "[]")
    return Record(**texts, facts=tuple(Fact(**fact) for fact in facts))
