"""Caches on disk: inspect lists them, and removes those that no run can use, and nothing else."""

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_phi2.cli.main import main
from lit_phi2.data import cache
from lit_phi2.data.cache_list import list_caches, remove_cache
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.summary import report
from lit_phi2.utils.locks import file_lock

NewData = Callable[..., ClaimsDataModule]


@pytest.fixture
def new_data(phi_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NewData:
    """Builds a data module that takes every file as a large one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache, "MAX_IN_MEMORY_BYTES", -1)

    def build(file: Path, **options: object) -> ClaimsDataModule:
        return ClaimsDataModule(
            **{"predict_files": str(file), "base": str(phi_dir), "cache_dir": str(tmp_path / "cache"), **options}
        )

    return build


def write_records(file: Path, count: int = 20) -> Path:
    rows = [{"id": f"c{n}", "instruction": f"SECRET claim {n}?", "response": "So."} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_cache(new_data: NewData, file: Path) -> Path:
    """The folder of a new cache of a file."""
    before = folders(file.parent / "cache")
    new_data(write_records(file)).setup("predict")
    (folder,) = folders(file.parent / "cache") - before
    return folder


def folders(cache_dir: Path) -> set[Path]:
    return {path for path in cache_dir.glob("*") if path.is_dir()}


def change(file: Path) -> None:
    file.write_text(file.read_text() + '{"id": "new", "instruction": "Why?", "response": "So."}\n')


def write_by_another_version(folder: Path) -> None:
    key = json.loads((folder / "key.json").read_text())
    (folder / "key.json").write_text(json.dumps({**key, "format": 2}))


# Listed


@pytest.mark.parametrize(
    ("age", "reason"),
    [
        (lambda file, folder: None, None),
        (lambda file, folder: change(file), "{file} has changed"),
        (lambda file, folder: file.unlink(), "{file} no longer exists"),
        (lambda file, folder: write_by_another_version(folder), "another version of lit_phi2 wrote it"),
        (lambda file, folder: (folder / "key.json").unlink(), "another version of lit_phi2 wrote it"),
        (lambda file, folder: folder.rename(f"{folder}.new"), "the run that wrote it was killed"),
    ],
)
def test_a_cache_is_unused_once_no_run_can_read_it(
    age: Callable[[Path, Path], None], reason: str | None, new_data: NewData, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    age(file, make_cache(new_data, file))
    (info,) = list_caches(tmp_path / "cache")
    assert info.unused_because == (reason and reason.format(file=file))
    assert info.sources == [str(file)]
    assert info.num_bytes == sum(path.stat().st_size for path in info.folder.iterdir()) > 1000
    assert abs(info.last_used - time.time()) < 3600
    assert remove_cache(info) == (None if reason else "it is used now")
    assert info.folder.exists() == (reason is None)


def test_inspect_lists_caches_and_removes_unused_ones(
    new_data: NewData, tmp_path: Path, capsys: pytest.CaptureFixture[str], phi_dir: Path
) -> None:
    used, unused = (make_cache(new_data, tmp_path / f"{name}.jsonl") for name in ("used", "unused"))
    change(tmp_path / "unused.jsonl")
    os.utime(unused, (10**9, 10**9))
    arguments = ["inspect", "--model.base", str(phi_dir), "--data.cache_dir", str(tmp_path / "cache")]
    arguments += ["--data.train_files", "claims:train[:9]", "--data.val_files", "claims:validation"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines() if line.startswith("  /")}
    assert lines[str(used)].endswith(f"from {tmp_path}/used.jsonl")
    assert "0 MB, used 2001-09-" in lines[str(unused)]
    assert lines[str(unused)].endswith(f"no run uses it: {tmp_path}/unused.jsonl has changed")
    assert "inspect --remove_unused_caches true" in printed
    assert "SECRET" not in printed
    assert main([*arguments, "--remove_unused_caches", "true"]) == 0
    assert "has changed; removed" in capsys.readouterr().out
    assert folders(tmp_path / "cache") >= {used}
    assert unused not in folders(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert main(arguments) == 0
    assert f"caches  {tmp_path}/cache: " in capsys.readouterr().out


def test_other_folders_are_neither_listed_nor_removed(new_data: NewData, tmp_path: Path) -> None:
    folder = make_cache(new_data, tmp_path / "a.jsonl")
    change(tmp_path / "a.jsonl")
    (tmp_path / "cache" / "notes").mkdir()
    (tmp_path / "cache" / "0123456789abcdef").symlink_to(tmp_path)
    (folder / "mine.txt").write_text("kept")
    assert list_caches(tmp_path / "cache") == []
    assert list_caches(tmp_path / "nowhere") == []


# Used


def hold(data: ClaimsDataModule, ready: "multiprocessing.synchronize.Event") -> None:
    data.setup("predict")
    ready.set()
    time.sleep(600)


def test_a_cache_that_a_process_reads_is_not_removed(new_data: NewData, tmp_path: Path) -> None:
    """Its file changes while another process reads the cache; after that process is killed, it can be removed."""
    file = write_records(tmp_path / "a.jsonl")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(new_data(file), ready))
    process.start()
    assert ready.wait(300)
    change(file)
    (info,) = list_caches(tmp_path / "cache")
    assert remove_cache(info) == "a process is reading it"
    process.kill()
    process.join()
    assert remove_cache(info) is None
    assert list((tmp_path / "cache").iterdir()) == []  # nor does a lock remain


def test_a_cache_that_is_being_written_is_not_removed(tmp_path: Path) -> None:
    """The writer holds the lock of the cache, here taken by hand; without it, the folder is what a kill left."""
    folder = tmp_path / "0123456789abcdef.new"
    folder.mkdir()
    with file_lock(tmp_path / "0123456789abcdef.lock", waiting=None):
        (info,) = list_caches(tmp_path)
        assert info.unused_because is None
        assert remove_cache(info) == "a process is writing or opening it"
    (info,) = list_caches(tmp_path)
    assert info.unused_because == "the run that wrote it was killed"
    assert remove_cache(info) is None
    assert list(tmp_path.iterdir()) == []


def test_a_cache_is_released_with_its_split(new_data: NewData, tmp_path: Path) -> None:
    file = write_records(tmp_path / "a.jsonl")
    data = new_data(file)
    data.setup("predict")
    change(file)
    (info,) = list_caches(tmp_path / "cache")
    assert remove_cache(info) == "a process is reading it"
    assert data.splits["predict"].examples[19].id == "c19"
    del data
    assert remove_cache(info) is None


def test_a_cache_in_a_folder_without_locks_is_read(new_data: NewData, tmp_path: Path) -> None:
    """A folder in the place of the lock file makes locking fail, as in a folder that cannot be written."""
    file = tmp_path / "a.jsonl"
    folder = make_cache(new_data, file)
    folder.with_name(f"{folder.name}.lock").mkdir()
    data = new_data(file)
    data.setup("predict")
    assert len(data.splits["predict"].examples) == 20


def test_large_files_are_reported_like_small_ones(
    new_data: NewData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the line about caches: counts, forms, records that were left out."""
    file = write_records(tmp_path / "a.jsonl")
    file.write_text(file.read_text() + "no json\n")
    options = {"train_files": str(file), "val_files": None, "on_bad_record": "skip"}
    large = new_data(file, **options)
    first = report(large, large.read("fit"))
    again = new_data(file, **options)
    assert report(again, again.read("fit")) == first
    monkeypatch.setattr(cache, "MAX_IN_MEMORY_BYTES", 2**26)
    small = new_data(file, **options)
    assert report(small, small.read("fit")) == first
    assert "left out           1 (" in first
