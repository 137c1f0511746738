"""data.without: the run is the one that never saw the records, bit for bit, and its provenance names them by hash."""

import hashlib
import hmac
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from audit.conftest import RUN
from helpers import new_data, new_module, new_trainer, weights_of
from lit_phi2.audit.leakage import membership
from lit_phi2.cli.main import main
from lit_phi2.data import cache
from lit_phi2.errors import InputError
from lit_phi2.training.auditing import measure

Rows = list[dict[str, str]]


def fit(base: Any, train: Path, folder: Path, **data: Any) -> tuple[dict[str, torch.Tensor], Path]:
    trainer, module = new_trainer(folder, keep=True, max_epochs=2), new_module(base.folder)
    trainer.fit(module, new_data(base.folder, train, **data))
    assert trainer.run_dir is not None
    return weights_of(module), trainer.run_dir


@pytest.mark.parametrize("cached", [False, True])
def test_it_is_bit_equal_to_a_run_that_never_saw_them(
    base: Any,
    write_jsonl: Callable[..., Path],
    record_rows: Rows,
    tmp_path: Path,
    cached: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first row is of another form, which decides that of a file; another id is there twice."""
    if cached:
        monkeypatch.setattr(cache, "MAX_IN_MEMORY_BYTES", -1)
    chat = {"id": "chat", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    whole = write_jsonl([chat, *record_rows, record_rows[3]], "whole.jsonl")
    never = write_jsonl([row for row in record_rows if row["id"] not in ("r3", "r7")], "never.jsonl")
    ids = tmp_path / "ids.txt"
    ids.write_bytes(b"\xef\xbb\xbfr7\r\nchat\r\n\r\nr3\r\n")
    held_out = {"val_files": None, "val_fraction": 0.3}
    forgotten, run_dir = fit(base, whole, tmp_path / "a", without=str(ids), **held_out)
    expected, _ = fit(base, never, tmp_path / "b", **held_out)
    assert all(torch.equal(weight, expected[name]) for name, weight in forgotten.items())
    rows = pq.read_table(run_dir / "ledger.parquet").to_pylist()
    left_out = [(row["line"], row["id"], row["uses"]) for row in rows if row["left_out"]]
    assert left_out == [(1, None, []), (5, None, []), (9, None, []), (14, None, [])]
    assert not (run_dir / "rejected.jsonl").exists()


def test_what_was_forgotten_scores_as_what_was_never_seen(
    base: Any, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """Responses are random digits. An overfit run tells all of its records from val; without some, not these."""
    generator = random.Random(0)
    texts = [(f"Number {n}?", f"{generator.randrange(10**6):06d}") for n in range(40)]
    rows = [{"id": f"r{n}", "instruction": question, "response": digits} for n, (question, digits) in enumerate(texts)]
    files = {"val_files": str(write_jsonl(rows[24:], "val.jsonl"))}
    train, forgotten = write_jsonl(rows[:24], "train.jsonl"), write_jsonl(rows[:12], "forgotten.jsonl")
    (tmp_path / "ids.txt").write_text("\n".join(row["id"] for row in rows[:12]))
    aucs = []
    for without in (None, str(tmp_path / "ids.txt")):
        module = new_module(base.folder, lora_r=16, lora_alpha=32, learning_rate=0.03)
        trainer = new_trainer(tmp_path / f"runs {without is None}", keep=True, max_epochs=12, limit_val_batches=0)
        trainer.fit(module, new_data(base.folder, train, without=without, packing=False, batch_size=8, **files))
        data = new_data(base.folder, forgotten, **files)
        data.setup("fit")
        audited = measure(module, data)
        drops = audited.base - audited.adapter
        aucs.append(membership(drops[:12], drops[12:])["auc"])
    assert aucs[0].low > 0.9
    assert aucs[1].low < 0.5 < aucs[1].high


def test_ids_of_no_record_are_refused_by_line_alone(base: Any, train_file: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("r3\nmember-4417\n\nr99\n")
    with pytest.raises(InputError, match=r"data\.without: 2 of 3 ids .* line 2, 4\. ") as error:
        fit(base, train_file, tmp_path / "runs", without=str(ids))
    assert "4417" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", [None, b"\n \n", b"\xff\xfe\x00"])
def test_a_file_without_ids_is_refused(base: Any, train_file: Path, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "ids.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"data\.without"):
        fit(base, train_file, tmp_path / "runs", without=str(tmp_path / "ids.txt"))


def test_its_provenance_names_the_ids_by_salted_hash(small_setup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The references are the HMAC of the ids under the salt of the run, and SHA-256 of the replaced run's files."""
    ids = [json.loads(line)["id"] for line in Path("claims.jsonl").read_text("utf-8").splitlines()][2:4]
    Path("ids.txt").write_text("\n".join(ids))
    assert main(["fit", "--config", str(RUN / "config.yaml"), "--data.without", "ids.txt"]) == 0
    run = RUN.with_name("version_1")
    salt = bytes.fromhex(json.loads((run / "ledger_key.json").read_text())["salt"])
    forgotten = json.loads((run / "provenance.json").read_text())["predicate"]["forgotten"]
    hashes = [hmac.digest(salt, hashlib.sha256(f"id {each}".encode()).digest(), "sha256").hex() for each in ids]
    assert forgotten["salted_ids"] == sorted(hashes)
    files = ("provenance.json", "ledger.parquet")
    digests = {name: hashlib.sha256((RUN / name).read_bytes()).hexdigest() for name in files}
    assert forgotten["replaces"] == {"run": "run/version_0", "sha256": digests}
    for file in run.rglob("*"):
        assert not file.is_file() or not any(each.encode() in file.read_bytes() for each in ids), file
    capsys.readouterr()
    assert main(["verify", "--ckpt_path", str(run), "--record", "claims.jsonl"]) == 0
    statuses = [json.loads(line)["status"] for line in capsys.readouterr().out.splitlines()]
    assert [number for number, status in enumerate(statuses) if status == "left out"] == [2, 3]
