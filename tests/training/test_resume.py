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

from helpers import DieAt, new_data, new_module, new_trainer, weights_of
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.errors import InputError
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.trainer import Trainer

Jsonl = Callable[..., Path]
EPOCHS, ACCUMULATE = 2, 5
STEPS_PER_EPOCH = 3  # twelve records, one to a row, five to a window: 5, 5 and 2


def setup_run(phi_dir: Path, train_file: Path, **settings: Any) -> tuple[LitPhi2, ClaimsDataModule]:
    """A model with every dropout on, and data with one record a row."""
    module = new_module(phi_dir, dropout=True, lora_dropout=0.2, warmup_ratio=0.2)
    return module, new_data(phi_dir, train_file, packing=False, **settings)


def resumable_trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    defaults = {
        "max_epochs": EPOCHS,
        "accumulate_grad_batches": ACCUMULATE,
        "val_check_interval": ACCUMULATE,
        "num_sanity_val_steps": -1,
    }
    return new_trainer(folder, callbacks, keep=True, **(defaults | settings))


@pytest.fixture(scope="module")
def whole_run(phi_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Tensor]]:
    """An uninterrupted run: its records, its folder and its final weights."""
    folder = tmp_path_factory.mktemp("whole")
    words = "claim denied appeal letter plan review records date service coverage notice send".split()  # noqa: SIM905
    records = [
        {"instruction": " ".join(words[: 2 + n % 5]), "response": " ".join(words[n % 3 : 4 + n % 7])} for n in range(12)
    ]
    train_file = folder / "records.jsonl"
    train_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    module, data = setup_run(phi_dir, train_file)
    trainer = resumable_trainer(folder)
    trainer.fit(module, data)
    assert trainer.global_step == EPOCHS * STEPS_PER_EPOCH
    return train_file, folder / "run" / "version_0", weights_of(module)


@pytest.mark.parametrize("step", range(1, EPOCHS * STEPS_PER_EPOCH))
def test_a_run_that_dies_and_is_resumed_ends_in_the_same_weights(
    step: int, whole_run: tuple[Path, Path, dict[str, Tensor]], phi_dir: Path, tmp_path: Path
) -> None:
    """The run dies in the accumulation window after each step, and new objects resume it from last.ckpt."""
    train_file, whole_folder, expected = whole_run
    module, data = setup_run(phi_dir, train_file)
    with pytest.raises(RuntimeError, match="power cut"):
        resumable_trainer(tmp_path, DieAt(step)).fit(module, data)
    last = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == step

    module, data = setup_run(phi_dir, train_file)
    trainer = resumable_trainer(tmp_path)
    trainer.fit(module, data, ckpt_path=str(last))
    assert trainer.global_step == EPOCHS * STEPS_PER_EPOCH
    for name, weight in weights_of(module).items():
        assert torch.equal(weight, expected[name]), name
    resumed = tmp_path / "run" / "version_0"
    assert sorted(path.name for path in resumed.parent.iterdir()) == ["version_0"], "it resumes in its folder"
    for name in ("last.ckpt", "best.ckpt"):
        actual, reference = (
            torch.load(folder / "checkpoints" / name, weights_only=True) for folder in (resumed, whole_folder)
        )
        assert actual["global_step"] == reference["global_step"]
        assert all(torch.equal(actual["state_dict"][key], weight) for key, weight in reference["state_dict"].items())
    assert (resumed / "samples.jsonl").read_text() == (whole_folder / "samples.jsonl").read_text()


def test_a_resumed_run_in_8_bits_ends_in_the_same_weights(
    whole_run: tuple[Path, Path, dict[str, Tensor]], phi_dir: Path, tmp_path: Path
) -> None:
    """Outlier columns are those of the checkpoint, though the resumed run would measure others."""
    train_file, ends = whole_run[0], []
    for step in (None, 3):
        folder = tmp_path / str(step)
        for _ in range(1 if step is None else 2):
            module = LitPhi2(str(phi_dir), dtype="float32", quantization="int8", lora_dropout=0.2, max_new_tokens=8)
            data = new_data(phi_dir, train_file, packing=False)
            last = folder / "run" / "version_0" / "checkpoints" / "last.ckpt"
            if step is None or last.exists():
                resumable_trainer(folder).fit(module, data, ckpt_path=str(last) if last.exists() else None)
            else:
                with pytest.raises(RuntimeError, match="power cut"):
                    resumable_trainer(folder, DieAt(step)).fit(module, data)
        assert torch.load(last, weights_only=True)["lit_phi2"]["quantization"] == module.quantization_table
        ends.append(weights_of(module))
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


@pytest.mark.parametrize("written", [[], ["adapter_model.safetensors"]])
def test_a_run_killed_during_export_exports_on_resume(
    written: list[str], whole_run: tuple[Path, Path, dict[str, Tensor]], phi_dir: Path, tmp_path: Path
) -> None:
    """All steps are taken, so Lightning's loop ends at once and calls no training hook."""
    train_file, whole_folder, _ = whole_run
    folder = tmp_path / "version_0"
    shutil.copytree(whole_folder, folder)
    for path in (folder / "adapter").iterdir():
        if path.name not in written:
            path.unlink()
    module, data = setup_run(phi_dir, train_file)
    resumable_trainer(tmp_path).fit(module, data, ckpt_path=str(folder / "checkpoints" / "last.ckpt"))
    for path in (whole_folder / "adapter").iterdir():
        assert (folder / "adapter" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_r": 2}, "model.lora_r: 4 in the checkpoint, 2 now"),
        ({"use_rslora": True}, "model.use_rslora: False in the checkpoint, True now"),
        ({"lora_plus_ratio": 16.0}, "model.lora_plus_ratio: None in the checkpoint, 16.0 now"),
        ({"learning_rate": 1e-3}, "model.learning_rate: 0.0002 in the checkpoint, 0.001 now"),
        ({"seed": 7}, "seed_everything: 42 in the checkpoint, 7 now"),
        ({"max_epochs": 3}, "total_steps: 6 in the checkpoint, 9 now"),
        ({"max_length": 100}, "data.max_length: 128 in the checkpoint, 100 now"),
        ({"limit_val_batches": 3}, "trainer.limit_val_batches: validates on other batches (1.0 in the checkpoint"),
        ({"gradient_clip_algorithm": "value"}, "trainer.gradient_clip_algorithm: norm in the checkpoint, value now"),
    ],
)
def test_a_changed_setting_is_refused_with_both_values(
    changed: dict[str, Any],
    message: str,
    whole_run: tuple[Path, Path, dict[str, Tensor]],
    phi_dir: Path,
    tmp_path: Path,
) -> None:
    train_file, folder, _ = whole_run
    of_model = ("lora_r", "use_rslora", "lora_plus_ratio", "learning_rate", "seed")
    model_settings = {key: value for key, value in changed.items() if key in of_model}
    module = new_module(phi_dir, dropout=True, **({"lora_dropout": 0.2, "warmup_ratio": 0.2} | model_settings))
    data_settings = {key: value for key, value in changed.items() if key in ("seed", "max_length")}
    data = new_data(phi_dir, train_file, packing=False, **data_settings)
    trainer_keys = ("max_epochs", "limit_val_batches", "gradient_clip_algorithm")
    trainer_settings = {key: value for key, value in changed.items() if key in trainer_keys}
    with pytest.raises(InputError) as error:
        resumable_trainer(tmp_path, **trainer_settings).fit(
            module, data, ckpt_path=str(folder / "checkpoints" / "last.ckpt")
        )
    assert message in str(error.value)
    assert "--model.adapter" in str(error.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_auto_continues_in_the_dtype_of_the_run(dtype: str, phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """Whichever of them `auto` chooses on this machine now."""
    data = new_data(phi_dir, train_file)
    new_trainer(tmp_path, keep=True, max_steps=2).fit(new_module(phi_dir, dtype=dtype), data)
    last = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    module = LitPhi2(base=str(phi_dir), max_new_tokens=8, lora_r=4, lora_alpha=8, warmup_ratio=0.0, dtype="auto")
    new_trainer(tmp_path, keep=True, max_steps=2).fit(module, data, ckpt_path=str(last))
    assert module.fused_phi.lm_head.weight.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_edited_file_is_noticed_on_resume(
    split: str, whole_run: tuple[Path, Path, dict[str, Tensor]], phi_dir: Path, tmp_path: Path
) -> None:
    """One word of one response. best.ckpt compares val/loss over the whole run, so val_files must stay as well."""
    train_file, folder, _ = whole_run
    edited = tmp_path / "records.jsonl"
    edited.write_text(train_file.read_text().replace("claim", "appeal", 1))
    module = new_module(phi_dir, dropout=True, lora_dropout=0.2, warmup_ratio=0.2)
    data = new_data(phi_dir, train_file, packing=False)
    data.files[split] = str(edited)
    with pytest.raises(InputError) as error:
        resumable_trainer(tmp_path).fit(module, data, ckpt_path=str(folder / "checkpoints" / "last.ckpt"))
    kind = {"train": "training", "val": "validation"}[split]
    assert f"data.{split}_files: have other {kind} records" in str(error.value)
    assert "--model.adapter" in str(error.value)


def test_a_checkpoint_holds_no_pickled_objects_and_stays_small(
    whole_run: tuple[Path, Path, dict[str, Tensor]],
) -> None:
    """Adapter, two moments of AdamW and counters: less than 4 x the bytes of the adapter, plus 50 kB."""
    _, folder, weights = whole_run
    last = folder / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["lit_phi2"]["lora_r"] == 4
    assert last.stat().st_size < 4 * sum(weight.nbytes for weight in weights.values()) + 50_000
