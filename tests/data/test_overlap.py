"""Overlap: what train, val and test share is counted, in memory and from a cache, and a file is read once."""

import logging
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lit_phi2.data import cache
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.overlap import num_shared

Claims = Callable[..., ClaimsDataModule]
WriteJsonl = Callable[..., Path]


@pytest.fixture(params=["in memory", "cached"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs a test with small and with large files."""
    monkeypatch.chdir(tmp_path)
    if request.param == "cached":
        monkeypatch.setattr(cache, "MAX_IN_MEMORY_BYTES", -1)


def row(number: int, record_id: str = "", secret: str = "") -> dict[str, str]:
    record = {"instruction": f"Claim {number}{secret}?", "response": f"Answer {number}."}
    return record | ({"id": record_id} if record_id else {})


def warnings_of(data: ClaimsDataModule, stage: str = "fit") -> list[str]:
    return data.read(stage)


# Files


@pytest.mark.usefixtures("storage")
def test_a_file_given_twice_is_read_once_with_a_warning(
    claims: Claims, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    """By a link and by another spelling; without ids in the file, the records would have counted three times."""
    file = write_jsonl([row(number) for number in range(5)], "a.jsonl")
    (tmp_path / "link.jsonl").symlink_to(file)
    data = claims(val_files=[row(9)])
    data.files["train"] = [str(file), "link.jsonl", "./a.jsonl"]
    assert warnings_of(data) == [
        f"data.train_files: 2 of 3 files are given twice, and read once: link.jsonl is {file}, ./a.jsonl is {file}."
    ]
    assert data.splits["train"].sources == [str(file)]
    assert [example.id for example in data.splits["train"].examples] == [f"a.jsonl:{line}" for line in range(1, 6)]


@pytest.mark.usefixtures("storage")
def test_the_same_file_as_train_and_val_is_one_warning(
    claims: Claims, write_jsonl: WriteJsonl, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_jsonl([row(number, f"c{number}") for number in range(5)], "a.jsonl")
    (tmp_path / "val.jsonl").symlink_to(file)
    data = claims(train_files=str(file), val_files="val.jsonl")
    with caplog.at_level(logging.WARNING, logger="lit_phi2"):
        data.setup("fit")
    assert caplog.messages == [
        "data.val_files shares with data.train_files: 1 of its 1 files (val.jsonl), 5 of its 5 prompts, 5 of its 5 "
        "ids. The val metrics then measure records that the model was trained on; remove them from one of the two."
    ]
    caplog.clear()
    data.setup("fit")  # Lightning calls it again
    assert caplog.messages == []


# Prompts and ids


@pytest.mark.usefixtures("storage")
def test_equal_prompts_in_train_and_val_are_counted(claims: Claims) -> None:
    """Claims 3 and 4 are in both, 4 twice in val; another input section is another prompt. No text is printed."""
    train = [row(number, f"t{number}", "SECRET") for number in range(5)]
    val = [row(number, f"v{index}", "SECRET") for index, number in enumerate([3, 4, 4, 8, 9])]
    val.append({**row(0, "v5", "SECRET"), "input": "Code 97"})
    (warning,) = warnings_of(claims(train_files=train, val_files=val))
    assert warning.startswith("data.val_files shares with data.train_files: 3 of its 6 prompts. The val metrics then ")
    assert "SECRET" not in warning


@pytest.mark.usefixtures("storage")
def test_ids_used_in_train_and_val_are_counted(claims: Claims) -> None:
    train = [row(number, f"c{number}") for number in range(5)]
    val = [row(10 + number, f"c{number}") for number in range(3, 7)]
    assert warnings_of(claims(train_files=train, val_files=val)) == [
        "data.val_files shares with data.train_files: 2 of its 4 ids. An id should name one record."
    ]


@pytest.mark.usefixtures("storage")
def test_default_ids_of_equal_file_names_are_no_overlap(claims: Claims, tmp_path: Path) -> None:
    """Both files are part.jsonl, and their records have the ids part.jsonl:1 and so on."""
    for folder, number in (("train", 0), ("val", 50)):
        (tmp_path / folder).mkdir()
        lines = [f'{{"instruction": "Claim {number + n}?", "response": "So."}}\n' for n in range(3)]
        (tmp_path / folder / "part.jsonl").write_text("".join(lines))
    data = claims(train_files="train/part.jsonl", val_files="val/part.jsonl")
    assert warnings_of(data) == []
    assert data.splits["train"].examples[0].id == data.splits["val"].examples[0].id == "part.jsonl:1"


@pytest.mark.usefixtures("storage")
def test_a_hold_out_has_no_overlap(claims: Claims) -> None:
    """Each prompt has three responses, which stay together."""
    data = claims(train_files=[row(n, f"{n}{s}") for n in range(60) for s in "abc"], val_fraction=0.3)
    assert warnings_of(data) == []
    assert len(data.splits["val"].examples) > 0


def test_the_packaged_claims_give_no_warning(phi_dir: Path) -> None:
    data = ClaimsDataModule(base=str(phi_dir))
    warnings = warnings_of(data) + warnings_of(data, "test")
    assert [warning for warning in warnings if "shortened" not in warning] == []
    assert [len(split.examples) for split in data.splits.values()] == [4378, 412, 436]


def test_test_is_compared_with_train_and_val(claims: Claims) -> None:
    """Trained in the same process, and again as the test subcommand does, which reads train_files for a baseline."""
    rows = {f"{name}_files": [row(n, f"{name}{n}") for n in range(3)] for name in ("train", "test")}
    data = claims(**rows, val_files=[row(2, "v"), row(9, "w")])
    assert len(data.read("fit")) == 1
    assert [warning.partition(". ")[0] for warning in data.read("test")] == [
        "data.test_files shares with data.train_files: 3 of its 3 prompts",
        "data.test_files shares with data.val_files: 1 of its 3 prompts",
    ]


def test_the_baseline_of_test_counts_prompts_of_train(claims: Claims, caplog: pytest.LogCaptureFixture) -> None:
    data = claims(train_files=[row(n) for n in range(9)], test_files=[row(n) for n in range(7, 12)])
    data.setup("test")
    with caplog.at_level(logging.WARNING, logger="lit_phi2"):
        assert len(data.training_records()) == 9
    assert caplog.messages == [
        "data.test_files shares with data.train_files: 2 of its 5 prompts. The test metrics then measure records that "
        "the model was trained on; remove them from one of the two."
    ]


def test_shared_hashes_are_counted_over_a_million() -> None:
    """Reference: a Python set. More hashes than are compared at once."""
    generator = np.random.default_rng(0)
    others = generator.integers(1, 2**64, size=2**20 + 1000, dtype=np.uint64)
    values = np.concatenate([others[-10:], others[:5], others[:2], generator.integers(1, 2**64, 50, dtype=np.uint64)])
    values = np.array(random.Random(0).sample([*values.tolist(), 0, 0], len(values) + 2), np.uint64)
    known = {*others.tolist()}
    assert num_shared(values, np.append(others, np.uint64(0))) == sum(value in known for value in values.tolist()) == 17
    assert num_shared(values[:0], others) == num_shared(values, others[:0]) == 0
