"""cli/checks.py."""

from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lit_phi2.errors import InputError
from lit_phi2.training.trainer import Trainer

MONITORED = ("val/loss", "val/perplexity", "val/token_accuracy")


def check_trainer_settings(trainer: Any) -> None:
    """Refuse what would be ignored or would break the promises of the run.

    Raises:
        InputError: names the key and what to use instead.
    """
    if trainer.precision not in (None, 32, "32", "32-true"):
        raise InputError(
            f"trainer.precision: {trainer.precision} has no use here; the compute dtype is model.dtype (auto, bfloat16 "
            "or float32), and LoRA weights are always float32."
        )
    missing = {
        "cuda": not torch.cuda.is_available(),
        "mps": not torch.backends.mps.is_available(),
        "gpu": not (torch.cuda.is_available() or torch.backends.mps.is_available()),
    }
    if missing.get(str(trainer.accelerator).lower()):
        raise InputError(
            f"trainer.accelerator: {trainer.accelerator} was asked for, but torch {torch.__version__} finds none on "
            "this machine. Use auto or cpu, or install a torch that was built for your card."
        )
    if trainer.use_distributed_sampler:
        raise InputError("trainer.use_distributed_sampler: must be false; the plan deals records to processes itself.")
    if trainer.num_sanity_val_steps not in (-1, 0):
        raise InputError(
            "trainer.num_sanity_val_steps: must be -1, so that every curve starts at the base measured on all of "
            "val_files, or 0, to leave that out."
        )
    if trainer.reload_dataloaders_every_n_epochs:
        raise InputError(
            "trainer.reload_dataloaders_every_n_epochs: must be 0; the plan makes every epoch anew itself."
        )
    if trainer.barebones:
        raise InputError("trainer.barebones: must be false; it would drop curves, samples and checkpoints.")


def check_strategy(trainer: Trainer) -> None:
    """Refuse ways of running over several devices that were made for models of which most is trained.

    Raises:
        InputError: the strategy is neither of one device nor DDP.
    """
    strategy = trainer.strategy
    spawned = getattr(strategy, "_start_method", "popen") != "popen"
    if spawned or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise InputError(
            f"trainer.strategy: {type(strategy).__name__} has no use here: a frozen base of 2.8 B parameters with "
            "2.3 M trained ones fits one card, so every process holds it whole. Use auto or ddp."
        )
    if isinstance(strategy, DDPStrategy):
        # Every rank reads the same base and draws the same adapter; sending it 5.6 GB would change nothing.
        strategy._ddp_kwargs.setdefault("init_sync", False)
