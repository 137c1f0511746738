"""LitPhi2 and ClaimsDataModule with Lightning's own Trainer, as a program or a notebook builds them."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import new_data, new_module, new_trainer, weights_of
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.errors import InputError
from lit_phi2.training.module import LitPhi2

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, about its own defaults
ACCUMULATE = 5  # twelve micro-batches in windows of 5, 5 and 2


def plain_trainer(folder: Path, **settings: Any) -> pl.Trainer:
    """Lightning's defaults, on the CPU and without a progress bar."""
    defaults = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "accumulate_grad_batches": ACCUMULATE,
    }
    return pl.Trainer(**(defaults | settings))


def dropout_module(phi_dir: Path) -> LitPhi2:
    return new_module(phi_dir, dropout=True, lora_dropout=0.2)


@pytest.fixture
def data(phi_dir: Path, train_file: Path) -> ClaimsDataModule:
    return new_data(phi_dir, train_file, packing=False, test_files=str(train_file))


def test_a_plain_trainer_takes_the_steps_of_ours(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """Bit for bit, though a validation is due inside every window."""
    weights = []
    for trainer in (
        plain_trainer(tmp_path, gradient_clip_val=1.0, val_check_interval=4),
        new_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=ACCUMULATE),
    ):
        module = dropout_module(phi_dir)
        trainer.fit(module, datamodule=new_data(phi_dir, train_file, packing=False))
        weights.append(weights_of(module))
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_its_validations_come_at_the_end_of_a_step(phi_dir: Path, data: ClaimsDataModule, tmp_path: Path) -> None:
    """Inside a window the weights are those of the step before, and the same loss would be there twice."""
    positions: list[tuple[int, int]] = []

    class Position(Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not trainer.sanity_checking:
                positions.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.ready))

    plain_trainer(tmp_path, max_epochs=1, val_check_interval=4, callbacks=[Position()]).fit(new_module(phi_dir), data)
    assert positions == [(1, 5), (2, 10), (3, 12)]


@pytest.mark.parametrize("batch", [1, 4, 6, 12, 13, 20])
def test_a_checkpoint_of_any_micro_batch_resumes_the_run(
    batch: int, phi_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    """Also one inside a window, whose gradients are not saved: the resumed run begins that window again."""

    class Save(Callback):
        seen = 0

        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            self.seen += 1
            if self.seen == batch:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    whole, resumed = dropout_module(phi_dir), dropout_module(phi_dir)
    plain_trainer(tmp_path, callbacks=[Save()]).fit(whole, new_data(phi_dir, train_file, packing=False))
    trainer = plain_trainer(tmp_path)
    trainer.fit(resumed, new_data(phi_dir, train_file, packing=False), ckpt_path=tmp_path / "saved.ckpt")
    assert trainer.global_step == 6
    assert all(torch.equal(weight, weights_of(whole)[name]) for name, weight in weights_of(resumed).items())


def test_it_validates_tests_and_predicts_from_its_checkpoint(
    phi_dir: Path, data: ClaimsDataModule, tmp_path: Path
) -> None:
    """Reference: our Trainer on the weights in memory, and completions made one by one."""
    trained = new_module(phi_dir)
    trainer = plain_trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path, filename="saved")])
    trainer.fit(trained, data)
    ours = new_trainer(tmp_path)
    ours.validate(trained, data)
    module = new_module(phi_dir)
    path = str(tmp_path / "saved.ckpt")
    (validated,) = trainer.validate(module, datamodule=data, ckpt_path=path)
    (tested,) = trainer.test(module, datamodule=data, ckpt_path=path)
    assert validated["val/loss"] == pytest.approx(ours.callback_metrics["val/loss"].item(), rel=1e-6)
    assert tested["test/loss"] == pytest.approx(validated["val/loss"], rel=1e-6)  # the same records
    predicted = [each for batch in trainer.predict(module, datamodule=data, ckpt_path=path) for each in batch]
    predicted.sort(key=lambda each: each["index"])
    examples = data.splits["predict"].examples
    expected = [trained.generate([example.ids[: example.prompt_length]])[0].ids for example in examples]
    assert [each["completion"] for each in predicted] == [data.tokenizer.decode(ids) for ids in expected]


def test_a_sanity_check_of_two_batches_is_no_point_of_a_curve(
    phi_dir: Path, data: ClaimsDataModule, tmp_path: Path
) -> None:
    """Lightning's default: its loss covers two of twelve records."""
    trainer = plain_trainer(tmp_path, max_epochs=1)
    trainer.fit(new_module(phi_dir), data)
    events = EventAccumulator(trainer.log_dir).Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [3]


def test_an_interrupted_fit_leaves_nothing_to_the_next(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    """Reference: the first logged loss of a module that was never interrupted."""

    class Interrupt(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 3:
                raise RuntimeError("interrupted")

    losses = []
    for interrupted in (True, False):
        module, data = new_module(phi_dir), new_data(phi_dir, train_file, packing=False)
        if interrupted:
            with pytest.raises(RuntimeError, match="interrupted"):
                plain_trainer(tmp_path, callbacks=[Interrupt()]).fit(module, data)
        trainer = plain_trainer(tmp_path, max_steps=1, log_every_n_steps=1)
        trainer.fit(module, data)
        losses.append(EventAccumulator(trainer.log_dir).Reload().Scalars("train/loss")[0].value)
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "bf16-mixed"}, "precision"),
        ({"precision": "bf16-true"}, "precision"),
        ({"strategy": "ddp_spawn", "devices": 2}, "DDPStrategy is not supported"),
        ({"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})], "accumulate_grad_batches": 1}, "every epoch"),
    ],
)
def test_trainer_settings_that_change_the_training_are_refused(
    settings: dict[str, Any], message: str, phi_dir: Path, data: ClaimsDataModule, tmp_path: Path
) -> None:
    trainer = plain_trainer(tmp_path, **settings)
    module = LitPhi2(base=str(phi_dir), max_new_tokens=8)
    module.trainer = trainer
    trainer.datamodule = data
    with pytest.raises(InputError, match=message) as error:
        module.setup("fit")
    assert len(str(error.value).splitlines()) == 1
    assert module.phi is None, "refused before the base is loaded"


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"base": "tiny"}, "base"), ({"max_new_tokens": 9}, "max_new_tokens"), ({"seed": 1}, "seed")],
)
@pytest.mark.parametrize("ours", [True, False])
def test_model_and_data_that_disagree_are_refused(
    ours: bool, changed: dict[str, Any], message: str, phi_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    settings = {"base": str(phi_dir), "max_new_tokens": 8} | changed
    data = ClaimsDataModule(train_files=str(train_file), val_files=str(train_file), **settings)
    trainer: Any = new_trainer(tmp_path) if ours else plain_trainer(tmp_path)
    with pytest.raises(InputError, match=f"LitPhi2 has {message}.* but ClaimsDataModule has {message}"):
        trainer.fit(LitPhi2(base=str(phi_dir), max_new_tokens=8), datamodule=data)


def test_a_base_may_be_named_in_two_ways(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    data = new_data(phi_dir, train_file)
    data.base = str(phi_dir / ".." / phi_dir.name)
    plain_trainer(tmp_path, max_steps=1).fit(new_module(phi_dir), data)


def test_dataloaders_without_a_data_module_are_refused(phi_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pass datamodule=ClaimsDataModule"):
        plain_trainer(tmp_path).fit(new_module(phi_dir), train_dataloaders=[1, 2])


def test_a_checkpoint_of_another_run_is_refused(phi_dir: Path, train_file: Path, tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path, filename="saved")])
    trainer.fit(new_module(phi_dir), new_data(phi_dir, train_file, packing=False))
    packed = new_data(phi_dir, train_file)
    with pytest.raises(InputError, match=r"data\.packing: False in the checkpoint, True now"):
        plain_trainer(tmp_path).fit(new_module(phi_dir), packed, ckpt_path=tmp_path / "saved.ckpt")
    with pytest.raises(InputError, match="lora_r"):
        plain_trainer(tmp_path).test(
            new_module(phi_dir, lora_r=2, lora_alpha=4),
            new_data(phi_dir, train_file, test_files=str(train_file)),
            ckpt_path=tmp_path / "saved.ckpt",
        )
