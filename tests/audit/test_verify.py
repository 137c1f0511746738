"""verify: records looked up in the ledger, a run trained again, and the signature of an export."""

import csv
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from audit.conftest import RUN
from lit_phi2.audit import verify
from lit_phi2.audit.ledger import find_in_ledger
from lit_phi2.cli.main import main
from lit_phi2.data.records import ReadOptions, read_records

CONFIG = str(RUN / "config.yaml")
needs_model_signing = pytest.mark.skipif(
    importlib.util.find_spec("model_signing") is None, reason="not run: model-signing is not installed here"
)


def look_up(file: str, capsys: pytest.CaptureFixture[str], ckpt_path: Path = RUN) -> list[dict[str, object]]:
    capsys.readouterr()
    assert main(["verify", "--ckpt_path", str(ckpt_path), "--record", file]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_record_is_found_with_its_steps_in_any_format(small_setup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reference is the ledger, by id. In the table ids, order and other columns differ."""
    ledger = {row["id"]: row for row in pq.read_table(RUN / "ledger.parquet").to_pylist()}
    records = [json.loads(line) for line in Path("claims.jsonl").read_text("utf-8").splitlines()][::-1]
    with Path("table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "input", "response"])
        writer.writerows([record["instruction"], record.get("input", ""), record["response"]] for record in records)
        writer.writerow(["Why was it denied?", "", "Nobody knows."])
    *found, other = look_up("table.csv", capsys, RUN / "checkpoints" / "last.ckpt")
    for record, use in zip(records, found, strict=True):
        row = ledger[record["id"]]
        assert use["status"] == {"train": "trained", "val": "validation"}[row["split"]]
        assert use.get("uses", []) == row["uses"]
    assert {use["status"] for use in found} == {"trained", "validation"}
    assert (other["status"], len(found) + 1) == ("unknown", 17)


def test_steps_after_the_checkpoint_do_not_count(small_setup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The adapter is that of the best step; its provenance has been edited to step 3 of epoch 0."""
    file = RUN / "adapter" / "provenance.json"
    statement = json.loads(file.read_text())
    statement["predicate"]["training"]["steps"] = 3
    file.write_text(json.dumps(statement))
    found = look_up("claims.jsonl", capsys, RUN / "adapter")
    trained = [use for use in found if use["status"] == "trained"]
    assert sorted(step["step"] for use in trained for step in use["uses"]) == [1, 2, 3]  # type: ignore[attr-defined]
    assert sum(use["status"] == "after this checkpoint" for use in found) > 0


def test_a_record_left_out_or_tested_is_told_apart(small_setup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = Path("claims.jsonl").read_text("utf-8").splitlines()[0]
    long = json.dumps({"id": "x-1", "instruction": "Why?", "response": "word " * 600})
    Path("more.jsonl").write_text(f"{line}\n{long}\n{line}\n", "utf-8")
    Path("test.jsonl").write_text(json.dumps({"instruction": "Why?", "response": "No."}) + "\n", "utf-8")
    flags = ["--data.train_files", "more.jsonl", "--data.val_files", "claims.jsonl", "--data.val_fraction", "0.1"]
    flags += ["--data.on_bad_record", "skip", "--run_name", "other", "--data.test_files", "test.jsonl"]
    assert main(["fit", "--config", CONFIG, *flags]) == 0
    run = Path("runs", "other", "version_0")
    test = ["--config", str(run / "config.yaml"), "--ckpt_path", str(run), "--max_completions", "0"]
    assert main(["test", *test]) == 0
    first, second, repeated = look_up("more.jsonl", capsys, run)
    assert (first["status"], first["splits"]) == ("trained", ["train", "val"])
    assert "already used" in str(first["reason"])
    assert (second["status"], repeated["status"]) == ("left out", "trained")
    assert "the limit is 512" in str(second["reason"])
    assert look_up("test.jsonl", capsys, run)[0]["status"] == "test"


def test_the_ledger_is_read_once_for_any_number_of_records(small_setup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First and last of 40,002 records were used; what they were used for is the ledger's, by id."""
    known, _ = read_records(["claims.jsonl"], ReadOptions(), needs_response=True)
    first, last = known[0], known[1]
    unknown = (dataclasses.replace(first, response=f"Nobody knows {number}.") for number in range(40_000))
    opened: list[Path] = []

    def find(file: Path, hashes: set[bytes]) -> Iterator[dict[str, Any]]:
        opened.append(file)
        return find_in_ledger(file, hashes)

    monkeypatch.setattr(verify, "find_in_ledger", find)
    found = list(verify.look_up(itertools.chain([first], unknown, [last]), RUN, None))
    ledger = {row["id"]: row for row in pq.read_table(RUN / "ledger.parquet").to_pylist()}
    assert opened == [RUN / "ledger.parquet"]
    for record, use in ((first, found[0]), (last, found[-1])):
        assert use["splits"] == [ledger[record.id]["split"]]
        assert use.get("uses", []) == ledger[record.id]["uses"]
    assert {use["status"] for use in found[1:-1]} == {"unknown"}


def test_a_replay_from_the_run_folder_is_bit_equal(small_setup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--ckpt_path", str(RUN), "--replay", "true"]) == 0
    assert "ok           replay: bit-equal" in capsys.readouterr().out
    assert [path.name for path in Path("runs").iterdir()] == ["run"]


def test_a_replay_says_how_far_another_result_is(small_setup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RUN / "config.yaml"
    config.write_text(config.read_text().replace("learning_rate: 0.0002", "learning_rate: 0.00021"))
    assert main(["verify", "--ckpt_path", str(RUN), "--replay", "true"]) == 3
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "replay" in line]
    assert "changed      replay: not bit-equal: weights differ by at most" in line


def new_key(name: str) -> None:
    """A key pair by openssl, as the help of --sign says."""
    make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.pem"]
    subprocess.run(make, check=True, capture_output=True)
    subprocess.run(
        ["openssl", "ec", "-in", f"{name}.pem", "-pubout", "-out", f"{name}.pub"], check=True, capture_output=True
    )


@needs_model_signing
def test_a_signed_export_names_what_changed(small_setup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file changed together with its digest in provenance.json passes without the signature."""
    new_key("key"), new_key("other")
    flags = ["--ckpt_path", str(RUN), "--output_dir", "out", "--check", "0", "--sign", "key.pem"]
    assert main(["export", "--config", CONFIG, *flags]) == 0
    verify = ["verify", "--ckpt_path", "out", "--model.base", "base"]
    assert main([*verify, "--public_key", "key.pub"]) == 0
    assert "ok           signature" in capsys.readouterr().out
    Path("out/adapter.lock").touch()  # of this machine alone, and signed by nobody
    assert main([*verify, "--public_key", "key.pub"]) == 0
    assert "ok           signature" in capsys.readouterr().out
    assert main([*verify, "--public_key", "other.pub"]) == 3
    assert "was signed with another key" in capsys.readouterr().out
    old = Path("out/provenance.json").read_text()
    card = Path("out/README.md")
    digest = next(each for each in json.loads(old)["subject"] if each["name"] == "README.md")["digest"]["sha256"]
    card.write_text(card.read_text() + "changed")
    Path("out/provenance.json").write_text(old.replace(digest, hashlib.sha256(card.read_bytes()).hexdigest()))
    assert main(verify) == 0
    assert "not checked  signature" in capsys.readouterr().out
    assert main([*verify, "--public_key", "key.pub"]) == 3
    output = capsys.readouterr().out
    assert "README.md is not the file that was signed" in output
    assert "provenance.json is not the file that was signed" in output


@needs_model_signing
def test_a_key_that_cannot_sign_is_refused_first(small_setup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("key.pem").write_text("no key")
    flags = ["--ckpt_path", str(RUN), "--output_dir", "out", "--sign", "key.pem"]
    assert main(["export", "--config", CONFIG, *flags]) == 2
    assert "openssl ecparam" in capsys.readouterr().err
    assert not Path("out").exists()


def test_without_the_library_its_install_line_is_named(
    small_setup: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "model_signing", None)
    flags = ["--ckpt_path", str(RUN), "--output_dir", "out", "--sign", "key.pem"]
    assert main(["export", "--config", CONFIG, *flags]) == 2
    assert 'pip install "lit-phi2[audit]"' in capsys.readouterr().err
