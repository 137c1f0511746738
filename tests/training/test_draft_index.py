"""drafts.npz: it has the responses of its run, is in no other folder, and changes no answer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import fill_lora_b, new_data, new_module, new_trainer
from lit_phi2.cli.main import main
from lit_phi2.generation.ngrams import NgramIndex
from lit_phi2.pretrained import load_tokenizer, resolve_base_model
from lit_phi2.training.draft_index import INDEX_FILE, find_draft_index


@pytest.fixture
def run(phi_dir: Path, train_file: Path, tmp_path: Path) -> Path:
    """The folder of a run of one step."""
    new_trainer(tmp_path / "runs", keep=True, max_steps=1).fit(new_module(phi_dir), new_data(phi_dir, train_file))
    return tmp_path / "runs" / "run" / "version_0"


def test_the_index_has_the_responses_and_no_instruction(
    run: Path, phi_dir: Path, record_rows: list[dict[str, str]]
) -> None:
    """The texts of the records that were trained on, found in what the index decodes to."""
    index = NgramIndex.load(run / INDEX_FILE)
    assert index is not None
    text = load_tokenizer(resolve_base_model(str(phi_dir))).decode(index.tokens.tolist())
    assert all(row["response"] in text for row in record_rows)
    assert "### Instruction" not in text


def test_model_drafts_false_keeps_no_text(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    module = new_module(phi_dir, drafts=False)
    new_trainer(tmp_path, max_steps=1).fit(module, new_data(phi_dir, train_file))
    assert not list(tmp_path.rglob(INDEX_FILE))
    assert module.new_engine().drafts is None


def test_a_missing_or_broken_index_is_built_again(run: Path, phi_dir: Path, train_file: Path) -> None:
    data = new_data(phi_dir, train_file)
    expected = find_draft_index(run, data)
    assert expected is not None
    for damage in (lambda file: file.unlink(), lambda file: file.write_bytes(b"PK")):
        damage(run / INDEX_FILE)
        content = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        built = find_draft_index(run, data)
        assert built is not None
        assert built.tokens.tolist() == expected.tokens.tolist()
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == content, "it writes nothing"
        (run / INDEX_FILE).touch()


def test_a_run_whose_records_are_gone_has_no_index(run: Path, phi_dir: Path, train_file: Path) -> None:
    (run / INDEX_FILE).unlink()
    train_file.unlink()
    assert find_draft_index(run, new_data(phi_dir, train_file)) is None


def test_an_exported_adapter_has_no_index(run: Path, phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    arguments = ["--model.base", str(phi_dir), "--ckpt_path", str(run), "--output_dir", str(tmp_path / "out")]
    assert main(["export", *arguments, "--check", "0"]) == 0
    assert not list((tmp_path / "out").rglob("*.npz"))
    assert find_draft_index(tmp_path / "out", new_data(phi_dir, train_file)) is None


def test_predictions_are_the_same_with_drafts_and_without(
    run: Path, phi_dir: Path, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """Three records in float32, of an adapter that changes the base."""
    questions = write_jsonl([{"instruction": f"Why was claim {n} denied?"} for n in range(3)])
    lines = []
    for drafts in (True, False):
        module = new_module(phi_dir, dtype="float32", max_new_tokens=24, drafts=drafts)
        module.configure_model()
        fill_lora_b(module)
        data = new_data(phi_dir, questions, predict_files=str(questions), max_new_tokens=24)
        trainer = new_trainer(tmp_path / str(drafts))
        trainer.run_dir = run
        trainer.predict(module, data, output=str(tmp_path / f"{drafts}.jsonl"))
        assert (module.draft_index is not None) == drafts
        lines.append([json.loads(line) for line in (tmp_path / f"{drafts}.jsonl").read_text("utf-8").splitlines()])
    assert len(lines[0]) == 3
    assert lines[0] == lines[1]
