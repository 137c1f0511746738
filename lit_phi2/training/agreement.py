"""Agreement: model, data and Trainer fit together, whoever built them: the command line, a program or a notebook.

    LitPhi2(base="tiny", ...)   ClaimsDataModule(base="tiny", ...)   lightning's Trainer(...) or ours

A wrong pair would train without an error: on the ids of another tokenizer, or with LoRA weights rounded to 16 bits.
"""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lit_phi2.errors import InputError
from lit_phi2.pretrained import BaseModel, resolve_base_model
from lit_phi2.training.protocols import TrainingData


def check_data(data: TrainingData | None, *, base: BaseModel, max_new_tokens: int, seed: int) -> None:
    """Compare the model's base, max_new_tokens and seed with those of its data module.

    Raises:
        InputError: they differ, or there is no data module.
    """
    if not hasattr(data, "prompt_batches"):
        raise InputError(
            "LitPhi2 takes its batches from a ClaimsDataModule: pass datamodule=ClaimsDataModule(...), no dataloaders."
        )
    assert data is not None
    other_base = base if data.base == base.name else resolve_base_model(data.base)
    if other_base.folder != base.folder and other_base.digest != base.digest:
        raise InputError(
            f"LitPhi2 has base {base.name!r}, but ClaimsDataModule has base {data.base!r}; the ids of one mean nothing "
            "to the other. Give both the same."
        )
    for name, value, other in (("max_new_tokens", max_new_tokens, data.max_new_tokens), ("seed", seed, data.seed)):
        if value != other:
            raise InputError(
                f"LitPhi2 has {name}={value}, but ClaimsDataModule has {name}={other}. Give both the same."
            )


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse settings of a Trainer that would train something else without notice.

    Raises:
        InputError: names the setting and what to use instead.
    """
    if trainer.precision != "32-true":
        raise InputError(
            f"Trainer(precision={trainer.precision!r}): leave it out; the compute dtype is LitPhi2(dtype=...), and "
            "LoRA weights are always float32."
        )
    spawned = getattr(trainer.strategy, "_start_method", "popen") != "popen"
    if spawned or not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise InputError(
            f"Trainer(strategy=...): {type(trainer.strategy).__name__} is not supported; a frozen base with a small "
            "adapter fits one device. Use auto or ddp, and devices=1 in a notebook."
        )
    callbacks: list[Any] = trainer.callbacks
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        raise InputError(
            "GradientAccumulationScheduler: is not supported, because every epoch must have the same optimizer steps. "
            "Use Trainer(accumulate_grad_batches=...)."
        )
