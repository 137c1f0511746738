"""Cache: large files give the same examples from disk as from memory, written once, completely or not at all."""

import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from lit_phi2.data import cache, load_split
from lit_phi2.data.cache import load_or_build_cache
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.records import InvalidRecord, Record
from lit_phi2.data.splits import Split
from lit_phi2.errors import InputError
from lit_phi2.types import Example

NewData = Callable[..., ClaimsDataModule]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every file as a large one."""
    monkeypatch.setattr(cache, "MAX_IN_MEMORY_BYTES", -1)


@pytest.fixture
def new_data(phi_dir: Path, tmp_path: Path) -> NewData:
    """Builds a data module on claims.jsonl with a cache in tmp_path."""

    def build(**options: object) -> ClaimsDataModule:
        defaults: dict[str, object] = {f"{name}_files": str(tmp_path / "claims.jsonl") for name in ("train", "test")}
        defaults |= {"predict_files": str(tmp_path / "claims.jsonl"), "val_files": None}
        defaults |= {"base": str(phi_dir), "cache_dir": str(tmp_path / "cache"), "on_bad_record": "skip"}
        return ClaimsDataModule(**(defaults | options))

    return build


def write_claims(folder: Path, count: int = 2500) -> Path:
    """Records of different lengths, some overlong, some invalid, with non-ASCII letters, facts and categories."""
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


def cache_folders(cache_dir: Path) -> list[Path]:
    return sorted(path for path in cache_dir.iterdir() if path.is_dir())


# The same examples


@pytest.mark.parametrize("on_overlong", ["truncate", "skip"])
@pytest.mark.parametrize("stage", ["fit", "test", "predict"])
def test_cached_splits_equal_those_in_memory(
    stage: str, on_overlong: str, new_data: NewData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_claims(tmp_path)
    in_memory = new_data(on_overlong=on_overlong)
    in_memory.setup(stage)
    assert not (tmp_path / "cache").exists()  # small files are not stored
    monkeypatch.setattr(cache, "MAX_IN_MEMORY_BYTES", -1)
    cached = new_data(on_overlong=on_overlong)
    cached.setup(stage)
    assert len(cache_folders(tmp_path / "cache")) == len(in_memory.splits)
    assert {name: content(split) for name, split in cached.splits.items()} == {
        name: content(split) for name, split in in_memory.splits.items()
    }
    first = next(iter(in_memory.splits.values()))
    assert first.invalid
    assert first.truncated if on_overlong == "truncate" else first.skipped


@pytest.mark.usefixtures("large")
def test_cached_items_can_be_indexed_and_sliced(new_data: NewData, tmp_path: Path) -> None:
    write_claims(tmp_path)
    data = new_data()
    data.setup("predict")
    examples = data.splits["predict"].examples
    items = list(examples)
    assert len(items) == len(examples) > 2000
    assert examples[-1] == items[-1]
    assert examples[995:1005] == items[995:1005]
    with pytest.raises(IndexError):
        examples[len(items)]


@pytest.mark.usefixtures("large")
def test_prompt_batches_contain_every_prompt_once(new_data: NewData, tmp_path: Path) -> None:
    write_claims(tmp_path)
    data = new_data()
    data.setup("predict")
    batches = data.prompt_batches("predict")
    prompts = {index: prompt for batch in batches for index, prompt in zip(batch.indices, batch.prompts, strict=True)}
    assert prompts == {index: example.ids for index, example in enumerate(data.splits["predict"].examples)}
    lengths = [len(prompt) for batch in batches for prompt in batch.prompts]
    assert lengths == sorted(lengths, reverse=True)


# Written once


@pytest.mark.usefixtures("large")
def test_the_second_setup_reads_only_the_cache(
    new_data: NewData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_claims(tmp_path)
    first, second = new_data(), new_data()
    first.setup("fit")

    def refuse(*_: object, **__: object) -> Iterator[object]:
        raise AssertionError("read again")

    monkeypatch.setattr(load_split, "iter_records", refuse)
    second.setup("fit")
    assert content(second.splits["train"]) == content(first.splits["train"])  # with the records that were left out


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    "changed",
    [
        {"max_length": 300},
        {"on_overlong": "skip"},
        {"val_fraction": 0.2},
        {"response_field": "category"},
        {"turns": "last"},
        {"encoding": "utf-8"},
        {"train_files": ["claims:train[:50]", "claims.jsonl"]},
    ],
)
def test_everything_that_decides_the_examples_is_in_the_key(
    changed: dict[str, object], new_data: NewData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_claims(tmp_path, 300)
    new_data().setup("fit")
    before = cache_folders(tmp_path / "cache")
    data = new_data(**changed)
    data.setup("fit")
    assert len(cache_folders(tmp_path / "cache")) == 2 * len(before)


@pytest.mark.usefixtures("large")
def test_a_changed_file_of_equal_size_and_mtime_is_read_again(new_data: NewData, tmp_path: Path) -> None:
    file = write_claims(tmp_path, 300)
    data = new_data()
    data.setup("predict")
    before = file.stat()
    file.write_text(file.read_text("utf-8").replace("claim 9 ", "claim 8 "), "utf-8")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    changed = new_data()
    changed.setup("predict")
    assert changed.splits["predict"].digest != data.splits["predict"].digest


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Functions replace the hub client: a dataset of one record at a revision; None means that there is no network."""
    state: dict[str, str | None] = {"sha": "a1"}
    monkeypatch.setattr("lit_phi2.data.sources._revisions", {})

    def dataset_info(self: object, repo_id: str, **_: object) -> SimpleNamespace:
        if state["sha"] is None:
            raise ConnectionError("no route")
        return SimpleNamespace(sha=state["sha"])

    def load_dataset(path: str, revision: str | None, **_: object) -> Iterator[dict[str, str]]:
        if state["sha"] is None:
            raise ConnectionError("no route")
        return iter([{"id": "h", "instruction": "Why?", "response": f"At {revision or state['sha']}."}])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


@pytest.mark.usefixtures("large")
def test_a_hub_dataset_is_read_again_when_it_changes(
    hub: dict[str, str | None], new_data: NewData, tmp_path: Path
) -> None:
    """Beside a large file, which is why it is cached; without a network, the revision that was cached last is read."""
    files = ["hub:acme/claims", str(write_claims(tmp_path, 300))]

    def first_response() -> str:
        data = new_data(predict_files=files)
        data.setup("predict")
        return data.splits["predict"].records[0].response

    assert first_response() == "At a1."
    hub["sha"] = "b2"
    assert first_response() == "At b2."
    assert len(cache_folders(tmp_path / "cache")) == 2
    hub["sha"] = None
    assert first_response() == "At b2."
    with pytest.raises(InputError, match=r"hub:acme/claims: .*ConnectionError"):
        new_data(predict_files=files, max_new_tokens=300).setup("predict")  # another limit, which is not cached


@pytest.mark.usefixtures("large")
def test_the_rows_of_a_hub_dataset_are_those_of_its_key(
    hub: dict[str, str | None], new_data: NewData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody changes the dataset after its revision is asked for, and before its rows are read."""

    def dataset_info(self: object, repo_id: str, **_: object) -> SimpleNamespace:
        hub["sha"] = "b2"
        return SimpleNamespace(sha="a1")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    data = new_data(predict_files=["hub:acme/claims", str(write_claims(tmp_path, 300))])
    data.setup("predict")
    assert data.splits["predict"].records[0].response == "At a1."


@pytest.mark.parametrize(("name", "large"), [("a.jsonl", False), ("a.jsonl.gz", True), ("A.JSONL.ZST", True)])
def test_a_compressed_file_counts_as_its_text(name: str, large: bool, tmp_path: Path) -> None:
    """20 MiB on disk; compressed, they hold about 100 MiB of text."""
    with (tmp_path / name).open("wb") as file:
        file.truncate(20 * 2**20)
    assert cache.is_large([str(tmp_path / name)]) is large


# Complete or not at all


def build_slowly(cache_dir: Path, log: Path, pause: float) -> Split:
    """Build a cache of 2,500 examples; after 1,500 of them, write a line to the log and sleep."""

    def source(invalid: list[InvalidRecord], forms: dict[str, str]) -> Iterator[tuple[Record, Example]]:
        for number in range(2500):
            if number == 1500:
                with log.open("a") as lines:
                    lines.write("builds\n")
                time.sleep(pause)
            yield Record(f"r{number}", "Why?", "", "So.", f"r.jsonl:{number + 1}"), Example(f"r{number}", [1, 2], 1)

    split = load_or_build_cache(["r.jsonl"], source, skip=False, cache_dir=cache_dir, key={"file": "r.jsonl"})
    with log.open("a") as lines:
        lines.write(split.digest + "\n")
    return split


def start(cache_dir: Path, log: Path, pause: float) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=build_slowly, args=(cache_dir, log, pause))
    process.start()
    return process


def wait_for_line(log: Path) -> None:
    while not (log.is_file() and log.read_text()):  # pytest limits the time
        time.sleep(0.01)


def test_two_runs_that_start_together_build_one_cache(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = start(tmp_path / "cache", log, 1.0)
    wait_for_line(log)
    second = start(tmp_path / "cache", log, 1.0)
    for process in (first, second):
        process.join()
        assert process.exitcode == 0
    lines = log.read_text().splitlines()
    assert lines.count("builds") == 1
    assert len(lines) == 3
    assert len(set(lines)) == 2  # both have the same digest
    assert len(cache_folders(tmp_path / "cache")) == 1


def test_a_kill_during_the_build_leaves_no_complete_cache(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(tmp_path / "cache", log, 600.0)
    wait_for_line(log)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (partial,) = cache_folders(tmp_path / "cache")
    assert partial.suffix == ".new"
    split = build_slowly(tmp_path / "cache", log, 0.0)  # the lock was released with the process
    assert [example.id for example in split.examples] == [f"r{number}" for number in range(2500)]
    (complete,) = cache_folders(tmp_path / "cache")
    assert sorted(path.name for path in complete.iterdir()) == ["examples.arrow", "key.json", "metadata.json"]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", ["metadata.json", "examples.arrow"])
def test_a_damaged_cache_is_reported_with_its_folder(name: str, new_data: NewData, tmp_path: Path) -> None:
    write_claims(tmp_path, 300)
    new_data().setup("predict")
    (folder,) = cache_folders(tmp_path / "cache")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(
        InputError, match=r"data\.cache_dir: .* is damaged .* Delete it; the next run builds it again"
    ) as error:
        new_data().setup("predict")
    assert str(folder) in str(error.value)


@pytest.mark.usefixtures("large")
def test_a_full_disk_leaves_no_cache(new_data: NewData, tmp_path: Path) -> None:
    """A limit on the size of a file simulates a full disk."""
    write_claims(tmp_path, 2500)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match="File too large") as error:
            new_data().setup("predict")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.filename
    assert not cache_folders(tmp_path / "cache")
    new_data().setup("predict")
