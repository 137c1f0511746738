"""Ledger: time and memory of the ledger of many records, which are made as they are asked for and never all held.

    records of --records, numbered, as a split  ->  write_ledger over three epochs  ->  s of CPU, MB, bytes of file

Memory is what the process holds itself (RssAnon), above what it held before, beside that of the schedule of an epoch.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

from profiles.data import watch_memory

EPOCHS = 3
MAX_LENGTH = 512


def ledger(args: argparse.Namespace) -> None:
    """Each count in a process of its own."""
    print("| records | s of CPU | ms per record | MB above the process | of it the schedule of an epoch | MB of file |")
    print("|---|---|---|---|---|---|", flush=True)
    context = multiprocessing.get_context("spawn")
    for count in args.counts:
        with context.Pool(1) as pool:
            schedule_mb = pool.apply(schedule_memory, (args.records, count))
        with context.Pool(1) as pool, tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
            seconds, megabytes, num_bytes = pool.apply(write_one, (args.records, count, scratch))
        cells = f"{seconds:,.1f} | {1000 * seconds / count:.3f} | {megabytes:.0f} | {schedule_mb:.0f}"
        print(f"| {count:,} | {cells} | {num_bytes / 1e6:.1f} |", flush=True)


def numbered_split(source: str, count: int) -> Any:
    """A split of so many records, each a packaged one with a claim number of its own."""
    import numpy as np

    from lit_phi2.data.records import ReadOptions, Record, read_records
    from lit_phi2.data.splits import Split
    from lit_phi2.utils.sequences import LazySequence

    records, _ = read_records([source], ReadOptions(), needs_response=True)

    class Numbered(LazySequence[Record]):
        def __len__(self) -> int:
            return count

        def get(self, index: int) -> Record:
            record = records[index % len(records)]
            texts = f"{record.instruction} Claim {index}.", record.input, record.response
            return Record(f"c-{index}", *texts, f"many.jsonl:{index + 1}")

    lengths = np.random.default_rng(0).integers(60, 400, count, dtype=np.int32)
    hashes = np.zeros(0, np.uint64)
    truncated = np.zeros(count, np.int32)
    return Split(["many.jsonl"], [], Numbered(), lengths, lengths // 2, hashes, hashes, truncated, "")


def write_one(source: str, count: int, scratch: str) -> tuple[float, float, int]:
    """Seconds of CPU, MB above what was held before, bytes of the file."""
    import pyarrow.parquet  # type: ignore[import-untyped]  # noqa: F401  # its import is no part of the ledger

    from lit_phi2.audit.ledger import StepsTaken, write_ledger
    from lit_phi2.data.schedule import BatchingConfig, num_batches, num_rows

    split, batching = numbered_split(source, count), BatchingConfig(MAX_LENGTH)
    steps_per_epoch = num_batches(num_rows(split.lengths, batching), batching)
    file = Path(scratch) / "ledger.parquet"
    began = time.process_time()
    with watch_memory() as measured:
        write_ledger(
            file, {"train": split}, "00" * 32, StepsTaken(batching, 0, EPOCHS * steps_per_epoch, steps_per_epoch)
        )
    return time.process_time() - began, measured["gib"] * 2**30 / 1e6, file.stat().st_size


def schedule_memory(source: str, count: int) -> float:
    """MB of the schedule of an epoch, which training holds too."""
    from lit_phi2.data.schedule import BatchingConfig, training_schedule

    split = numbered_split(source, count)
    with watch_memory() as measured:
        schedule = training_schedule(split.lengths, split.supervised, BatchingConfig(MAX_LENGTH), seed=0, epoch=1)
        time.sleep(0.1)
        assert len(schedule)
    return measured["gib"] * 2**30 / 1e6
