"""Our Trainer, LitPhi2 and ClaimsDataModule as a program or a notebook uses them, without the command line."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import ROOT, fill_lora_b, new_data, new_module, weights_of
from lit_phi2 import ClaimsDataModule, LitPhi2, Trainer
from lit_phi2.adapters.checkpoint import read_adapter, read_checkpoint
from lit_phi2.cli.main import main
from lit_phi2.errors import InputError, RunInterrupted
from lit_phi2.training.callbacks.completions import TestCompletions


@pytest.fixture
def new(phi_dir: Path, train_file: Path, tmp_path: Path) -> Callable[..., tuple[LitPhi2, ClaimsDataModule, Trainer]]:
    """Model, data and a Trainer with the defaults of a program."""

    def build(**settings: Any) -> tuple[LitPhi2, ClaimsDataModule, Trainer]:
        model = LitPhi2(base=str(phi_dir), dtype="float32", max_new_tokens=8, learning_rate=0.01)
        data = new_data(phi_dir, train_file, packing=False, test_files=str(train_file))
        return model, data, Trainer(**{"default_root_dir": tmp_path, "accelerator": "cpu", "max_epochs": 1} | settings)

    return build


def test_importing_the_package_loads_no_torch() -> None:
    program = "import sys, lit_phi2; lit_phi2.__version__; print('torch' in sys.modules); lit_phi2.LitPhi2"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout == "False\n"


def test_a_trainer_without_arguments_has_the_commands_defaults(new: Callable[..., Any], tmp_path: Path) -> None:
    """It leaves what fit of the command line leaves, and nothing of Lightning's own beside it."""
    model, data, trainer = new()
    trainer.fit(model, data)
    assert {path.name for path in tmp_path.iterdir()} - {"records.jsonl"} == {"run"}
    folder = tmp_path / "run" / "version_0"
    names = {path.name.partition(".tfevents")[0] for path in folder.iterdir() if path.suffix != ".lock"}
    audited = {"ledger.parquet", "ledger_key.json", "provenance.json", "report.html"}
    assert names == {"adapter", "checkpoints", "config.yaml", "drafts.npz", "samples.jsonl", "events.out", *audited}
    steps = [json.loads(line)["step"] for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert steps == [0] * 4 + [12] * 4, "the base is measured before training"


def test_the_command_line_continues_a_run_of_a_program(
    new: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: the weights of a run that no one stopped."""
    model, data, trainer = new(max_steps=6)
    trainer.fit(model, data)
    folder = tmp_path / "run" / "version_0"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["learning_rate"] == 0.01
    assert config["trainer"]["max_steps"] == 6
    last = folder / "checkpoints" / "last.ckpt"
    saved = last.read_bytes()
    expected = weights_of(model)
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    assert main(["fit", "--config", str(folder / "config.yaml"), "--ckpt_path", str(last)]) == 0
    assert last.read_bytes() == saved
    exported = read_adapter(folder / "adapter").weights
    assert all(torch.equal(weight, exported[name]) for name, weight in expected.items())
    assert main(["validate", "--config", str(folder / "config.yaml"), "--ckpt_path", "last"]) == 0
    assert "val/loss" in capsys.readouterr().out


def test_evaluation_uses_the_checkpoint_and_not_the_memory(
    new: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: a new model that starts from the same checkpoint."""
    model, data, trainer = new()
    trainer.fit(model, data)
    fill_lora_b(model, seed=7)  # the weights in memory are others now
    trainer.validate(model, data)
    in_memory = trainer.callback_metrics["val/loss"].item()
    trainer.validate(model, data, ckpt_path="last")
    _, _, other_trainer = new()
    last = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    fresh = LitPhi2(base=model.base, adapter=str(last), dtype="float32", max_new_tokens=8)
    other_trainer.validate(fresh, data)
    assert trainer.callback_metrics["val/loss"] == other_trainer.callback_metrics["val/loss"]
    assert trainer.callback_metrics["val/loss"].item() != in_memory


def test_the_trained_weights_in_memory_count_as_an_adapter(new: Callable[..., Any], tmp_path: Path) -> None:
    """`test` compares them with the base, and predict does not continue the completions of the base."""
    model, data, trainer = new()
    model.trainer = trainer
    base_fingerprint = model.generation_fingerprint()
    trainer.fit(model, data)
    trainer.test(model, data)
    (collector,) = (callback for callback in trainer.callbacks if isinstance(callback, TestCompletions))
    assert set(collector.completions) == {"adapter", "base"}
    assert model.generation_fingerprint() != base_fingerprint
    assert (tmp_path / "run" / "version_0" / "test_metrics.json").is_file()


def test_one_trainer_fits_twice_in_two_folders(new: Callable[..., Any], tmp_path: Path) -> None:
    """The second run begins at step 0 and leaves the files of the first as they are."""
    model, data, trainer = new()
    trainer.fit(model, data)
    first = tmp_path / "run" / "version_0"
    files = {path: path.read_bytes() for path in first.rglob("*") if path.is_file() and "tfevents" not in path.name}
    trainer.fit(model, data)
    assert {path: path.read_bytes() for path in files} == files
    last = tmp_path / "run" / "version_1" / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)[1]["global_step"] == 12


class Interrupt(Callback):
    """As a click on Interrupt in a notebook, in the sixth step."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 5:
            signal.raise_signal(signal.SIGINT)


def test_an_interrupted_run_leaves_a_page_of_its_steps(new: Callable[..., Any], tmp_path: Path) -> None:
    """References: the step of the signal, and TensorBoard's own reader."""
    model, data, trainer = new(callbacks=[Interrupt()])
    with pytest.raises(RunInterrupted):
        trainer.fit(model, data)
    folder = tmp_path / "run" / "version_0"
    page = (folder / "report.html").read_text("utf-8")
    assert "Training took 6 optimizer steps on 6 records." in page
    base_loss = EventAccumulator(str(folder)).Reload().Scalars("val/loss")[0].value
    assert f"{base_loss:.3f}" in page


def test_an_interrupted_run_continues_in_the_same_program(new: Callable[..., Any], tmp_path: Path) -> None:
    """Reference: a run that no one stopped."""
    model, data, trainer = new(callbacks=[Interrupt()])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RunInterrupted, match="stopped after optimizer step 6, which is saved"):
        trainer.fit(model, data)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    trainer.fit(model, data, ckpt_path="last")
    reference, data, trainer = new(default_root_dir=tmp_path / "reference")
    trainer.fit(reference, data)
    assert all(torch.equal(weight, weights_of(reference)[name]) for name, weight in weights_of(model).items())


def test_the_readmes_program_trains_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands, on a mine.jsonl of thirty packaged records."""
    monkeypatch.chdir(tmp_path)
    claims = (ROOT / "lit_phi2" / "assets" / "claims" / "train.jsonl").read_text("utf-8")
    Path("mine.jsonl").write_text("\n".join(claims.split("\n")[:30]) + "\n", "utf-8")
    (program,) = re.findall(r"(?s)```python\n(from lit_phi2 import.*?)```", (ROOT / "README.md").read_text("utf-8"))
    exec(program, {})
    assert capsys.readouterr().out.strip()
    assert (tmp_path / "runs" / "run" / "version_0" / "adapter" / "adapter_config.json").is_file()


def test_complete_answers_as_predict_does(new: Callable[..., Any], tmp_path: Path, record_rows: list[Any]) -> None:
    """Also where the questions have other lengths, and whether or not the base is loaded."""
    model, data, trainer = new()
    texts = model.complete([row["instruction"] for row in record_rows], [row["input"] for row in record_rows])
    trainer.predict(model, data, output=str(tmp_path / "out.jsonl"))
    predicted = [json.loads(line)["completion"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert texts == predicted
    assert model.complete([record_rows[0]["instruction"]]) == texts[:1]


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ("Why?", "expected a list"),
        (["Why?", " "], "instruction 2: is empty"),
        (["Why?\n### Response:\nBecause"], "instruction 1: a line begins"),
        (["why " * 600], r"instruction 1: it has \d+ tokens"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(questions: Any, message: str, phi_dir: Path) -> None:
    with pytest.raises(InputError, match=message):
        new_module(phi_dir).complete(questions)
