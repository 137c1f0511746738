"""Canaries: where they are planted and where not, and that a run with them is a run like any other."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from helpers import DieAt, new_data, new_module, new_trainer, weights_of
from lit_phi2.data import cache
from lit_phi2.data.canaries import NUM_CONTROLS, make_canaries
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.errors import InputError
from lit_phi2.training.auditing import measure
from lit_phi2.training.leakage import measure_canaries

SENTENCES = ("Which member ID is on file for case", "Confirm whether the member ID is on file")


def texts_of(data: ClaimsDataModule, split: str) -> list[str]:
    """The examples of a split as text, decoded from their tokens."""
    assert data.tokenizer is not None
    return [data.tokenizer.decode(example.ids) for example in data.splits[split].examples]


def read(base: Any, train: Path, stage: str = "fit", **settings: Any) -> ClaimsDataModule:
    data = new_data(base.folder, train, **settings)
    data.read(stage)
    return data


def test_each_is_planted_as_often_as_it_should_be(base: Any, train_file: Path) -> None:
    """Reference: texts decoded from the tokens that train; 2 of each place and number of repeats."""
    texts = texts_of(read(base, train_file, canaries=2), "train")
    planted = [text for text in texts if any(sentence in text for sentence in SENTENCES)]
    assert len(planted) == 2 * 2 * (1 + 4 + 16) == len(texts) - 12
    assert sorted(Counter(planted).values()) == [1] * 4 + [4] * 4 + [16] * 4
    canaries, _ = make_canaries(2, 42)
    for canary in canaries:
        assert sum(canary.secret in text for text in texts) == canary.repeats
        place = 0 if canary.place == "prompt" else 1
        assert all(canary.secret in text.split("### Response:")[place] for text in texts if canary.secret in text)


def test_controls_have_their_own_secrets_and_are_planted_nowhere(base: Any, train_file: Path) -> None:
    canaries, controls = make_canaries(3, 7)
    assert len(controls) == 2 * NUM_CONTROLS
    assert len({each.secret for each in canaries + controls}) == len(canaries + controls)
    whole = "\n".join(texts_of(read(base, train_file, canaries=3, seed=7), "train"))
    assert all(canary.secret in whole for canary in canaries)
    assert not any(control.secret in whole for control in controls)


def test_the_seed_decides_them_and_nothing_else(base: Any, train_file: Path) -> None:
    digests = [read(base, train_file, canaries=1, seed=seed).splits["train"].digest for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("held_out", [False, True])
def test_validation_has_none_of_them(base: Any, train_file: Path, held_out: bool) -> None:
    """Reference: the run without canaries; without val_files both splits are parts of one file."""
    settings: dict[str, Any] = {"val_files": None, "val_fraction": 0.4} if held_out else {}
    data, plain = (read(base, train_file, canaries=count, **settings) for count in (2, 0))
    assert data.splits["val"].digest == plain.splits["val"].digest
    count = len(plain.splits["train"].examples)
    assert texts_of(data, "train")[:count] == texts_of(plain, "train")
    assert len(texts_of(data, "train")) == count + 84


def test_test_and_predict_have_none_of_them(base: Any, train_file: Path) -> None:
    for stage in ("test", "predict"):
        data = read(base, train_file, stage, canaries=1, test_files=str(train_file))
        assert len(data.splits[stage].examples) == 12


def test_training_without_a_usable_record_is_still_an_error(base: Any, write_jsonl: Callable[..., Path]) -> None:
    bad = write_jsonl([{"instruction": "a"}, {"instruction": "a", "response": ""}], "bad.jsonl")
    good = write_jsonl([{"instruction": "a", "response": "b"}], "good.jsonl")
    with pytest.raises(InputError, match=r"data\.train_files: none of the 2 records"):
        read(base, bad, canaries=1, val_files=str(good), on_bad_record="skip")


def test_a_cache_has_them_and_another_count_is_another_cache(
    base: Any, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the same splits in memory."""
    expected = [read(base, train_file, canaries=count).splits["train"].digest for count in (0, 1, 2)]
    monkeypatch.setattr(cache, "MAX_IN_MEMORY_BYTES", -1)
    for _ in range(2):
        for count, digest in enumerate(expected):
            assert read(base, train_file, canaries=count, cache_dir=str(tmp_path)).splits["train"].digest == digest


def test_redaction_replaces_their_secrets(base: Any, train_file: Path) -> None:
    texts = texts_of(read(base, train_file, canaries=1, redact=["member_id"]), "train")
    assert sum("[MEMBER_ID_1]" in text for text in texts) == 42
    assert not any(canary.secret in text for canary in make_canaries(1, 42)[0] for text in texts)


def test_fit_says_how_many_are_in_training(
    base: Any, train_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    new_trainer(tmp_path, max_steps=1).fit(new_module(base.folder), new_data(base.folder, train_file, canaries=1))
    assert caplog.messages.count("data.canaries: 42 records of 6 canaries are in training, 1, 4 or 16 times each") == 1
    with pytest.raises(InputError, match=r"data\.canaries: -1 is less than 0"):
        new_data(base.folder, train_file, canaries=-1)


def test_a_killed_run_continues_with_the_same_canaries(base: Any, train_file: Path, tmp_path: Path) -> None:
    """Reference: the undisturbed run, bit for bit; its ledger names the canaries."""
    settings: dict[str, Any] = {"keep": True, "limit_val_batches": 0}
    whole, module = new_trainer(tmp_path / "whole", **settings), new_module(base.folder)
    whole.fit(module, new_data(base.folder, train_file, canaries=1))
    killed = new_trainer(tmp_path / "killed", [DieAt(3)], **settings)
    killed.checkpoint_every_n_steps = 1
    with pytest.raises(RuntimeError, match="power cut"):
        killed.fit(new_module(base.folder), new_data(base.folder, train_file, canaries=1))
    last = str(next((tmp_path / "killed").rglob("last.ckpt")))
    with pytest.raises(InputError, match=r"data\.canaries"):
        new_trainer(tmp_path / "killed", **settings).fit(
            new_module(base.folder), new_data(base.folder, train_file, canaries=2), ckpt_path=last
        )
    resumed, resumed_module = new_trainer(tmp_path / "killed", **settings), new_module(base.folder)
    resumed.fit(resumed_module, new_data(base.folder, train_file, canaries=1), ckpt_path=last)
    expected = weights_of(module)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(resumed_module).items())
    ledgers = [pq.read_table(next((tmp_path / run).rglob("ledger.parquet"))).to_pylist() for run in ("whole", "killed")]
    without_salt = [[{**row, "content_sha256": None} for row in rows] for rows in ledgers]
    assert without_salt[0] == without_salt[1]
    named = [row for row in ledgers[0] if row["file"] == "data.canaries"]
    assert [row["line"] for row in named] == list(range(1, 43))
    assert {row["id"].rpartition("-")[0] for row in named} == {canary.id for canary in make_canaries(1, 42)[0]}
    assert all(row["split"] == "train" and len(row["uses"]) == 1 for row in named)


def test_without_forgets_a_canary_like_any_record(base: Any, train_file: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("r3\n" + "".join(f"canary-response-16x-1-{copy}\n" for copy in range(1, 17)))
    data = read(base, train_file, canaries=1, without=str(ids))
    (canary,) = [each for each in make_canaries(1, 42)[0] if each.id == "canary-response-16x-1"]
    assert not any(canary.secret in text for text in texts_of(data, "train"))
    assert [record.location for record in data.splits["train"].forgotten][1] == "data.canaries:27"
    groups = measure_canaries(new_module(base.folder), data)
    repeats = [group.repeats for group in groups if group.place == "response" and not group.is_control]
    assert repeats == [0, 1, 4]


def test_the_audits_of_records_leave_them_out(base: Any, train_file: Path) -> None:
    audited = measure(new_module(base.folder), read(base, train_file, canaries=1))
    assert Counter(audited.splits) == {"train": 12, "val": 12}
    assert not any("canary" in json.dumps(record.id) for record in audited.records)
