"""predictions.jsonl: every record once, in order; nothing of another predict is used, lost or deleted."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from helpers import new_data, new_module, new_trainer
from lit_phi2.cli.main import main
from lit_phi2.data import loaders
from lit_phi2.data.records import Record
from lit_phi2.errors import IncompleteError
from lit_phi2.training.callbacks.predictions import PredictionWriter
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.outputs import to_prediction
from lit_phi2.types import Example
from lit_phi2.utils.locks import file_lock

WORK = {"model": "m", "prompts": "p"}


@pytest.fixture
def split() -> Any:
    """Six records, r0 to r5; the prompt of r2 was shortened."""
    records = [Record(f"r{n}", "Why?", "", "", f"records.jsonl:{n + 1}") for n in range(6)]
    examples = [Example(f"r{n}", [1, 2], 2, truncated_tokens=int(n == 2)) for n in range(6)]
    return SimpleNamespace(records=records, examples=examples)


def write_part(writer: PredictionWriter, rank: int, indices: list[int], end: str = "") -> Path:
    part = writer.file.with_name(f"{writer.file.name}.{writer.work}.part{rank}")
    lines = [
        json.dumps({"index": index, "completion": f"c{index}\u2028\x85", "finish_reason": "length", "new_tokens": 1})
        for index in indices
    ]
    part.write_bytes(("".join("\n" + line + "\n" for line in lines) + end).encode())
    return part


def test_partial_files_are_merged_in_order_without_duplicates(tmp_path: Path, split: Any) -> None:
    """Index 3 is in two of the three files; two lines were cut short, one of them inside a character."""
    writer = PredictionWriter(tmp_path / "predictions.jsonl", WORK)
    write_part(writer, 0, [5, 0, 3], end='{"index": 4, "comple')
    write_part(writer, 1, [1, 3, 4])
    part = write_part(writer, 2, [2])
    part.write_bytes(part.read_bytes() + '{"index": 5, "completion": "é'.encode()[:-1] + b"\n\n")
    assert sorted(set(writer.read_completed().tolist())) == [0, 1, 2, 3, 4, 5]
    writer.finish(split)
    rows = [json.loads(line) for line in writer.file.read_bytes().split(b"\n")[:-1]]
    assert [row["id"] for row in rows] == [f"r{index}" for index in range(6)]
    assert [row["completion"] for row in rows] == [f"c{index}\u2028\x85" for index in range(6)]
    assert [row.get("truncated") for row in rows] == [None, None, True, None, None, None]
    assert (writer.summary.num_completions, writer.summary.num_at_limit) == (6, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_a_result_that_lacks_a_record_replaces_nothing(tmp_path: Path, split: Any) -> None:
    writer = PredictionWriter(tmp_path / "predictions.jsonl", WORK)
    writer.file.write_text("old")
    part = write_part(writer, 0, [0, 1, 4, 5])
    with pytest.raises(IncompleteError, match=r"2 of 6 records have no completion, the first of them records\.jsonl:3"):
        writer.finish(split)
    assert (writer.file.read_text(), part.is_file()) == ("old", True)


def test_parts_of_other_work_and_foreign_files_stay(
    tmp_path: Path, split: Any, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "predictions.jsonl"
    other, writer = PredictionWriter(file, {"model": "another"}), PredictionWriter(file, WORK)
    kept = [write_part(other, 0, [0, 1])]
    for name in (
        "predictions.jsonl.part",
        "predictions.jsonl.part1",
        "predictions.jsonl.parts.zip",
        "xpredictions.jsonl",
    ):
        kept.append(tmp_path / name)
        kept[-1].write_text("mine")
    contents = {path: path.read_bytes() for path in kept}
    with caplog.at_level("INFO", "lit_phi2"):
        assert writer.read_completed().tolist() == []
    assert kept[0].name in caplog.text
    write_part(writer, 0, [0, 1, 2, 3, 4, 5])
    writer.finish(split)
    assert {path: path.read_bytes() for path in kept} == contents
    assert set(tmp_path.iterdir()) == {*kept, file}


def test_a_prediction_has_a_reference_only_with_a_response() -> None:
    completion = {"completion": "So.", "finish_reason": "stop", "new_tokens": 2}
    for response, reference in (("", {}), ("Because.", {"reference": "Because."})):
        for truncated, mark in ((False, {}), (True, {"truncated": True})):
            record = Record("r", "Why?", "", response, "records.jsonl:1")
            prediction = to_prediction(record, Example("r", [1], 1, truncated), {"index": 0, **completion})
            assert prediction == {"id": "r", "instruction": "Why?", "input": ""} | reference | completion | mark


# The command


@pytest.fixture
def predict(
    phi_dir: Path, record_rows: list[dict[str, str]], write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Runs predict on twelve records, in four batches of the loader, with completions of four tokens."""
    monkeypatch.setattr(loaders, "PROMPTS_PER_BATCH", 3)
    file = write_jsonl(list(record_rows))
    settings = {
        "run_name": "small",
        "model.base": phi_dir,
        "model.dtype": "float32",
        "data.max_length": 128,
        "data.predict_files": file,
        "trainer.default_root_dir": file.parent / "runs",
        "trainer.enable_progress_bar": "false",
    }
    arguments = [f"--{key}={value}" for key, value in settings.items()]

    def run(*more: object, max_new_tokens: int = 4) -> int:
        return main(["predict", *arguments, f"--model.max_new_tokens={max_new_tokens}", *map(str, more)])

    return run


def ids_of(file: Path) -> list[str]:
    return [json.loads(line)["id"] for line in file.read_bytes().split(b"\n")[:-1]]


def test_a_second_predict_of_the_same_output_is_refused(
    predict: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    with file_lock(tmp_path / "out.jsonl.lock", waiting=None):
        assert predict("--output", out) == 2
    stderr = capsys.readouterr().err
    assert f"error: --output {out}: another predict is writing it" in stderr
    assert "Traceback" not in stderr
    assert not out.exists()
    assert predict("--output", out) == 0
    assert ids_of(out) == [f"r{number}" for number in range(12)]
    assert not list(tmp_path.glob("out.jsonl.*"))


def test_a_predict_that_runs_keeps_others_away_from_its_output(
    predict: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second starts inside the first, as another terminal would start it."""
    out, other = tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    predict_step = LitPhi2.predict_step
    codes: list[int] = []

    def start_second(self: LitPhi2, batch: Any, index: int) -> Any:
        monkeypatch.setattr(LitPhi2, "predict_step", predict_step)
        codes.extend((predict("--output", out, max_new_tokens=2), predict("--output", other)))
        return predict_step(self, batch, index)

    monkeypatch.setattr(LitPhi2, "predict_step", start_second)
    assert predict("--output", out) == 0
    assert codes == [2, 0]
    assert f"--output {out}: another predict is writing it" in capsys.readouterr().err
    assert out.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("flag", "count"),
    [
        ("--trainer.fast_dev_run=true", 3),
        ("--trainer.limit_predict_batches=2", 6),
        ("--trainer.limit_predict_batches=0.25", 3),
    ],
)
def test_a_part_of_the_batches_never_replaces_a_whole_result(
    flag: str, count: int, predict: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.partial.jsonl"
    assert predict("--output", out) == 0
    whole = out.read_bytes()
    capsys.readouterr()
    assert predict("--output", out, flag) == 0
    assert out.read_bytes() == whole
    assert len(ids_of(partial)) == count
    assert set(partial.read_bytes().splitlines()) < set(whole.splitlines())
    stderr = capsys.readouterr().err
    assert f"leaves out {12 - count} of 12 records" in stderr
    assert str(partial) in stderr
    assert not list(tmp_path.glob("out.*.part?"))


def test_a_limit_that_leaves_out_no_batch_writes_the_whole_result(predict: Callable[..., int], tmp_path: Path) -> None:
    assert predict("--output", tmp_path / "out.jsonl", "--trainer.limit_predict_batches=4") == 0
    assert len(ids_of(tmp_path / "out.jsonl")) == 12


def test_a_continued_predict_writes_the_references_of_now(
    predict: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A response is no part of the prompt, so it may be edited between a killed predict and the next."""
    out, records = tmp_path / "out.jsonl", tmp_path / "records.jsonl"
    append = PredictionWriter.append
    ended: list[int] = []

    def die_at_the_fifth(self: PredictionWriter, part: Path, output: dict[str, Any]) -> None:
        if len(ended) == 4:
            raise KeyboardInterrupt
        ended.append(output["index"])
        append(self, part, output)

    monkeypatch.setattr(PredictionWriter, "append", die_at_the_fifth)
    assert predict("--output", out) == 130
    monkeypatch.setattr(PredictionWriter, "append", append)
    rows = [json.loads(line) | {"response": "Edited."} for line in records.read_text().splitlines()]
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert predict("--output", out) == 0
    assert ids_of(out) == [f"r{number}" for number in range(12)]
    assert {json.loads(line)["reference"] for line in out.read_text().splitlines()} == {"Edited."}


def test_a_shortened_prompt_is_marked_in_its_prediction(
    predict: Callable[..., int], tmp_path: Path, write_jsonl: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The input section of the second record alone has more tokens than the base has positions."""
    rows = [
        {"id": "short", "instruction": "Why?"},
        {"id": "long", "instruction": "Why?", "input": "claim denied " * 400},
    ]
    assert len(tokenizer(rows[1]["input"])["input_ids"]) > 512
    out = tmp_path / "out.jsonl"
    write_jsonl(list(rows))
    assert predict("--output", out) == 0
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert "truncated" not in first
    assert second["truncated"] is True
    assert second["input"] == rows[1]["input"], "the record as it was given"


def test_completions_that_loop_are_counted_with_the_cure(
    phi_dir: Path, train_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The output layer always chooses token 7, so that every completion is a loop; then EOS at once."""
    module = new_module(phi_dir, max_new_tokens=24)
    with torch.no_grad():
        module.fused_phi.lm_head.bias[7] += 1e4
    with caplog.at_level("INFO", "lit_phi2"):
        data = new_data(phi_dir, train_file, max_new_tokens=24)
        new_trainer(tmp_path).predict(module, data, output=str(tmp_path / "out.jsonl"))
    assert re.search(r"12 completions, 288 tokens \([\d,]+ tokens/s\), 12 \(100 %\) stopped at", caplog.text)
    assert "12 of 12 completions (100 %) repeat themselves up to model.max_new_tokens" in caplog.text
    assert "train longer" in caplog.text
    caplog.clear()
    with torch.no_grad():
        module.fused_phi.lm_head.bias[module.eos_token_id] += 2e4
    with caplog.at_level("INFO", "lit_phi2"):
        new_trainer(tmp_path).predict(module, data, output=str(tmp_path / "other.jsonl"))
    assert "12 completions, 0 tokens, 0 (0 %) stopped at model.max_new_tokens" in caplog.text
    assert "repeat" not in caplog.text
