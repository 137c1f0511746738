"""Redaction: consistent placeholders, and no planted identifier in any byte that a run writes or prints."""

import csv
import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lit_phi2.audit.identifiers import KINDS
from lit_phi2.audit.redaction import redact
from lit_phi2.cli.main import main
from lit_phi2.data import cache
from lit_phi2.data.records import ReadOptions, Record, iter_records
from lit_phi2.generation.ngrams import NgramIndex
from lit_phi2.pretrained import load_tokenizer, resolve_base_model
from lit_phi2.training.draft_index import INDEX_FILE
from lit_phi2.training.outputs import redact_output, to_prediction
from lit_phi2.types import Example
from planted import PLANTED

VALUES = [value for rows in PLANTED.values() for _, value in rows]


def test_a_value_has_one_placeholder_in_all_texts() -> None:
    """In other formats, and where no word explains it."""
    texts = ["Claim 42708978, SSN 219-09-9998; DOB 4/12/1980", "42708978? or file 5512", "219 09 9998, 4/12/1980, 5512"]
    assert redact(texts, ["claim_number", "ssn", "dob"]).texts == [
        "Claim [CLAIM_NUMBER_1], SSN [SSN_1]; DOB [DOB_1]",
        "[CLAIM_NUMBER_1]? or file [CLAIM_NUMBER_2]",
        "[SSN_1], [DOB_1], 5512",  # four characters occur by chance
    ]


def test_only_the_kinds_that_were_asked_for_are_replaced() -> None:
    text = "NPI 1234567893, SSN 219-09-9998, jo@example.org"
    assert redact([text], ["npi"]) == (["NPI [NPI_1], SSN 219-09-9998, jo@example.org"], ["npi"])
    assert redact([text], []) == ([text], [])


def test_placeholders_in_a_text_keep_their_numbers() -> None:
    assert redact(["[SSN_3] and 219-09-9998", "[SSN_9]"], ["ssn"]).texts == ["[SSN_3] and [SSN_4]", "[SSN_9]"]


def test_redacted_texts_stay_as_they_are_when_redacted_again() -> None:
    texts = [words.format(value) for rows in PLANTED.values() for words, value in rows]
    once = redact(texts, KINDS).texts
    assert not any(value in text for text in once for value in VALUES)
    assert redact(once, KINDS) == (once, [])


def test_an_unknown_kind_is_refused_with_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--config", "tiny.yaml", "--data.redact=[ssn, fone]"]) == 2
    message = capsys.readouterr().err
    assert "data.redact: 'fone' is unknown; expected all, or some of email, mbi, ssn," in message


def in_every_form(number: int, text: str) -> dict[str, dict[str, Any]]:
    """A record with the text in every part of it, in each form, by the name of the form."""
    record_id, answer = f"{number}: {text}", f"About {text}."
    turns = [f"Be brief: {text}", f"Why? {text}", answer]
    roles = zip(("system", "user", "assistant"), ("system", "human", "gpt"), turns, strict=True)
    messages, conversations = zip(
        *(({"role": role, "content": turn}, {"from": name, "value": turn}) for role, name, turn in roles), strict=True
    )
    return {
        "alpaca": {"id": record_id, "instruction": f"Why? {text}", "input": text, "output": answer},
        "dolly": {"id": record_id, "instruction": text, "context": text, "response": answer, "category": text},
        "prompt": {"id": record_id, "prompt": f"Why? {text}", "completion": answer},
        "messages": {"id": record_id, "messages": list(messages)},
        "conversations": {"id": record_id, "conversations": list(conversations)},
    }


def write_file(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows in the format of the file's name; a cell of a table holds lists as JSON."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(rows[0])
            writer.writerows(
                [cell if isinstance(cell, str) else json.dumps(cell) for cell in row.values()] for row in rows
            )
    else:
        content = (json.dumps(rows) if path.suffix == ".json" else lines).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz")
FORMS = tuple(in_every_form(0, ""))


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("form", FORMS)
def test_no_format_or_form_brings_an_identifier_in(form: str, ending: str, tmp_path: Path) -> None:
    """The reference is the same file read without redaction, whose records hold all of them."""
    rows = [
        in_every_form(number, words.format(value))[form]
        for number, (words, value) in enumerate(each for planted in PLANTED.values() for each in planted)
    ]
    path = tmp_path / f"records{ending}"
    write_file(path, rows)
    contents = []
    for kinds in ((), KINDS):
        records = list(iter_records([str(path)], ReadOptions(redact=kinds), needs_response=True))
        assert [type(record) for record in records] == [Record] * len(rows)
        contents.append("\n".join(map(str, records)))
    assert all(repr(value)[1:-1] in contents[0] for value in VALUES)
    assert [value for value in VALUES if value in contents[1] or repr(value)[1:-1] in contents[1]] == []


@pytest.fixture
def planted_file(tmp_path: Path) -> Path:
    """A record for each planted value, which is in every field of it; after plain ones, and before faulty ones."""
    rows: list[Any] = [{"id": f"p{n}", "instruction": f"Why {n}?", "response": "Because."} for n in range(3)]
    for kind, planted in PLANTED.items():
        for number, (words, value) in enumerate(planted):
            text = words.format(value)
            rows.append(
                {
                    "id": f"{kind} {number}: {text}",
                    "instruction": f"Why? {text}",
                    "input": f"{text}\n{text}",
                    "response": f"About {text}. Again {value}.",
                    "category": text,
                    "form": text,
                    "facts": [{"text": text, "kind": "copied"}, {"text": value, "kind": text}],
                }
            )
    everything = " ".join(words.format(value) for planted in PLANTED.values() for words, value in planted)
    rows.append({"id": f"overlong {everything}", "instruction": everything * 3, "response": everything})
    rows.append({"id": f"no response {everything}", "instruction": everything, "response": None, "note": everything})
    rows.append({"id": "p0", "instruction": everything, "response": everything})
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = tmp_path / "given.jsonl"
    path.write_text("\n".join([*lines, f'{{"instruction": "{everything}'.replace("\n", " ")]) + "\n", "utf-8")
    for form, ending in zip(FORMS, (".parquet", ".csv", ".json", ".jsonl.gz", ".tsv"), strict=True):
        texts = [" ".join(words.format(value) for words, value in planted[:2]) for planted in PLANTED.values()]
        write_file(tmp_path / f"{form}{ending}", [in_every_form(n, text)[form] for n, text in enumerate(texts)])
    return path


def run(phi_dir: Path, path: Path, *arguments: str, **settings: str) -> None:
    splits = ("train", "val", "test", "predict") if str(path) != "-" else ("predict",)
    sources = str(path)
    if path.name == "given.jsonl":
        others = [next(path.parent.glob(f"{form}.*")) for form in FORMS]
        sources = f"[{', '.join(map(str, [path, *others]))}]"
    files = [f"--data.{split}_files={sources}" for split in splits]
    defaults = {
        "model.base": str(phi_dir),
        "model.dtype": "float32",
        "model.max_new_tokens": "4",
        "data.max_length": "192",
        "data.on_overlong": "skip",
        "data.on_bad_record": "skip",
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": "1",
        "trainer.limit_train_batches": "2",
        "trainer.limit_val_batches": "2",
        "run_name": "private",
    }
    command, *rest = arguments
    given = [*rest, *(f"--{key}={value}" for key, value in (defaults | settings).items())]
    assert main([command, *files, *given]) == 0


def leaked(folder: Path) -> dict[str, list[str]]:
    """The planted values in each file below a folder."""
    found = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        content = file.read_bytes().decode("utf-8", "replace")
        if file.suffix == ".parquet":
            content += str(parquet.read_table(file).to_pylist())
        escaped = {value: json.dumps(value)[1:-1] for value in VALUES}
        values = [value for value in VALUES if value in content or escaped[value] in content]
        if values:
            found[str(file.relative_to(folder))] = values
    return found


def text_of_drafts(folder: Path, phi_dir: Path) -> str:
    """What the tokens in the drafts.npz of a run below a folder stand for."""
    index = NgramIndex.load(next(folder.rglob(INDEX_FILE)))
    assert index is not None
    return str(load_tokenizer(resolve_base_model(str(phi_dir))).decode(index.tokens.tolist()))


def test_no_file_of_a_run_holds_a_planted_identifier(
    phi_dir: Path,
    planted_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of fit, test, predict, inspect and exports, with a cache; a run without redaction shows what would be found."""
    (folder := tmp_path / "w").mkdir()
    monkeypatch.chdir(folder)
    caplog.set_level("DEBUG")
    monkeypatch.setattr(cache, "MAX_IN_MEMORY_BYTES", 0)
    run(phi_dir, planted_file, "fit", **{"data.redact": "all"})
    run(phi_dir, planted_file, "test", "--ckpt_path=last", "--max_completions=2", **{"data.redact": "all"})
    run(phi_dir, planted_file, "predict", "--ckpt_path=last", **{"data.redact": "all"})
    run(phi_dir, planted_file, "inspect", **{"data.redact": "all"})
    for format in ("peft", "merged", "mlx"):
        export = ["--ckpt_path=last", f"--format={format}", f"--output_dir={format}", f"--check={int(format != 'mlx')}"]
        run(phi_dir, planted_file, "export", *export, **{"data.redact": "all"})
    printed = "\n".join([*capsys.readouterr(), caplog.text])
    assert leaked(folder) == {}
    drafts = text_of_drafts(folder, phi_dir)
    assert "[CLAIM_NUMBER_1]" in drafts
    assert [value for value in VALUES if value in drafts or value in printed] == []
    names = {file.name for file in folder.rglob("*")}
    assert {"rejected.jsonl", "samples.jsonl", "predictions.jsonl", "examples.arrow", "last.ckpt"} < names
    assert {"adapter_model.safetensors", "model.safetensors", "adapters.safetensors", "README.md"} < names
    assert "  redacted           " in printed


def test_without_redaction_the_same_files_hold_identifiers(
    phi_dir: Path, planted_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above would see them."""
    (folder := tmp_path / "w").mkdir()
    monkeypatch.chdir(folder)
    run(phi_dir, planted_file, "predict", "--trainer.limit_predict_batches=1")
    assert leaked(folder)


TEXTS = {"instruction": "Why CLM-2024-00017?", "input": "CLM-2024-00017", "response": "Of CLM-2024-00017."}


def test_outputs_are_redacted_though_training_is_not(
    phi_dir: Path, write_jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records have the claim number in every part, and the model is trained on it."""
    path = write_jsonl([{"id": f"CLM-2024-0001{n}", **TEXTS} for n in range(4)])
    (folder := tmp_path / "w").mkdir()
    monkeypatch.chdir(folder)
    output = {"data.redact_output": "[claim_number]"}
    run(phi_dir, path, "fit", **output)
    run(phi_dir, path, "predict", "--ckpt_path=last", **output)
    for name in ("samples.jsonl", "predictions.jsonl"):
        content = next(folder.rglob(name)).read_text("utf-8")
        assert "[CLAIM_NUMBER_1]" in content
        assert "2024" not in content
    events = b"".join(file.read_bytes() for file in folder.rglob("events.out*"))
    assert b"[CLAIM_NUMBER_1]" in events
    assert b"CLM-2024" not in events
    assert "Of CLM-2024-00017." in text_of_drafts(folder, phi_dir)
    run(phi_dir, path, "predict", "--ckpt_path=last", "--output=plain.jsonl")
    assert "Of CLM-2024-00017." in (folder / "plain.jsonl").read_text("utf-8")


def test_a_completion_has_the_placeholders_of_its_record() -> None:
    """Also where its output was stored with placeholders before the record is added."""
    record = Record("CLM-2024-00017", *TEXTS.values(), "a.jsonl:7")
    output = {
        "index": 0,
        "completion": "As CLM-2024-00099 and CLM-2024-00017.",
        "finish_reason": "stop",
        "new_tokens": 9,
    }
    redacted = redact_output(record, output, ["claim_number"])
    assert redacted == output | {"completion": "As [CLAIM_NUMBER_2] and [CLAIM_NUMBER_1]."}
    assert to_prediction(record, Example("", [1], 1), redacted, ["claim_number"]) == {
        "id": "a.jsonl:7",
        "instruction": "Why [CLAIM_NUMBER_1]?",
        "input": "[CLAIM_NUMBER_1]",
        "reference": "Of [CLAIM_NUMBER_1].",
        "completion": "As [CLAIM_NUMBER_2] and [CLAIM_NUMBER_1].",
        "finish_reason": "stop",
        "new_tokens": 9,
    }


def test_every_output_of_predict_is_redacted(
    phi_dir: Path,
    write_jsonl: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """JSON Lines, CSV, Parquet, and standard output of a file and of standard input."""
    path = write_jsonl([{"id": f"CLM-2024-0001{n}", **TEXTS} for n in range(2)])
    (folder := tmp_path / "w").mkdir()
    monkeypatch.chdir(folder)
    output = {"data.redact_output": "[claim_number]"}
    contents = []
    for name in ("out.jsonl", "out.csv", "out.parquet"):
        run(phi_dir, path, "predict", f"--output={name}", **output)
        file = folder / name
        contents.append(str(parquet.read_table(file).to_pylist()) if ".parquet" in name else file.read_text("utf-8"))
    capsys.readouterr()
    run(phi_dir, path, "predict", "--output=-", **output)
    contents.append(capsys.readouterr().out)
    read_end, write_end = os.pipe()
    os.write(write_end, path.read_bytes())
    os.close(write_end)
    monkeypatch.setattr(sys, "stdin", os.fdopen(read_end))
    run(phi_dir, Path("-"), "predict", "--output=-", **output)
    contents.append(capsys.readouterr().out)
    for content in contents:
        assert content.count("Why [CLAIM_NUMBER_1]?") == 2
        assert "2024" not in content


def test_a_question_is_redacted_as_a_record_is(
    phi_dir: Path,
    write_jsonl: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With data.redact the model reads placeholders: the answer is that to the redacted text, and not to the text."""
    monkeypatch.chdir(tmp_path)
    flags = [
        f"--model.base={phi_dir}",
        "--model.dtype=float32",
        "--model.max_new_tokens=6",
        "--trainer.accelerator=cpu",
    ]
    answers = []
    for text, *redact_flag in (
        ("Why CLM-2024-00017?", "--data.redact=all"),
        ("Why [CLAIM_NUMBER_1]?",),
        ("Why CLM-2024-00017?",),
    ):
        capsys.readouterr()
        assert main(["predict", *flags, "--instruction", text, *redact_flag]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]
