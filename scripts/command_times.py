"""Command times: seconds of every command on the packaged claims, and how what reads all records grows with them.

    every command, one after the other, on tiny.yaml  ->  seconds of CPU, seconds by the clock
    1,000 / 10,000 / 100,000 records                  ->  of inspect, redaction, ledger, verify, duplicates

    python scripts/command_times.py                      # both tables
    python scripts/command_times.py --table growth --counts 1000 10000 100000

Seconds of CPU are those of one thread and its children, so they compare on a machine that others keep busy. The records
are packaged ones, each with a claim number of its own; those among which duplicates are searched have their words in an
order of their own as well, because copies that differ in a number are all duplicates of each other.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measurement import origin

RUN = "runs/tiny/version_0"
CONFIG = ["--config", "tiny.yaml"]
WITH_RUN = ["--config", f"{RUN}/config.yaml", "--ckpt_path", RUN]
COMMANDS: dict[str, list[str]] = {
    "inspect": ["inspect", *CONFIG],
    "inspect, data.redact all": ["inspect", *CONFIG, "--data.redact", "all"],
    "fit, ledger and report included": ["fit", *CONFIG],
    "validate": ["validate", *WITH_RUN],
    "test": ["test", *WITH_RUN],
    "predict, 30 records": ["predict", *WITH_RUN],
    "verify": ["verify", *WITH_RUN],
    "verify --record": ["verify", *WITH_RUN, "--record", "claims:train"],
    "audit --what records": ["audit", *WITH_RUN, "--what", "records"],
    "audit --what leakage": ["audit", *WITH_RUN, "--what", "leakage"],
    "export peft": ["export", *WITH_RUN, "--output_dir", "export"],
}
SALT = "00" * 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=["commands", "growth", "both"], default="both")
    parser.add_argument("--records", default="claims:train", help="as data.train_files")
    parser.add_argument("--counts", type=int, nargs="+", default=(10**3, 10**4, 10**5), help="of records")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="of the table growth")
    parser.add_argument("--fit", nargs="*", default=[], help="more arguments of fit, such as --trainer.max_steps=20")
    args = parser.parse_args()
    print(origin())
    with tempfile.TemporaryDirectory() as folder:
        if args.table != "growth":
            time_commands(Path(folder), args.fit)
        if args.table != "commands":
            time_growth(Path(folder), args.records, args.counts, args.parts)


# Every command


def time_commands(folder: Path, fit_arguments: list[str]) -> None:
    """Each in a process of its own, as a user starts it; those after fit read its run."""
    print("| command | s of CPU | s by the clock | exit code |\n|---|---|---|---|", flush=True)
    for name, arguments in COMMANDS.items():
        command = [sys.executable, "-m", "lit_phi2", *arguments, *(fit_arguments if arguments[0] == "fit" else [])]
        cpu, clock, code = timed_process(command, folder)
        print(f"| {name} | {cpu:.0f} | {clock:.0f} | {code} |", flush=True)


def timed_process(command: list[str], folder: Path) -> tuple[float, float, int]:
    """Seconds of CPU and of the clock, and the exit code."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with (folder / "log").open("wb") as log:
        process = subprocess.run(command, cwd=folder, stdout=log, stderr=log, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - began, process.returncode


# Growth


def time_growth(folder: Path, source: str, counts: list[int], parts: list[str]) -> None:
    """A row for each part, a column for each count."""
    context = multiprocessing.get_context("spawn")
    files = []
    for count in counts:
        files.append(folder / f"{count}.jsonl")
        write_records(files[-1], source, count)
    print(
        "| seconds of CPU | " + " | ".join(f"{count:,}" for count in counts) + " |\n|---" + "|---" * len(counts) + "|"
    )
    for name in parts:
        cells = []
        for file in files:
            with context.Pool(1) as pool:
                cells.append(f"{pool.apply(PARTS[name], (str(file),)):.1f}")
            print(f"  {name}: {' '.join(cells)}", file=sys.stderr, flush=True)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def write_records(file: Path, source: str, count: int) -> None:
    """Packaged records in turn, each with a claim number of its own."""
    from lit_phi2.data.records import ReadOptions, read_records

    records, _ = read_records([source], ReadOptions(), needs_response=True)
    with file.open("w", encoding="utf-8") as plain:
        for number in range(count):
            record = records[number % len(records)]
            row = {"id": f"r-{number}", "instruction": f"{record.instruction} Claim CLM-2024-{number:07d}."}
            row |= {"input": record.input, "response": record.response}
            plain.write(json.dumps(row) + "\n")


def read_rows(file: str) -> Iterator[dict[str, str]]:
    with open(file, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def shuffled(text: str, seed: int) -> str:
    words = text.split()
    random.Random(seed).shuffle(words)
    return " ".join(words)


def inspect(file: str, *more: str) -> float:
    """Of the whole command, which holds out a tenth of the records."""
    settings = ["--data.train_files", file, "--data.val_files", "null", "--data.max_length", "1024", *more]
    command = [sys.executable, "-m", "lit_phi2", "inspect", *CONFIG, *settings]
    with tempfile.TemporaryDirectory() as folder:
        cpu, _, code = timed_process(command, Path(folder))
    if code:
        sys.exit(f"inspect {more}: exit code {code}")
    return cpu


def inspect_redacted(file: str) -> float:
    return inspect(file, "--data.redact", "all")


def redaction(file: str) -> float:
    """Of `redact` alone, every kind."""
    from lit_phi2.audit.redaction import check_kinds, redact

    texts = [[row["instruction"], row["input"], row["response"]] for row in read_rows(file)]
    kinds = check_kinds("all", "data.redact")
    return cpu_seconds(lambda: [redact(each, kinds) for each in texts])


def ledger(file: str) -> float:
    """Of `write_ledger` over three epochs."""
    from profiles.ledger import numbered_split

    split = numbered_split("claims:train", count_of(file))
    return cpu_seconds(lambda: write(split, Path(file).with_suffix(".parquet")))


def write(split: Any, target: Path) -> None:
    """The ledger of a split of which every example is used in three epochs."""
    from lit_phi2.audit.ledger import StepsTaken, write_ledger
    from lit_phi2.data.schedule import BatchingConfig, num_batches, num_rows

    batching = BatchingConfig(512)
    steps = num_batches(num_rows(split.lengths, batching), batching)
    write_ledger(target, {"train": split}, SALT, StepsTaken(batching, 0, 3 * steps, steps))


def duplicates(file: str) -> float:
    """Of the search of `audit --what records`."""
    from lit_phi2.audit.duplicates import near_duplicates

    texts = [
        shuffled(f"{row['instruction']} {row['input']} {row['response']}", number)
        for number, row in enumerate(read_rows(file))
    ]
    return cpu_seconds(lambda: near_duplicates(texts, 0.7))


def look_up_all(file: str) -> float:
    """Of `verify --record` with a file of all records of the ledger."""
    from lit_phi2.audit.ledger import KEY_FILE, LEDGER_FILE
    from lit_phi2.audit.verify import look_up
    from profiles.ledger import numbered_split

    split = numbered_split("claims:train", count_of(file))
    with tempfile.TemporaryDirectory() as folder:
        write(split, Path(folder) / LEDGER_FILE)
        (Path(folder) / KEY_FILE).write_text(json.dumps({"salt": SALT}))
        return cpu_seconds(lambda: sum(1 for _ in look_up(split.records, Path(folder), None)))


def count_of(file: str) -> int:
    return int(Path(file).stem)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


PARTS: dict[str, Callable[[str], float]] = {
    "inspect": inspect,
    "inspect, data.redact all": inspect_redacted,
    "redaction alone": redaction,
    "ledger, three epochs": ledger,
    "verify --record, every record": look_up_all,
    "near duplicates": duplicates,
}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
