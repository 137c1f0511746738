"""The record audit: losses against each record alone, findings against what was planted."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import new_data, new_module
from lit_phi2.audit.duplicates import boilerplate_sizes, near_duplicates
from lit_phi2.audit.records import AuditedRecords, audit_records, label_error_scores, unsupported_identifiers
from lit_phi2.cli.main import main
from lit_phi2.data.collate import collate
from lit_phi2.data.records import Record
from lit_phi2.data.schedule import BatchingConfig
from lit_phi2.data.sources import CLAIMS_DIR
from lit_phi2.export.runtimes import is_installed
from lit_phi2.training.auditing import record_losses
from lit_phi2.utils.files import read_json_lines
from record_audit import audit, plant, precision_at

needs_datasketch = pytest.mark.skipif(not is_installed("datasketch"), reason="not run: datasketch not installed here")


def record(number: int, instruction: str = "Why?", response: str = "Because.", **groups: str) -> Record:
    return Record(f"r{number}", instruction, "", response, f"r.jsonl:{number + 1}", **groups)


def test_the_loss_of_a_packed_record_is_its_loss_alone(phi_dir: Path, write_jsonl: Any, record_rows: Any) -> None:
    """Reference: the module's own summed loss of a batch that holds this record alone; float32 sums in other orders."""
    module, data = new_module(phi_dir), new_data(phi_dir, write_jsonl(record_rows))
    data.setup("fit")
    split = data.splits["train"]
    packed = record_losses(module.fused_phi, split, BatchingConfig(max_length=128, packing=True, batch_size=2))
    module.eval()
    with torch.no_grad():
        losses = [module.loss(collate(split.examples, [(index,)])) for index in range(len(split.examples))]
    assert packed == pytest.approx([(loss.nats / loss.num_tokens).item() for loss in losses], rel=1e-5)
    with module.phi.disable_adapter():
        base = record_losses(module.fused_phi, split, BatchingConfig(max_length=128))
    assert not np.allclose(base, packed)


@needs_datasketch
def test_near_duplicates_are_the_pairs_above_the_threshold() -> None:
    """Reference: the Jaccard similarity of all pairs, by brute force; MinHash may miss a pair at the threshold."""
    generator = random.Random(0)
    words = [f"w{number}" for number in range(300)]
    texts = [" ".join(generator.choices(words, k=60)) for _ in range(60)]
    for text in texts[:25]:
        changed = text.split()
        for place in generator.sample(range(60), generator.randrange(1, 9)):
            changed[place] = "changed"
        texts.append(" ".join(changed))

    def shingles(text: str) -> set[tuple[str, ...]]:
        return set(itertools.pairwise(itertools.pairwise(text.split())))

    expected = {}
    for first, second in itertools.combinations(range(len(texts)), 2):
        a, b = shingles(texts[first]), shingles(texts[second])
        if len(a & b) / len(a | b) >= 0.7:
            expected[first, second] = len(a & b) / len(a | b)
    found = {(pair.first, pair.second): pair.similarity for pair in near_duplicates(texts, 0.7)}
    assert len(expected) >= 10
    assert {pair: pytest.approx(expected[pair]) for pair in found} == found
    assert len(found) >= 0.9 * len(expected)


def test_responses_that_differ_in_numbers_are_boilerplate() -> None:
    responses = ["See claim 12.", "see  claim 15", "Denied.", "See claim 9"]
    assert boilerplate_sizes(responses).tolist() == [3, 3, 1, 3]


def test_a_label_error_stands_out_in_its_group_only() -> None:
    """The letters have high losses all; the explanation with the loss of a letter is the error."""
    forms = ["explain"] * 20 + ["draft"] * 20
    records = [record(number, form=form, category="c") for number, form in enumerate(forms)]
    noise = np.random.default_rng(0).normal(0, 0.05, 40)
    adapter = np.where(np.arange(40) < 20, 0.3, 1.5) + noise
    adapter[7] = 1.5
    scores = label_error_scores(AuditedRecords(records, ["train"] * 40, np.full(40, 3.0), adapter))
    assert scores.argmax() == 7
    assert scores[7] > 5 > np.delete(scores, 7).max()


def test_a_loss_that_hardly_fell_is_a_label_error_too() -> None:
    """The losses after training are alike; that of the eighth record was as low under the base."""
    noise = np.random.default_rng(0).normal(0, 0.05, (2, 20))
    adapter, base = 0.5 + noise[0], 3.0 + noise[1]
    base[7] = 0.6
    scores = label_error_scores(AuditedRecords([record(n) for n in range(20)], ["train"] * 20, base, adapter))
    assert scores.argmax() == 7
    assert scores[7] > 5 > np.delete(scores, 7).max()


@needs_datasketch
def test_memorised_records_fell_further_than_any_of_val() -> None:
    """By hand; without a record of val nothing tells how far a loss falls that is not memorised."""
    falls = np.array([1.5, 3.0, 2.5, 1.0, 2.0])
    records = [record(number, f"Question {number}?", f"Answer {number}.") for number in range(5)]
    for splits, expected in (
        (["train"] * 3 + ["val"] * 2, [("r.jsonl:2", 3.0), ("r.jsonl:3", 2.5)]),
        (["train"] * 5, []),
    ):
        findings = audit_records(AuditedRecords(records, splits, np.full(5, 4.0), 4.0 - falls))
        assert [(each.location, each.score) for each in findings if each.kind == "memorised"] == expected


def test_identifiers_of_a_response_are_compared_with_its_prompt() -> None:
    assert list(
        unsupported_identifiers(record(0, "Claim CLM-2024-00017?", "Of clm 2024 00017 and M79184741, M79184741."))
    ) == ["m79184741"]
    assert not unsupported_identifiers(record(0, "Claim CLM-2024-00017?", "CLM-2024-00017, on May 3, 2025."))


@needs_datasketch
def test_audit_ranks_records_by_path_and_line_without_texts(
    phi_dir: Path,
    write_jsonl: Callable[..., Path],
    record_rows: list[dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A copy of the fifth record is in the last line, and the second record answers about a claim from nowhere."""
    record_rows[1]["response"] += " CLM-2024-00017"
    path = write_jsonl([*record_rows, record_rows[4] | {"id": "copy"}])
    monkeypatch.chdir(tmp_path)
    settings = [f"--model.base={phi_dir}", "--model.dtype=float32", "--model.max_new_tokens=4", "--run_name=a"]
    settings += [f"--data.train_files={path}", f"--data.val_files={path}", "--trainer.accelerator=cpu"]
    assert main(["fit", *settings, "--trainer.max_epochs=1"]) == 0
    capsys.readouterr()
    assert main(["audit", *settings, "--ckpt_path=last", "--what=records"]) == 0
    printed = capsys.readouterr().out
    file = next(tmp_path.rglob("audit_records.jsonl"))
    findings = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    pairs = {(finding["location"], finding["other"]) for finding in findings if finding["kind"] == "near_duplicate"}
    assert (f"{path}:13", f"{path}:5") in pairs
    unsupported = {each["location"] for each in findings if each["kind"] == "unsupported_identifier"}
    assert unsupported == {f"{path}:2"}
    assert f"{path}:2" in printed
    for text in ("00017", record_rows[1]["instruction"], record_rows[4]["response"]):
        assert text not in printed + file.read_text("utf-8")


@needs_datasketch
def test_planted_near_duplicates_are_the_pairs_that_it_finds() -> None:
    """40 among 600 packaged claims; the reference is what was planted. The issue asks for 0.8 of the first 40."""
    rows = list(read_json_lines(CLAIMS_DIR / "train.jsonl"))[:600]
    rows, _, copied = plant(rows, 40, random.Random(1))
    pairs = near_duplicates([f"{row['instruction']}\n{row['input']}\n{row['response']}" for row in rows], 0.7)
    findings = [{"kind": "near_duplicate", "location": f"r.jsonl:{pair.second + 1}"} for pair in pairs]
    assert precision_at(findings, "near_duplicate", copied) >= 0.95


@needs_datasketch
@pytest.mark.slow
def test_planted_swaps_rank_first_after_a_short_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """6 responses of 60 short claims belong to other prompts; by chance, 0.5 of the first 6 would be among them."""
    monkeypatch.chdir(tmp_path)
    rows = sorted(read_json_lines(CLAIMS_DIR / "train.jsonl"), key=lambda row: len(json.dumps(row)))[:60]
    rows, swapped, copied = plant(rows, 6, random.Random(0))
    Path("records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    findings = audit(epochs=1)
    assert precision_at(findings, "label_error", swapped) >= 0.5
    assert precision_at(findings, "unsupported_identifier", swapped) == 1.0
    assert precision_at(findings, "near_duplicate", copied) == 1.0
