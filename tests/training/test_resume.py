"""A resumed run is the same run, bit for bit in float32 on the CPU."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from helpers import new_data, new_module, new_trainer, weights_of
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.errors import InputError
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.trainer import Trainer

Jsonl = Callable[..., Path]
EPOCHS, ACCUMULATE = 2, 5
STEPS_PER_EPOCH = 3  # twelve records, one to a row, five to a window: 5, 5 and 2


class SaveAt(Callback):
    """Copies last.ckpt as it stands after a step, or dies there."""

    def __init__(self, step: int, error: Exception) -> None:
        self.step = step
        self.error = error

    def on_train_batch_start(self, trainer: Trainer, pl_module: LitPhi2, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise self.error


def setup_run(phi_dir: Path, train_file: Path, **settings: Any) -> tuple[LitPhi2, ClaimsDataModule]:
    """With every dropout on, and a validation inside the epoch: after each window that can have one."""
    module = new_module(phi_dir, dropout=True, lora_dropout=0.2, warmup_ratio=0.2)
    return module, new_data(phi_dir, train_file, packing=False, **settings)


def trainer_for(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    defaults = {
        "max_epochs": EPOCHS,
        "accumulate_grad_batches": ACCUMULATE,
        "val_check_interval": ACCUMULATE,
        "num_sanity_val_steps": -1,
    }
    return new_trainer(folder, callbacks, keep=True, **(defaults | settings))


@pytest.fixture(scope="module")
def whole_run(phi_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Tensor]]:
    """The uninterrupted run: its records, its folder and its last weights."""
    folder = tmp_path_factory.mktemp("whole")
    words = "claim denied appeal letter plan review records date service coverage notice send".split()  # noqa: SIM905
    records = [
        {"instruction": " ".join(words[: 2 + n % 5]), "response": " ".join(words[n % 3 : 4 + n % 7])} for n in range(12)
    ]
    train_file = folder / "records.jsonl"
    train_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    module, data = setup_run(phi_dir, train_file)
    trainer = trainer_for(folder)
    trainer.fit(module, data)
    assert trainer.global_step == EPOCHS * STEPS_PER_EPOCH
    return train_file, folder / "run" / "version_0", weights_of(module)


@pytest.mark.parametrize("step", range(1, EPOCHS * STEPS_PER_EPOCH))
def test_a_run_that_dies_and_is_resumed_ends_in_the_same_weights(
    step: int, whole_run: tuple[Path, Path, dict[str, Tensor]], phi_dir: Path, tmp_path: Path
) -> None:
    """It dies in the window after each step, and goes on from last.ckpt in a new process's objects."""
    train_file, whole_folder, expected = whole_run
    module, data = setup_run(phi_dir, train_file)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer_for(tmp_path, SaveAt(step, RuntimeError("power cut"))).fit(module, data)
    last = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == step

    module, data = setup_run(phi_dir, train_file)
    trainer = trainer_for(tmp_path)
    trainer.fit(module, data, ckpt_path=str(last))
    assert trainer.global_step == EPOCHS * STEPS_PER_EPOCH
    for name, weight in weights_of(module).items():
        assert torch.equal(weight, expected[name]), name
    resumed = tmp_path / "run" / "version_0"
    assert sorted(path.name for path in resumed.parent.iterdir()) == ["version_0"], "it goes on in the same folder"
    for name in ("last.ckpt", "best.ckpt"):
        got, want = (torch.load(folder / "checkpoints" / name, weights_only=True) for folder in (resumed, whole_folder))
        assert got["global_step"] == want["global_step"]
        assert all(torch.equal(got["state_dict"][key], weight) for key, weight in want["state_dict"].items())
    assert (resumed / "samples.jsonl").read_text() == (whole_folder / "samples.jsonl").read_text()


@pytest.mark.parametrize("written", [[], ["adapter_model.safetensors"]])
def test_a_run_that_died_while_it_exported_exports_when_it_is_resumed(
    written: list[str], whole_run: tuple[Path, Path, dict[str, Tensor]], phi_dir: Path, tmp_path: Path
) -> None:
    """All steps were taken, so Lightning's loop has nothing to do and calls no hook of training."""
    train_file, whole_folder, _ = whole_run
    folder = tmp_path / "version_0"
    shutil.copytree(whole_folder, folder)
    for path in (folder / "adapter").iterdir():
        if path.name not in written:
            path.unlink()
    module, data = setup_run(phi_dir, train_file)
    trainer_for(tmp_path).fit(module, data, ckpt_path=str(folder / "checkpoints" / "last.ckpt"))
    for path in (whole_folder / "adapter").iterdir():
        assert (folder / "adapter" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"lora_r": 2}, "model.lora_r: 4 in the checkpoint, 2 now"),
        ({"learning_rate": 1e-3}, "model.learning_rate: 0.0002 in the checkpoint, 0.001 now"),
        ({"seed": 7}, "seed_everything: 42 in the checkpoint, 7 now"),
        ({"max_epochs": 3}, "total_steps: 6 in the checkpoint, 9 now"),
        ({"max_length": 100}, "data.max_length: 128 in the checkpoint, 100 now"),
    ],
)
def test_a_resume_with_something_changed_that_matters_is_refused_with_both_values(
    changed: dict[str, Any],
    told: str,
    whole_run: tuple[Path, Path, dict[str, Tensor]],
    phi_dir: Path,
    tmp_path: Path,
) -> None:
    train_file, folder, _ = whole_run
    of_model = {key: value for key, value in changed.items() if key in ("lora_r", "learning_rate")}
    module = new_module(phi_dir, dropout=True, **({"lora_dropout": 0.2, "warmup_ratio": 0.2} | of_model))
    of_data = {key: value for key, value in changed.items() if key in ("seed", "max_length")}
    data = new_data(phi_dir, train_file, packing=False, **of_data)
    of_trainer = {key: value for key, value in changed.items() if key == "max_epochs"}
    with pytest.raises(InputError) as caught:
        trainer_for(tmp_path, **of_trainer).fit(module, data, ckpt_path=str(folder / "checkpoints" / "last.ckpt"))
    assert told in str(caught.value)
    assert "--model.adapter" in str(caught.value)


def test_a_checkpoint_holds_no_pickled_objects_and_stays_small(
    whole_run: tuple[Path, Path, dict[str, Tensor]],
) -> None:
    """Adapter, two moments and counters: under 4 x the adapter's own bytes plus the counters."""
    _, folder, weights = whole_run
    last = folder / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["lit_phi2"]["lora_r"] == 4
    assert last.stat().st_size < 4 * sum(weight.nbytes for weight in weights.values()) + 50_000
