"""Throughput: how fast a run goes, how much memory it takes and how long it will last.

Tokens are those of records: prompt, response and end token; padding is not counted. Time is that of training alone,
from the end of one optimizer step to the end of the next, without validation and samples between them.
"""

import resource
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lit_phi2.types import Batch


class Throughput(Callback):
    """Logs train/tokens_per_second, train/supervised_tokens_per_second and train/memory_gib at every optimizer step."""

    def __init__(self) -> None:
        self.tokens = 0
        self.supervised = 0
        self.step = 0
        self.window_began = 0.0
        self.paused_at: float | None = None
        self.trained_seconds = 0.0
        self.trained_steps = 0
        self.tokens_per_second = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step
        self.window_began = time.monotonic()
        self.paused_at = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.paused_at = time.monotonic()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self.paused_at is not None:  # the pause holds the validation, its samples and its checkpoint
            self.window_began += time.monotonic() - self.paused_at
            self.paused_at = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.tokens += batch.num_tokens
        self.supervised += batch.supervised_tokens
        if trainer.global_step == self.step:
            return  # inside a window
        now = time.monotonic()
        seconds = now - self.window_began
        sums = torch.tensor([self.tokens, self.supervised], device=pl_module.device)
        tokens, supervised = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        self.tokens_per_second = tokens / seconds
        self.trained_seconds += seconds
        self.trained_steps += trainer.global_step - self.step
        self.tokens = self.supervised = 0
        self.step = trainer.global_step
        self.window_began = now
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_scalars(
                {
                    "train/tokens_per_second": self.tokens_per_second,
                    "train/supervised_tokens_per_second": supervised / seconds,
                    "train/memory_gib": memory_gib(pl_module.device),
                }
            )

    def seconds_left(self, total_steps: int) -> float:
        """Until the last step, at the mean speed so far; without validations."""
        return (total_steps - self.step) * self.trained_seconds / max(1, self.trained_steps)


def memory_gib(device: torch.device) -> float:
    """The most memory used so far: allocated on a CUDA or MPS device, resident in the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kibibytes on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
