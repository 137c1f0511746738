"""Settings of Lightning's Trainer: each takes effect in fit, or is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lit_phi2.training.module import LitPhi2

Fit = Callable[..., int]
ReadLast = Callable[..., dict]
RUN = Path("runs/small/version_0")


def test_fast_dev_run_leaves_no_files(fit: Fit) -> None:
    assert fit("--trainer.fast_dev_run", "true") == 0
    assert not Path("runs").exists()


def test_limit_train_batches_shortens_the_epoch(fit: Fit, read_last: ReadLast) -> None:
    assert fit("--trainer.limit_train_batches", "3") == 0
    assert read_last()["global_step"] == 6


def test_overfit_batches_repeats_the_same_records(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    record_ids: list[list[str]] = []
    training_step = LitPhi2.training_step
    monkeypatch.setattr(
        LitPhi2,
        "training_step",
        lambda self, batch, batch_idx: record_ids.append(batch.record_ids) or training_step(self, batch, batch_idx),
    )
    assert fit("--trainer.overfit_batches", "2") == 0
    assert len(record_ids) == 4
    assert record_ids[:2] == record_ids[2:]
    assert record_ids[0] != record_ids[1]


def test_max_steps_ends_with_validation_and_adapter(fit: Fit, read_last: ReadLast) -> None:
    assert fit("--trainer.max_steps", "5", "--trainer.accumulate_grad_batches", "2") == 0
    assert read_last()["global_step"] == 5
    steps = {json.loads(line)["step"] for line in (RUN / "samples.jsonl").read_text().splitlines()}
    assert steps == {0, 5}
    assert (RUN / "adapter" / "adapter_config.json").is_file()


def test_max_time_ends_the_run_after_a_full_window(fit: Fit, read_last: ReadLast) -> None:
    assert fit("--trainer.max_time", "00:00:00:01", "--trainer.max_epochs", "10000") == 0
    assert 0 < read_last()["global_step"] < 10000 * 12
    assert (RUN / "adapter" / "adapter_config.json").is_file()


def test_logger_false_writes_an_adapter_but_no_curves(fit: Fit) -> None:
    assert fit("--trainer.logger", "false", "--trainer.max_steps", "2") == 0
    assert not list(RUN.glob("events*"))
    assert (RUN / "adapter" / "adapter_model.safetensors").is_file()
    assert (RUN / "samples.jsonl").is_file()


def test_enable_checkpointing_false_writes_no_weights(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.enable_checkpointing", "false", "--trainer.max_steps", "2") == 0
    assert not (RUN / "checkpoints").exists()
    assert not (RUN / "adapter").exists()
    assert "no adapter will be kept" in capsys.readouterr().err


def test_early_stopping_in_yaml_stops_the_run(fit: Fit, read_last: ReadLast, tmp_path: Path) -> None:
    early_stopping = {
        "class_path": "lightning.pytorch.callbacks.EarlyStopping",
        "init_args": {"monitor": "val/loss", "patience": 1, "min_delta": 1e9},
    }
    (tmp_path / "early.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [early_stopping]}}))
    assert fit("--config", "early.yaml", "--run_name", "early", "--trainer.max_epochs", "9") == 0
    # The first epoch sets the best loss; the second cannot improve it by min_delta.
    assert read_last("runs/early/version_0")["global_step"] == 2 * 12
    assert Path("runs/early/version_0/adapter").is_dir()


def test_lightnings_checkpoint_callback_is_refused(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}]
    (tmp_path / "checkpoint.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    assert fit("--config", "checkpoint.yaml") == 2
    assert "trainer.callbacks: ModelCheckpoint" in capsys.readouterr().err
