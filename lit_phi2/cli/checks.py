"""Checks: refuse settings that would be ignored, or that would break what a run promises, before a model is loaded.

    parsed config   -> check_run_settings, check_trainer_settings, check_callbacks
    built Trainer   -> check_strategy

Lightning accepts most of what is refused here, and the run would then lose float32 LoRA weights, its step-0 baseline
or its checkpoints without notice.
"""

import math
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Checkpoint, DeviceStatsMonitor, EarlyStopping, LearningRateMonitor, Timer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lit_phi2.cli.messages import did_you_mean
from lit_phi2.cli.trainer_values import check_values
from lit_phi2.errors import InputError
from lit_phi2.training.trainer import Trainer

MONITORED = ("val/loss", "val/perplexity", "val/token_accuracy")


def check_run_settings(config: Any) -> None:
    """Check the keys outside model, data and trainer.

    Args:
        config: the parsed config of a subcommand, before run_name has its default.

    Raises:
        InputError: names the key and its range.
    """
    if not 0 <= config.seed_everything < 2**32:
        raise InputError(f"seed_everything: {config.seed_everything} is not between 0 and {2**32 - 1}.")
    for key in ("every_n_steps", "every_minutes"):
        value = config.checkpoint[key]
        if value is not None and not value > 0:
            raise InputError(f"checkpoint.{key}: {value} is not above 0.")
    for key, value in config.leakage.as_dict().items():
        highest = math.inf if key == "max_exposure" else 1
        if not 0 <= value <= highest:
            raise InputError(f"leakage.{key}: {value} is not between 0 and {highest}.")


def check_run_name(run_name: str) -> None:
    """Refuse a name that would put the run outside its folder.

    Raises:
        InputError: run_name is not a single path component.
    """
    if Path(run_name).name != run_name or run_name in ("", ".", ".."):
        raise InputError(f"run_name: {run_name!r} is not a valid folder name; expected one without '/'.")


def check_trainer_settings(trainer: Any) -> None:
    """Check the trainer section of a config.

    Raises:
        InputError: names the key and what to use instead.
    """
    check_values(trainer)
    if trainer.precision not in (None, 32, "32", "32-true"):
        raise InputError(
            f"trainer.precision: {trainer.precision} is not supported here; the compute dtype is model.dtype (auto, "
            "bfloat16, float16 or float32), and LoRA weights are always float32."
        )
    _check_accelerator(str(trainer.accelerator))
    if trainer.use_distributed_sampler:
        raise InputError(
            "trainer.use_distributed_sampler: must be false; the data module distributes records to processes itself."
        )
    if trainer.num_sanity_val_steps not in (-1, 0):
        raise InputError(
            "trainer.num_sanity_val_steps: must be -1, so that every curve starts with the base measured on all of "
            "val_files, or 0, to skip that."
        )
    if trainer.reload_dataloaders_every_n_epochs:
        raise InputError(
            "trainer.reload_dataloaders_every_n_epochs: must be 0; every epoch is scheduled again without it."
        )
    if trainer.barebones:
        raise InputError("trainer.barebones: must be false; it would drop curves, samples and checkpoints.")


def _check_accelerator(accelerator: str) -> None:
    missing = {
        "cuda": not torch.cuda.is_available(),
        "mps": not torch.backends.mps.is_available(),
        "gpu": not (torch.cuda.is_available() or torch.backends.mps.is_available()),
    }
    if missing.get(accelerator.lower()):
        raise InputError(
            f"trainer.accelerator: {accelerator} was requested, but torch {torch.__version__} finds none on this "
            "machine. Use auto or cpu, or install a torch that was built for your card."
        )


def check_callbacks(trainer: Any, *, fit: bool) -> None:
    """Check trainer.callbacks, one callback or a list of them.

    Args:
        trainer: the trainer section, with its classes built.
        fit: the subcommand is fit; others need no validation and no logger.

    Raises:
        InputError: a callback writes checkpoints of its own, or needs what this run does not have.
    """
    for callback in trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]:
        name = type(callback).__name__
        if isinstance(callback, Checkpoint):
            raise InputError(
                f"trainer.callbacks: {name} is not supported here; every run writes the last and the best checkpoint "
                "itself (trainer.enable_checkpointing: false writes none)."
            )
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in MONITORED:
            raise InputError(
                f"trainer.callbacks: {name} monitors {monitor!r}, which is not measured."
                f"{did_you_mean(monitor.replace('_', '/', 1), MONITORED)} Measured: {', '.join(MONITORED)}."
            )
        if isinstance(callback, Timer):
            _check_timer(callback)
        if isinstance(callback, EarlyStopping) and fit:
            _check_early_stopping(callback, trainer)
        if isinstance(callback, LearningRateMonitor | DeviceStatsMonitor) and fit and trainer.logger in (False, []):
            raise InputError(
                f"trainer.callbacks: {name} writes to a logger, but trainer.logger is false. Remove one of them."
            )


def _check_timer(timer: Timer) -> None:
    if timer.time_remaining() is None:
        raise InputError(
            "trainer.callbacks: Timer has no duration, so it never stops the run. Remove it, or set trainer.max_time."
        )
    if isinstance(timer._interval, Enum):
        raise InputError(
            "trainer.callbacks: Timer has its default interval, which config.yaml cannot hold. Set its init_args: "
            "interval: step or epoch, or remove it and set trainer.max_time, which also stops after a step."
        )


def _check_early_stopping(callback: EarlyStopping, trainer: Any) -> None:
    """Refuse EarlyStopping that would look for a metric where none is measured."""
    if trainer.limit_val_batches == 0 and not trainer.overfit_batches:
        raise InputError(
            "trainer.callbacks: EarlyStopping needs a validation, but trainer.limit_val_batches is 0. Remove one of "
            "them."
        )
    at_epoch_end = callback._check_on_train_epoch_end
    is_timed = not isinstance(trainer.val_check_interval, int | float | None)
    every_epoch = trainer.check_val_every_n_epoch == 1 and not is_timed
    if (at_epoch_end is None and is_timed) or (at_epoch_end and not every_epoch):
        raise InputError(
            "trainer.callbacks: EarlyStopping would look for val/loss at the end of every epoch, and not every epoch "
            "is validated then. Set its init_args: check_on_train_epoch_end: false."
        )


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies that shard or spawn; they are for models whose weights are mostly trained.

    Raises:
        InputError: the strategy is neither a single device nor DDP.
    """
    strategy = trainer.strategy
    if trainer.num_nodes > 1 and not strategy.cluster_environment.creates_processes_externally:
        raise InputError(
            f"trainer.num_nodes: {trainer.num_nodes} machines need torchrun or SLURM to start a process on each "
            "(configs/README.md); 1 is this machine alone."
        )
    spawned = getattr(strategy, "_start_method", "popen") != "popen"
    if spawned or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise InputError(
            f"trainer.strategy: {type(strategy).__name__} is not supported here: a frozen base of 2.8 B parameters "
            "with 2.3 M trained ones fits one card, so every process loads all of it. Use auto or ddp."
        )
    if isinstance(strategy, DDPStrategy):
        # Every rank reads the same base and initializes the same adapter; broadcasting 5.6 GB would change nothing.
        strategy._ddp_kwargs.setdefault("init_sync", False)
