"""Store: what became of the records of one use, in memory or, where their files are large, in Arrow on disk.

    records -> examples  ->  lists                                             files of up to IN_MEMORY bytes
                         ->  <cache_dir>/<key>/examples.arrow, metadata.json      above it

What is on disk is mapped, not read, so that memory holds the lengths alone, 8 bytes a record. It is written once: the
key says of which state of which files, by which template, tokenizer and limits. It is written aside under a lock and
renamed, so two runs that start at once make it once, and a kill leaves nothing that looks whole.
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

from lit_phi2.data.records import Fact, InvalidRecord, Record
from lit_phi2.data.splits import ExampleSource, Split, _SplitBuilder
from lit_phi2.errors import InputError
from lit_phi2.types import Example
from lit_phi2.utils.files import atomic_write
from lit_phi2.utils.sequences import Item, LazySequence, batched

log = logging.getLogger(__name__)

MAX_IN_MEMORY_BYTES = 64 * 2**20  # bytes of files; their examples take up to ten times as much

FORMAT = 1  # of what is written here

_BATCH = 1000  # examples in a batch of Arrow, which is what is looked up at a time


def load_or_build_cache(
    sources: list[str], make: ExampleSource, *, skip: bool, cache_dir: Path, key: dict[str, Any]
) -> Split:
    """The examples from the cache; the first time, into it.

    Args:
        sources: as named in the config.
        make: gives the records as tokens.
        skip: whether records that do not fit are left out, instead of being bad records.
        cache_dir: holds the caches.
        key: everything that decides what is in this one.

    Raises:
        InputError: what is there is damaged.
        OSError: the disk is full, or may not be written.
    """
    name = hashlib.sha256(json.dumps({"format": FORMAT, **key}, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir / name
    if not folder.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f"{name}.lock", f"{', '.join(sources)}: another run tokenizes them; waiting for it"):
            if not folder.is_dir():  # it is there if another run was faster
                log.info("%s: large, so tokenized once, into %s", ", ".join(sources), folder)
                _write(folder, _SplitBuilder(make, skip=skip), sources)
    log.info("%s: the tokens are those in %s, %.1f GB", ", ".join(sources), folder, _size(folder) / 1e9)
    return _open(folder, sources)


def _write(folder: Path, tally: _SplitBuilder, sources: list[str]) -> None:
    aside = folder.with_name(folder.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    aside.mkdir()
    try:
        _write_examples(aside / "examples.arrow", tally)
        split = tally.split(sources, [], [])
        metadata = {
            "sources": sources,
            "digest": split.digest,
            "trimmed": split.truncated,
            "bad": [asdict(fault) for fault in split.invalid],
            "skipped": [asdict(fault) for fault in split.skipped],
        }
        atomic_write(aside / "metadata.json", json.dumps(metadata) + "\n")
        aside.replace(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _write_examples(file: Path, tally: _SplitBuilder) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]  # slow to import, and most runs need none of it

    text = pa.large_string()  # a batch may hold more than the 2 GB of an ordinary one
    schema = pa.schema(
        [(name, text) for name in ("id", "instruction", "input", "response", "location", "category", "form", "facts")]
        + [("prompt_length", pa.int32()), ("trimmed", pa.bool_()), ("ids", pa.large_list(pa.int32()))]
    )
    try:
        with file.open("wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in batched(tally, _BATCH):
                rows = [
                    {name: getattr(record, name) for name in schema.names[:7]}
                    | {
                        "facts": json.dumps([asdict(fact) for fact in record.facts]) if record.facts else "",
                        "prompt_length": example.prompt_length,
                        "trimmed": example.truncated,
                        "ids": example.ids,
                    }
                    for record, example in batch
                ]
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
            writer.close()
            sink.flush()
            os.fsync(sink.fileno())
    except OSError as error:  # it names the file, which has another name once it is whole
        raise OSError(error.errno, error.strerror, str(file.parent)) from error


def _open(folder: Path, sources: list[str]) -> Split:
    import pyarrow as pa

    try:
        metadata = json.loads((folder / "metadata.json").read_text("utf-8"))
        batches = pa.ipc.open_file(pa.memory_map(str(folder / "examples.arrow")))
        found = [batches.get_batch(number) for number in range(batches.num_record_batches)]
        lengths = [np.diff(batch["ids"].offsets.to_numpy()).astype(np.int32) for batch in found]
        prompts = [batch["prompt_length"].to_numpy() for batch in found]
        faults = {name: [InvalidRecord(**fault) for fault in metadata[name]] for name in ("bad", "skipped")}
    except (OSError, ValueError, KeyError, TypeError) as error:  # Arrow's own errors are ValueErrors
        raise InputError(f"data.cache_dir: {folder} is damaged ({error}). Remove it; it will be made anew.") from error
    total = np.concatenate([np.zeros(0, np.int32), *lengths])
    return Split(
        sources,
        ArrowSequence(found, len(total), _example),
        ArrowSequence(found, len(total), _record),
        total,
        total - np.concatenate([np.zeros(0, np.int32), *prompts]),
        metadata["digest"],
        metadata["trimmed"],
        faults["bad"],
        faults["skipped"],
    )


class ArrowSequence(LazySequence[Item]):
    """Items made of rows of Arrow when they are asked for."""

    def __init__(self, batches: list[Any], length: int, read: Callable[[Any, int], Item]) -> None:
        self.batches = batches
        self.length = length
        self.read = read

    def __len__(self) -> int:
        return self.length

    def make(self, index: int) -> Item:
        batch, row = divmod(index, _BATCH)
        return self.read(self.batches[batch], row)


def _example(batch: Any, row: int) -> Example:
    id_, length, truncated = (batch[name][row].as_py() for name in ("id", "prompt_length", "trimmed"))
    return Example(id_, batch["ids"][row].values.to_numpy().tolist(), length, truncated)


def _record(batch: Any, row: int) -> Record:
    texts = {name: batch[name][row].as_py() for name in batch.schema.names[:8]}
    facts = tuple(Fact(**fact) for fact in json.loads(texts.pop("facts") or "[]"))
    return Record(**texts, facts=facts)


@contextmanager
def _locked(file: Path, waiting: str) -> Iterator[None]:
    """Alone among the processes that lock this file; the system lets go of it however a process ends."""
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info(waiting)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
