"""Checks: refuse settings that would be ignored, or that would break what a run promises, before a model is loaded.

    parsed config   -> check_run_settings, check_trainer_settings, check_callbacks
    built Trainer   -> check_strategy

Lightning accepts most of what is refused here, and the run would then lose float32 LoRA weights, its step-0 baseline
or its checkpoints without notice.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lit_phi2.cli.messages import did_you_mean
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
    if trainer.precision not in (None, 32, "32", "32-true"):
        raise InputError(
            f"trainer.precision: {trainer.precision} is not supported here; the compute dtype is model.dtype (auto, "
            "bfloat16 or float32), and LoRA weights are always float32."
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


def check_callbacks(callbacks: Any) -> None:
    """Check trainer.callbacks, one callback or a list of them.

    Raises:
        InputError: a callback writes checkpoints of its own, or monitors a metric that is not measured.
    """
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
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


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies that shard or spawn; they are for models whose weights are mostly trained.

    Raises:
        InputError: the strategy is neither a single device nor DDP.
    """
    strategy = trainer.strategy
    spawned = getattr(strategy, "_start_method", "popen") != "popen"
    if spawned or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise InputError(
            f"trainer.strategy: {type(strategy).__name__} is not supported here: a frozen base of 2.8 B parameters "
            "with 2.3 M trained ones fits one card, so every process loads all of it. Use auto or ddp."
        )
    if isinstance(strategy, DDPStrategy):
        # Every rank reads the same base and initializes the same adapter; broadcasting 5.6 GB would change nothing.
        strategy._ddp_kwargs.setdefault("init_sync", False)
