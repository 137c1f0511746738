"""The files that a run leaves, and at which steps they are written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from helpers import new_data, new_module, new_trainer, weights_of
from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.training.callbacks.samples import SampleWriter
from lit_phi2.training.tensorboard import truncate_events


def test_a_run_writes_scalars_samples_checkpoints_and_adapter(
    phi_dir: Path, train_file: Path, tmp_path: Path, read_events: Callable[[Path], EventAccumulator]
) -> None:
    module = new_module(phi_dir)
    start = weights_of(module)
    trainer = new_trainer(tmp_path, keep=True, max_epochs=2, num_sanity_val_steps=-1, accumulate_grad_batches=2)
    trainer.fit(module, new_data(phi_dir, train_file))
    folder = tmp_path / "run" / "version_0"
    events = read_events(folder)

    steps = trainer.global_step
    assert steps > 2
    for tag in ("train/loss", "train/grad_norm", "train/tokens_per_second", "train/supervised_tokens", "lr"):
        assert [event.step for event in events.Scalars(tag)] == list(range(1, steps + 1)), tag
    for tag in ("val/loss", "val/perplexity", "val/token_accuracy"):
        assert [event.step for event in events.Scalars(tag)] == [0, steps // 2, steps], tag
    assert [event.step for event in events.Tensors("samples/0/text_summary")] == [0, steps // 2, steps]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [sample["step"] for sample in samples] == [0] * 4 + [steps // 2] * 4 + [steps] * 4
    assert {path.name for path in folder.iterdir()} == {
        "adapter",
        "checkpoints",
        "config.yaml",
        "drafts.npz",
        "ledger.parquet",
        "ledger_key.json",
        "provenance.json",
        "report.html",
        "samples.jsonl",
        next(folder.glob("events.out.tfevents*")).name,
    }
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}

    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(last["state_dict"]) == set(start), "the adapter and nothing of the base"
    assert all(torch.equal(weight, last["state_dict"][name]) for name, weight in weights_of(module).items())
    values = [event.value for event in events.Scalars("val/loss")][1:]
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == (steps if values[1] < values[0] else steps // 2)
    exported = read_adapter(folder / "adapter").weights
    assert all(torch.equal(weight, exported[name]) for name, weight in best["state_dict"].items())
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in load_file(
        folder / "adapter" / "adapter_model.safetensors"
    )


def test_samples_do_not_change_the_trained_weights(
    phi_dir: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with dropout: samples change no mode, no cache flag and no random state."""
    final_weights = []
    for samples in (True, False):
        if not samples:
            monkeypatch.setattr(SampleWriter, "on_validation_end", lambda self, trainer, pl_module: None)
        module = new_module(phi_dir, dropout=True, lora_dropout=0.2)
        new_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=-1).fit(module, new_data(phi_dir, train_file))
        final_weights.append(weights_of(module))
        assert (tmp_path / "run" / f"version_{1 - samples:d}" / "samples.jsonl").is_file() == samples
    for name, weight in final_weights[0].items():
        assert torch.equal(weight, final_weights[1][name]), name


@pytest.mark.parametrize("settings", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}])
def test_a_run_that_ends_inside_an_epoch_saves_its_last_step(
    settings: dict[str, Any], phi_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    module = new_module(phi_dir)
    data = new_data(phi_dir, train_file, packing=False)
    new_trainer(tmp_path, keep=True, max_steps=15, max_epochs=-1, **settings).fit(module, data)
    folder = tmp_path / "run" / "version_0"
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 15
    exported = read_adapter(folder / "adapter").weights
    assert all(torch.equal(weight, exported[name]) for name, weight in weights_of(module).items())


def test_best_ckpt_is_never_written_inside_a_window(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """Accumulation windows of 4 batches, a validation due every 6: it waits until batch 8, and the next is at 12."""
    module = new_module(phi_dir)
    data = new_data(phi_dir, train_file, packing=False)
    saved: list[tuple[int, int]] = []
    trainer = new_trainer(tmp_path, keep=True, max_epochs=2, accumulate_grad_batches=4, val_check_interval=6)
    save = trainer.save_checkpoint
    trainer.save_checkpoint = lambda path, **kwargs: (  # type: ignore[method-assign]
        saved.append((trainer.fit_loop.epoch_loop.batch_progress.current.ready, trainer.global_step)),
        save(path, **kwargs),
    )
    trainer.fit(module, data)
    assert [ready for ready, _ in saved] == [8, 12, 8, 12]
    best = torch.load(tmp_path / "run" / "version_0" / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] in (3, 6)


def test_what_a_killed_resume_leaves_is_not_read_as_curves(
    tmp_path: Path, read_events: Callable[[Path], EventAccumulator]
) -> None:
    """TensorBoard reads every file with tfevents in its name, whatever its ending."""
    with SummaryWriter(tmp_path) as writer:
        for step in range(3):
            writer.add_scalar("train/loss", 1.0, step)
    (file,) = tmp_path.iterdir()
    shutil.copy(file, f"{file}.new")
    Path(f"{file}.new.lock").touch()
    truncate_events(tmp_path, 1)
    assert list(tmp_path.iterdir()) == [file]
    assert [event.step for event in read_events(tmp_path).Scalars("train/loss")] == [0, 1]
