"""ledger.parquet against the curves of its run, against rows counted by hand, and after a kill."""

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import DieAt, new_data, new_module, new_trainer


def fit(base: Path, train: Path, folder: Path, callbacks: Any = (), data: Any = None, **settings: Any) -> Path:
    trainer = new_trainer(folder, callbacks, keep=True, **settings)
    trainer.fit(new_module(base), new_data(base, train, **(data or {})))
    assert trainer.run_dir is not None
    return trainer.run_dir


def rows_of(run_dir: Path, split: str = "train") -> list[dict[str, Any]]:
    return [row for row in pq.read_table(run_dir / "ledger.parquet").to_pylist() if row["split"] == split]


def tokens_by_step(run_dir: Path) -> Counter[int]:
    tokens: Counter[int] = Counter()
    for row in rows_of(run_dir):
        for use in row["uses"]:
            tokens[use["step"]] += row["supervised_tokens"]
    return tokens


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        ({}, {"max_epochs": 3}),
        ({"packing": False, "batch_size": 2}, {"max_epochs": 2, "accumulate_grad_batches": 4}),
        ({"packing": False}, {"max_epochs": 2, "limit_train_batches": 5, "accumulate_grad_batches": 2}),
        ({"packing": False}, {"max_epochs": 2, "overfit_batches": 3}),
        ({"packing": False}, {"max_epochs": 3, "max_steps": 17}),
    ],
)
def test_its_tokens_are_the_denominators_of_the_losses(
    base: Any, train_file: Path, tmp_path: Path, data: Any, settings: Any
) -> None:
    """The reference is train/supervised_tokens, which is counted from the labels of the batches that were run."""
    run_dir = fit(base.folder, train_file, tmp_path / "runs", data=data, **settings)
    events = EventAccumulator(str(run_dir)).Reload().Scalars("train/supervised_tokens")
    assert tokens_by_step(run_dir) == {event.step: event.value for event in events}


def test_each_epoch_uses_each_record_once(base: Any, train_file: Path, tmp_path: Path) -> None:
    run_dir = fit(base.folder, train_file, tmp_path / "runs", max_epochs=3)
    assert all([use["epoch"] for use in row["uses"]] == [0, 1, 2] for row in rows_of(run_dir))
    assert all(row["uses"] == [] for row in rows_of(run_dir, "val"))


def test_a_killed_and_resumed_run_has_the_same_ledger(base: Any, train_file: Path, tmp_path: Path) -> None:
    """The reference is the undisturbed run. The salts differ, so hashes are compared under one salt."""
    settings = {"max_epochs": 2, "val_check_interval": 4}
    data = {"packing": False}
    undisturbed = fit(base.folder, train_file, tmp_path / "a", data=data, **settings)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(base.folder, train_file, tmp_path / "b", [DieAt(10)], data=data, **settings)
    killed = tmp_path / "b" / "run" / "version_0"
    assert not (killed / "ledger.parquet").exists()
    (killed / "ledger_key.json").write_bytes((undisturbed / "ledger_key.json").read_bytes())
    trainer = new_trainer(tmp_path / "b", keep=True, **settings)
    trainer.fit(new_module(base.folder), new_data(base.folder, train_file, **data), ckpt_path=str(killed))
    assert (killed / "ledger.parquet").read_bytes() == (undisturbed / "ledger.parquet").read_bytes()


def test_records_left_out_have_a_row_with_the_reason(
    base: Any, write_jsonl: Callable[..., Path], record_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    long = {"id": "long", "instruction": "Why?", "response": "claim " * 200}
    path = write_jsonl([*record_rows, {"id": "none", "instruction": "Why?"}, record_rows[0], long])
    settings = {"on_bad_record": "skip", "on_overlong": "skip", "val_files": None, "val_fraction": 0.3}
    run_dir = fit(base.folder, path, tmp_path / "runs", data=settings)
    left_out = {(row["line"], row["id"]): row for row in rows_of(run_dir) if row["left_out"]}
    assert sorted(left_out, key=lambda key: key[0]) == [(13, None), (14, "r0"), (15, "long")]
    assert "'response'" in left_out[13, None]["left_out"]
    assert "already used" in left_out[14, "r0"]["left_out"]
    assert "the limit is 128" in left_out[15, "long"]["left_out"]
    used = {row["id"] for row in rows_of(run_dir) if row["uses"]} | {row["id"] for row in rows_of(run_dir, "val")}
    assert used == {row["id"] for row in record_rows}


def test_its_hash_is_of_the_texts_under_the_salt_of_the_run(
    base: Any, write_jsonl: Callable[..., Path], record_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    """The reference computes it from the file: SHA-256 of the three texts with their lengths, HMAC under the salt."""
    run_dir = fit(base.folder, write_jsonl(record_rows), tmp_path / "runs")
    salt = bytes.fromhex(json.loads((run_dir / "ledger_key.json").read_text())["salt"])
    for row, record in zip(rows_of(run_dir), record_rows, strict=True):
        texts = [record[name].encode() for name in ("instruction", "input", "response")]
        content = hashlib.sha256(b"".join(b"%d %s" % (len(text), text) for text in texts)).digest()
        assert row["content_sha256"] == hmac.digest(salt, content, "sha256")
    assert (run_dir / "ledger_key.json").stat().st_mode & 0o077 == 0


def test_it_counts_the_tokens_that_truncation_cut(
    base: Any, tokenizer: Any, write_jsonl: Callable[..., Path], record_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    """The reference tokenizes the whole prompt with the tokenizer alone."""
    long = {"id": "long", "instruction": "Why?", "input": "claim denied appeal " * 60, "response": "plan"}
    run_dir = fit(base.folder, write_jsonl([*record_rows, long]), tmp_path / "runs")
    row = rows_of(run_dir)[-1]
    prompt = f"### Instruction:\nWhy?\n\n### Input:\n{long['input']}\n\n### Response:\n"
    assert row["prompt_tokens"] + row["truncated_tokens"] == len(tokenizer(prompt)["input_ids"])
    assert row["prompt_tokens"] + row["supervised_tokens"] <= 128
    assert row["response_tokens"] == len(tokenizer("plan")["input_ids"])


def test_it_holds_no_text_of_a_record(base: Any, train_file: Path, tmp_path: Path) -> None:
    run_dir = fit(base.folder, train_file, tmp_path / "runs")
    content = str(pq.read_table(run_dir / "ledger.parquet").to_pylist())
    assert "claim denied" not in content
