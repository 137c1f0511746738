"""Limits: settings of the Trainer that do not fit the number of batches, which is known when the data is set up.

12 batches, 2 epochs   val_check_interval 13        Lightning's ValueError, in a run folder that it leaves
                       check_val_every_n_epoch 3    a run without a validation and without a best checkpoint
                       limit_val_batches 0.01       no batch at all
"""

import logging
import math

import lightning.pytorch as pl

from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.errors import InputError
from lit_phi2.training.optim import total_steps

log = logging.getLogger(__name__)

_NONE = "trainer.limit_val_batches: 0 validates never"


def check_limits(trainer: pl.Trainer, data: ClaimsDataModule, stage: str) -> None:
    """Compare the limits and intervals of a Trainer with the batches of this process.

    Args:
        trainer: of the run.
        data: set up for the stage.
        stage: fit, validate, test or predict.

    Raises:
        InputError: names the setting, the number of batches and what to use instead.
    """
    if trainer.fast_dev_run:
        return  # Lightning replaces these settings
    if stage != "fit":
        name = "val" if stage == "validate" else stage
        if stage == "predict":  # its loader leaves out what is completed
            num_batches = len(data.prompt_batches("predict").share(0, trainer.world_size))
        else:
            num_batches = len(data.val_dataloader() if stage == "validate" else data.test_dataloader())
        _check_limit(trainer, f"limit_{name}_batches", num_batches, needed=True)
    else:
        _check_limit(trainer, "limit_train_batches", len(data.train_dataloader()), needed=True)
        _check_limit(trainer, "limit_val_batches", len(data.val_dataloader()), needed=False)
        _check_fit(trainer, data)


def _check_limit(trainer: pl.Trainer, name: str, num_batches: int, *, needed: bool) -> None:
    limit = getattr(trainer, name)
    if limit == 0 and needed:
        raise InputError(f"trainer.{name}: 0 leaves nothing to do; 1.0 takes all batches.")
    if isinstance(limit, float) and limit > 0 and int(limit * num_batches) == 0:
        name = "overfit_batches" if trainer.overfit_batches > 0 else name
        raise InputError(
            f"trainer.{name}: {limit} of {num_batches} batches is less than one; expected a number of batches, such as "
            f"1, or at least {1 / num_batches:.2g}."
        )


def _check_fit(trainer: pl.Trainer, data: ClaimsDataModule) -> None:
    """Compare the settings of a training run with its batches, steps and epochs."""
    steps_per_epoch, num_batches = data.steps_per_epoch(), data.num_training_batches()
    num_steps = total_steps(steps_per_epoch, trainer.max_epochs, trainer.max_steps)
    if trainer.min_steps and trainer.min_steps > num_steps:
        raise InputError(f"trainer.min_steps: {trainer.min_steps} is above the {num_steps} optimizer steps of the run.")
    has_curves = bool(trainer.loggers) or getattr(trainer, "enable_tensorboard", False)
    if trainer.log_every_n_steps > num_steps and has_curves:
        log.warning(
            "trainer.log_every_n_steps: %d is above the %d optimizer steps of the run: the training curves are empty",
            trainer.log_every_n_steps,
            num_steps,
        )
    if trainer.limit_val_batches == 0:
        return
    num_epochs = math.ceil(num_steps / steps_per_epoch)
    every_n_epoch = trainer.check_val_every_n_epoch
    if every_n_epoch is not None and every_n_epoch > num_epochs:
        raise InputError(
            f"trainer.check_val_every_n_epoch: {every_n_epoch} is above the {num_epochs} epochs of the run; {_NONE}."
        )
    interval = None if trainer._val_check_time_interval is not None else trainer.val_check_interval
    if isinstance(interval, int) and every_n_epoch is not None and interval > num_batches:
        raise InputError(
            f"trainer.val_check_interval: {interval} is above the {num_batches} batches of an epoch; 1.0 validates "
            "after every epoch, and trainer.check_val_every_n_epoch: null counts batches over the epochs."
        )
    if isinstance(interval, int) and every_n_epoch is None and interval > num_batches * num_epochs:
        raise InputError(
            f"trainer.val_check_interval: {interval} is above the {num_batches * num_epochs} batches of the run; "
            f"{_NONE}."
        )
