"""Any file of records: no traceback, no hang, and every line is a record or an invalid record with its location.

Hypothesis makes the files from fixed seeds: valid, invalid and truncated lines, in many encodings and formats.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from pyarrow import parquet

from helpers import new_data
from lit_phi2.cli.main import main
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.errors import InputError

NUM_SEEDS = 2  # parts of one test, so that they run in parallel
FILES_PER_SEED = 55

text = st.text(max_size=12)
value = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text, st.lists(text, max_size=2))
valid = st.builds(
    lambda a, b: {"instruction": "Why " + a, "response": "So " + b}, *[st.sampled_from(["x", "y z", "é"])] * 2
)
partial = st.fixed_dictionaries({}, optional=dict.fromkeys(("id", "instruction", "input", "response", "x"), value))
objects = st.one_of(valid, valid, partial).map(lambda row: json.dumps(row).encode())
invalid_lines = st.sampled_from(
    [
        b'{"instruction": "cut',
        b'{"instruction": "a", "instruction": "b", "response": "c"}',
        b"\x00\x00\x00",
        b'{"instruction": "nul \x00", "response": "b"}',
        b'{"instruction": "escape \\u001b[2J", "response": "\\u202e"}',
        b'{"instruction": "half \\ud800", "response": "b"}',
        b"[" * 3000 + b"]" * 3000,
        b'{"response": ' + b'{"a": ' * 2000 + b"1" + b"}" * 2001,
        '{"instruction": "é", "response": "b"}'.encode("latin-1"),
        '{"instruction": "a", "response": "b"}'.encode("utf-16"),
        b"instruction,response",
        b'"a","b"',
        b'"never closed',
        b"null",
        b"1e999",
        b"\xff\xfe",
        b"### Response:",
    ]
)
lines = st.lists(st.one_of(*[objects] * 6, invalid_lines, st.binary(max_size=20)), min_size=0, max_size=6)
endings = st.sampled_from([b"\n", b"\r\n"])
names = st.sampled_from(["f.jsonl", "f.jsonl", "f.jsonl", "f.json", "f.csv", "f.parquet", "f.txt"])


def write_file(folder: Path, name: str, parts: list[bytes], ending: bytes, last: bool) -> Path:
    content = ending.join(parts) + (ending if last else b"")
    if name == "f.json":
        content = b"[" + b",".join(parts) + b"]"
    path = folder / name
    if name == "f.parquet" and len(parts) % 2:  # a valid file, with columns of any type
        texts = [part.decode("latin-1") for part in parts]
        columns: dict[str, Any] = {"instruction": texts, "response": texts[::-1], "id": [None] * len(texts)}
        if len(parts) == 5:
            columns["response"] = list(range(5))
        parquet.write_table(pyarrow.table(columns), path)
        return path
    path.write_bytes(content)
    return path


def run_checked(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Check for exit code 0 or 2, no traceback and no control characters; returns code and output.

    pytest's time limit ends one that hangs.
    """
    capsys.readouterr()
    code = main(arguments)
    printed = "".join(capsys.readouterr())
    assert code in (0, 2), printed
    assert "Traceback" not in printed
    assert len(printed) < 20_000
    assert not [c for c in printed if not c.isprintable() and c not in "\n\t\r"]
    return code, printed


def common_arguments(base: Path, folder: Path) -> list[str]:
    settings_ = {
        "model.base": base,
        "model.max_new_tokens": 2,
        "data.max_length": 128,
        "trainer.default_root_dir": folder / "runs",
        "trainer.max_steps": 1,
        "trainer.limit_val_batches": 0,
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.logger": "false",
    }
    return [f"--{key}={value}" for key, value in settings_.items()]


@pytest.mark.parametrize("file_seed", range(NUM_SEEDS))
def test_generated_files_end_in_a_result_or_a_plain_message(
    file_seed: int, phi_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIT_PHI2_TRACEBACK", raising=False)
    num_exits: dict[int, int] = {}
    common = common_arguments(phi_dir, tmp_path)

    @seed(file_seed)
    @settings(
        max_examples=FILES_PER_SEED,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(name=names, parts=lines, ending=endings, last=st.booleans())
    def check(name: str, parts: list[bytes], ending: bytes, last: bool) -> None:
        path = write_file(tmp_path, name, parts, ending, last)
        train = [*common, f"--data.train_files={path}", f"--data.val_files={path}"]
        policy = "error" if len(parts) % 2 else "skip"
        code, _ = run_checked(["inspect", *train, f"--data.on_bad_record={policy}"], capsys)
        num_exits[code] = num_exits.get(code, 0) + 1
        if sum(num_exits.values()) % 11 == 0:  # a training step takes a second
            run_checked(["fit", *train, "--data.on_bad_record=skip"], capsys)
            files = [f"--data.predict_files={path}", f"--output={tmp_path / 'out.jsonl'}"]
            run_checked(["predict", *common, *files, "--data.on_bad_record=skip"], capsys)
        if name == "f.jsonl":
            check_every_line_is_accounted_for(path, phi_dir)

    check()
    assert sum(num_exits.values()) >= FILES_PER_SEED
    assert min(num_exits[0], num_exits[2]) > 5, f"both usable and unusable files: {num_exits}"


def check_every_line_is_accounted_for(path: Path, base: Path) -> None:
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):  # the byte order marks of UTF-16, which has other line feeds
        return
    expected = [n for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    data: ClaimsDataModule = new_data(base, path, on_bad_record="skip")
    message = ""
    try:
        data.setup("validate")
    except InputError as error:
        message = str(error)
    if message:
        match = re.search(r"none of the (\d+) records", message)
        whole_file = ("is empty", "is not UTF-8", "begins a JSON array")
        assert int(match[1]) == len(expected) if match else any(reason in message for reason in whole_file), message
        return
    split = data.splits["val"]
    locations = [record.location for record in [*split.records, *split.left_out]]
    assert sorted(int(location.rpartition(":")[2]) for location in locations) == expected
    assert all(location.startswith(f"{path}:") for location in locations)


def a_directory(folder: Path) -> Path:
    (folder / "d.jsonl").mkdir()
    return folder / "d.jsonl"


def a_symlink_loop(folder: Path) -> Path:
    os.symlink(folder / "b.jsonl", folder / "a.jsonl")
    os.symlink(folder / "a.jsonl", folder / "b.jsonl")
    return folder / "a.jsonl"


def a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "p.jsonl")
    return folder / "p.jsonl"


def an_empty_parquet(folder: Path) -> Path:
    parquet.write_table(pyarrow.table({"instruction": [], "response": []}), folder / "e.parquet")
    return folder / "e.parquet"


def a_truncated_parquet(folder: Path) -> Path:
    path = folder / "t.parquet"
    parquet.write_table(pyarrow.table({"instruction": ["a"] * 99, "response": ["b"] * 99}), path)
    path.write_bytes(path.read_bytes()[:-20])
    return path


def a_duplicate_column(folder: Path) -> Path:
    (folder / "c.csv").write_text("instruction,response,response\na,b,c\n")
    return folder / "c.csv"


def wrong_columns(folder: Path) -> Path:
    (folder / "w.csv").write_text("question,answer\na,b\n")
    return folder / "w.csv"


def a_line_of_fifty_megabytes(folder: Path) -> Path:
    path = folder / "l.jsonl"
    path.write_text(json.dumps({"instruction": "a", "input": "word " * 10_000_000, "response": "b"}) + "\n")
    return path


def a_name_of_five_megabytes(folder: Path) -> Path:
    path = folder / "n.jsonl"
    path.write_text(json.dumps({"name " * 1_000_000: 1, "id": "x" * 5_000_000}) + "\n")
    return path


UNUSUAL_PATHS: list[Callable[[Path], Path]] = [
    a_directory,
    a_symlink_loop,
    a_pipe,
    an_empty_parquet,
    a_truncated_parquet,
    a_duplicate_column,
    wrong_columns,
    a_line_of_fifty_megabytes,
    a_name_of_five_megabytes,
]


@pytest.mark.parametrize("make", UNUSUAL_PATHS)
def test_an_unusual_path_as_a_file_is_named_in_the_error(
    make: Callable[[Path], Path], phi_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path)
    common = common_arguments(phi_dir, tmp_path)
    for command, split_name in (("inspect", "train"), ("fit", "train"), ("predict", "predict")):
        more = [f"--data.val_files={path}"] if split_name == "train" else [f"--output={tmp_path / 'out.jsonl'}"]
        code, printed = run_checked([command, *common, f"--data.{split_name}_files={path}", *more], capsys)
        assert code == (0 if make is a_line_of_fifty_megabytes else 2), printed
        if code == 2:
            assert str(path) in printed
