"""Data: speed of tokenizing, and time and memory of reading many records.

    encoding    records/s of lit_phi2's encode, beside encode_batch of `tokenizers` on the same strings
    scale       a file of n records -> read and tokenized -> opened again -> an epoch scheduled

Memory is what a process holds itself (RssAnon), above what it held before. Pages of a mapped file are not counted: the
system takes them back when it needs them.
"""

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from timers import anonymous_gib

MAX_LENGTH = 1024  # tokens in an example, and in a packed row
NUM_ENCODED = 4000  # records


def encoding(args: argparse.Namespace) -> None:
    """Alternating rounds of both."""
    from tokenizers import Tokenizer

    from lit_phi2.data.encode import encode
    from lit_phi2.data.prompts import format_prompt
    from lit_phi2.data.records import ReadOptions, read_records
    from lit_phi2.pretrained import load_tokenizer, resolve_base_model

    base = resolve_base_model(args.base)
    records, _ = read_records([args.records], ReadOptions(), needs_response=True)
    records = (records * (1 + NUM_ENCODED // len(records)))[:NUM_ENCODED]
    strings = [text for r in records for text in (format_prompt(r.instruction, r.input), r.response)]
    rust_tokenizer, tokenizer = Tokenizer.from_file(str(base.folder / "tokenizer.json")), load_tokenizer(base)
    ratios = []
    for _ in range(args.rounds):
        began = time.perf_counter()
        encodings = rust_tokenizer.encode_batch(strings, add_special_tokens=False)
        batch_seconds = time.perf_counter() - began
        began = time.perf_counter()
        encoded = encode(records, tokenizer, max_length=10**6)
        encode_seconds = time.perf_counter() - began
        assert sum(len(encoding) for encoding in encodings) == sum(len(e.ids) - 1 for e in encoded.examples)
        ratios.append(batch_seconds / encode_seconds)
        print(
            f"encode_batch {len(records) / batch_seconds:,.0f} records/s, encode "
            f"{len(records) / encode_seconds:,.0f}: {ratios[-1]:.2f} of it",
            flush=True,
        )
    print(f"median {median(ratios):.2f}")


def scale(args: argparse.Namespace) -> None:
    """The records of --records, repeated and numbered; each count in a process of its own."""
    print("| records | GB of file | GB of cache | read and tokenized, s | memory, GiB | opened again, s | memory, GiB "
          "| epoch scheduled, s | memory, GiB | its middle micro-batch, ms |")  # fmt: skip
    print("|---" * 10 + "|")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        for count in args.counts:
            file = Path(scratch) / f"{count}.{args.format}"
            write_records(file, args.records, count)
            cells = [f"{count:,}", f"{file.stat().st_size / 1e9:.2f}"]
            for opened_again in (False, True):
                with context.Pool(1) as pool:
                    measured = pool.apply(set_up_split, (str(file), args.base, scratch))
                cells += [] if opened_again else [f"{measured['cache_bytes'] / 1e9:.2f}"]
                cells += [f"{measured['seconds']:.1f}", f"{measured['gib']:.2f}"]
            lengths = measured["lengths"]
            with context.Pool(1) as pool:
                cells += pool.apply(schedule_epoch, (lengths, count))
            print("| " + " | ".join(cells) + " |", flush=True)
            file.unlink()
        with context.Pool(1) as pool:
            cells = [f"{args.schedule_only:,}", *["-"] * 6, *pool.apply(schedule_epoch, (lengths, args.schedule_only))]
        print("| " + " | ".join(cells) + " |")


def write_records(file: Path, source: str, count: int) -> None:
    """Records with an id and a claim number of their own, so that every prompt differs."""
    import pyarrow as pa  # type: ignore[import-untyped]  # it has no types
    from pyarrow import parquet

    from lit_phi2.data.records import ReadOptions, read_records
    from lit_phi2.utils.sequences import batched

    records, _ = read_records([source], ReadOptions(), needs_response=True)
    numbered = (
        {
            "id": f"record {number}",
            "instruction": f"{records[number % len(records)].instruction} Claim {number}.",
            "input": records[number % len(records)].input,
            "response": records[number % len(records)].response,
        }
        for number in range(count)
    )
    if file.suffix == ".jsonl":
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in numbered)
        return
    schema = pa.schema([(name, pa.string()) for name in ("id", "instruction", "input", "response")])
    with parquet.ParquetWriter(file, schema) as writer:
        for batch in batched(numbered, 1000):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))


def set_up_split(file: str, base: str, scratch: str) -> dict[str, Any]:
    """What fit does with its files before it loads a model."""
    from lit_phi2.data.datamodule import ClaimsDataModule

    cache_dir = Path(scratch) / "cache"
    data = ClaimsDataModule(
        train_files=file, base=base, max_length=MAX_LENGTH, on_overlong="skip", cache_dir=str(cache_dir)
    )
    with watch_memory() as measured:
        data.setup("fit")
        examples = data.splits["train"].examples
        assert examples[len(examples) // 2].ids
    folders = [folder for folder in cache_dir.glob("*") if folder.is_dir()]
    cache_bytes = max((sum(part.stat().st_size for part in folder.iterdir()) for folder in folders), default=0)
    return {**measured, "cache_bytes": cache_bytes, "lengths": data.splits["train"].lengths[:100_000]}


def schedule_epoch(lengths: Any, count: int) -> list[str]:
    """An epoch of `count` examples, whose lengths are drawn from these; three cells of the table."""
    import numpy as np

    from lit_phi2.data.schedule import BatchingConfig, training_schedule

    drawn = np.random.default_rng(0).choice(lengths, count)
    with watch_memory() as measured:
        schedule = training_schedule(drawn, drawn // 2, BatchingConfig(MAX_LENGTH, accumulate=8), seed=0, epoch=1)
    began = time.perf_counter()
    assert schedule[len(schedule) // 2].rows
    milliseconds = 1000 * (time.perf_counter() - began)
    return [f"{measured['seconds']:.1f}", f"{measured['gib']:.2f}", f"{milliseconds:.1f}"]


@contextmanager
def watch_memory() -> Iterator[dict[str, float]]:
    """Fills in the seconds, and the most GiB held at one time above what was held before."""
    measured, done = {"seconds": 0.0, "gib": 0.0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            measured["gib"] = max(measured["gib"], anonymous_gib() - before)

    before, began = anonymous_gib(), time.perf_counter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield measured
    finally:
        measured["seconds"] = time.perf_counter() - began
        done.set()
        watcher.join()
