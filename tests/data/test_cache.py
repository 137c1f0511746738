"""What large files become on disk: the same examples as in memory, made once, whole or not at all."""

import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lit_phi2.data import cache as store
from lit_phi2.data import datamodule
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.records import FieldNames, InvalidRecord, Record, read_records
from lit_phi2.data.splits import Split
from lit_phi2.errors import InputError
from lit_phi2.training.callbacks.predictions import PredictionWriter

Make = Callable[..., ClaimsDataModule]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is a large one."""
    monkeypatch.setattr(datamodule, "IN_MEMORY", -1)


@pytest.fixture
def make(phi_dir: Path, tmp_path: Path) -> Make:
    def build(**options: object) -> ClaimsDataModule:
        files = {f"{use}_files": str(tmp_path / "claims.jsonl") for use in ("train", "test", "predict")}
        cache = str(tmp_path / "cache")
        return ClaimsDataModule(
            **{
                "base": str(phi_dir),
                "cache_dir": cache,
                "val_files": None,
                "on_bad_record": "skip",
                **files,
                **options,
            }
        )

    return build


def write(folder: Path, count: int = 2500) -> Path:
    """Records of uneven lengths, some too long, some bad, with letters beyond ASCII, facts and categories."""
    file = folder / "claims.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            record: dict[str, object] = {
                "id": f"q{number}",
                "instruction": f"Why was claim {number} denied? " * (1 + number % 7),
                "input": "médical record " * (number % 11 == 0) * (number % 400),
                "response": f"Because of §{number}.",
                "category": "appeals",
                "facts": [{"text": f"§{number}", "kind": "known"}],
            }
            if number % 97 == 5:
                del record["response"]
            if number % 101 == 7:
                del record["instruction"]
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    return file


def content(split: Split) -> tuple[object, ...]:
    return (
        list(split.examples),
        list(split.records),
        split.lengths.tolist(),
        split.supervised.tolist(),
        split.digest,
        split.truncated,
        split.invalid,
        split.skipped,
    )


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


# The same as in memory


@pytest.mark.parametrize("on_overlong", ["truncate", "skip"])
@pytest.mark.parametrize("stage", ["fit", "test", "predict"])
def test_on_disk_is_what_is_in_memory(
    stage: str, on_overlong: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    held = make(on_overlong=on_overlong)
    held.setup(stage)
    assert not (tmp_path / "cache").exists()  # of small files nothing is written
    monkeypatch.setattr(datamodule, "IN_MEMORY", -1)
    mapped = make(on_overlong=on_overlong)
    mapped.setup(stage)
    assert len(folders(tmp_path / "cache")) == len(held.splits)
    assert {use: content(split) for use, split in mapped.splits.items()} == {
        use: content(split) for use, split in held.splits.items()
    }
    first = next(iter(held.splits.values()))
    assert first.invalid
    assert first.truncated if on_overlong == "truncate" else first.skipped


@pytest.mark.usefixtures("large")
def test_items_are_found_by_index_and_slice(make: Make, tmp_path: Path) -> None:
    write(tmp_path)
    data = make()
    data.setup("predict")
    examples = data.splits["predict"].examples
    whole = list(examples)
    assert len(whole) == len(examples) > 2000
    assert examples[-1] == whole[-1]
    assert examples[995:1005] == whole[995:1005]
    with pytest.raises(IndexError):
        examples[len(whole)]


@pytest.mark.usefixtures("large")
def test_prompt_batches_hold_every_prompt_once(make: Make, tmp_path: Path) -> None:
    write(tmp_path)
    data = make()
    data.setup("predict")
    batches = data.prompt_batches("predict")
    found = {index: prompt for batch in batches for index, prompt in zip(batch.indices, batch.prompts, strict=True)}
    assert found == {index: example.ids for index, example in enumerate(data.splits["predict"].examples)}
    lengths = [len(prompt) for batch in batches for prompt in batch.prompts]
    assert lengths == sorted(lengths)


# Made once


@pytest.mark.usefixtures("large")
def test_the_second_time_nothing_is_tokenized(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    first, second = make(), make()
    first.setup("fit")

    def refuse(*_: object, **__: object) -> Iterator[object]:
        raise AssertionError("read again")

    monkeypatch.setattr(datamodule, "each_record", refuse)
    second.setup("fit")
    assert content(second.splits["train"]) == content(first.splits["train"])  # and what was left out is told again


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    "changed",
    [
        {"max_length": 300},
        {"on_overlong": "skip"},
        {"val_fraction": 0.2},
        {"response_field": "category"},
        {"train_files": ["claims:train[:50]", "claims.jsonl"]},
    ],
)
def test_what_decides_the_examples_is_in_the_key(
    changed: dict[str, object], make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, 300)
    make().setup("fit")
    before = folders(tmp_path / "cache")
    data = make(**changed)
    data.setup("fit")
    assert len(folders(tmp_path / "cache")) == 2 * len(before)


@pytest.mark.usefixtures("large")
def test_a_file_that_changed_is_read_again_though_size_and_time_are_the_same(make: Make, tmp_path: Path) -> None:
    file = write(tmp_path, 300)
    data = make()
    data.setup("predict")
    before = file.stat()
    file.write_text(file.read_text("utf-8").replace("claim 9 ", "claim 8 "), "utf-8")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    again = make()
    again.setup("predict")
    assert again.splits["predict"].digest != data.splits["predict"].digest


# Whole or not at all


def build_slowly(make_data: Callable[[], ClaimsDataModule], log: Path, pause: float) -> None:
    """In a process of its own: tells that it writes, and takes its time."""
    write_examples = store._write_examples

    def slow(file: Path, tally: object) -> None:
        with log.open("a") as lines:
            lines.write("writes\n")
        (file.parent / "half").write_text("something")
        time.sleep(pause)
        (file.parent / "half").unlink()
        write_examples(file, tally)  # type: ignore[arg-type]  # as it came

    store._write_examples = slow
    datamodule.MAX_IN_MEMORY_BYTES = -1
    data = make_data()
    data.setup("predict")
    with log.open("a") as lines:
        lines.write(data.splits["predict"].digest + "\n")


def start(make: Make, log: Path, pause: float) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=build_slowly, args=(make, log, pause))
    process.start()
    return process


def wait_for_line(log: Path) -> None:
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_runs_at_once_make_it_once(make: Make, tmp_path: Path) -> None:
    write(tmp_path, 300)
    log = tmp_path / "log"
    first = start(make, log, 1.0)
    wait_for_line(log)
    second = start(make, log, 1.0)
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0
    lines = log.read_text().splitlines()
    assert lines.count("writes") == 1
    assert len(set(lines)) == 2  # both have the same digest
    assert len(folders(tmp_path / "cache")) == 1


@pytest.mark.usefixtures("large")
def test_a_kill_while_it_is_written_leaves_nothing_that_looks_whole(make: Make, tmp_path: Path) -> None:
    write(tmp_path, 300)
    log = tmp_path / "log"
    process = start(make, log, 60.0)
    wait_for_line(log)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    (half,) = folders(tmp_path / "cache")
    assert half.suffix == ".new"
    data = make()
    data.setup("predict")  # the lock went with the process
    assert len(data.splits["predict"].examples) > 200
    (whole,) = folders(tmp_path / "cache")
    assert sorted(path.name for path in whole.iterdir()) == ["metadata.json", "examples.arrow"]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", ["metadata.json", "examples.arrow"])
def test_damage_is_told_with_the_folder_to_remove(name: str, make: Make, tmp_path: Path) -> None:
    write(tmp_path, 300)
    make().setup("predict")
    (folder,) = folders(tmp_path / "cache")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"data\.cache_dir: .* is damaged .* Remove it; it will be made anew") as error:
        make().setup("predict")
    assert str(folder) in str(error.value)


@pytest.mark.usefixtures("large")
def test_a_full_disk_leaves_no_cache_behind(make: Make, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk."""
    write(tmp_path, 2500)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match="File too large") as error:
            make().setup("predict")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.filename
    assert not folders(tmp_path / "cache")
    make().setup("predict")


# Ids


def test_an_id_that_was_used_is_told_with_its_first_place_however_many_lie_between(tmp_path: Path) -> None:
    """Reference: a dict. Two files, many batches, places with and without a column."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.json"
    numbers = np.random.default_rng(0).integers(0, 9000, 12_000).tolist()
    rows = [{"id": f"c{number}", "instruction": "Why?", "response": "So."} for number in numbers]
    one.write_text("".join(json.dumps(row) + "\n" for row in rows[:9000]))
    two.write_text(json.dumps(rows[9000:]))  # all on one line
    records, faults = read_records([str(one), str(two)], FieldNames(), needs_response=True)
    places: dict[str, str] = {}
    expected: list[str] = []
    positions = [f"{one}:{line}" for line in range(1, 9001)]
    column = 2
    for number, row in enumerate(rows[9000:]):
        positions.append(f"{two}:1" if number == 0 else f"{two}:1:{column}")
        column += len(json.dumps(row)) + 2
    for row, place in zip(rows, positions, strict=True):
        if row["id"] in places:
            expected.append(f"{place}: id {row['id']!r} was already used at {places[row['id']]}; ids must be unique.")
        else:
            places[row["id"]] = place
    assert [str(fault) for fault in faults] == expected
    assert [record.location for record in records] == list(places.values())
    assert all(isinstance(one, Record) for one in records)
    assert all(isinstance(one, InvalidRecord) for one in faults)


# Predictions


def test_answers_of_several_parts_are_sorted_and_written_once(tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    writer = PredictionWriter(file, {"model": "m"})
    for part, indices in (("", [5, 0, 3]), ("1", [1, 3, 4]), ("2", [2])):
        lines = [json.dumps({"index": index, "id": f"r{index}", "finish_reason": "length"}) for index in indices]
        (tmp_path / f"predictions.jsonl.part{part}").write_text(writer.header + "".join(line + "\n" for line in lines))
    assert sorted(set(writer.read_completed().tolist())) == [0, 1, 2, 3, 4, 5]
    writer.finish()
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == [f"r{index}" for index in range(6)]
    assert (writer.written, writer.cut) == (6, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]
