"""Throughput: tokens per second, peak memory, and the time left of a run.

    step 7 ends |<-- validation, samples, checkpoint -->|<-- training -->| step 8 ends
                             not counted                     counted

Tokens are those of records: prompt, response and EOS token, without padding.
"""

import sys
import time
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from lightning.pytorch.callbacks import Callback

from lit_phi2.types import Batch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class Throughput(Callback):
    """Logs train/tokens_per_second, train/supervised_tokens_per_second and train/memory_gib at every optimizer step."""

    def __init__(self) -> None:
        self.tokens = 0
        self.supervised_tokens = 0
        self.step = 0
        self.window_start = 0.0
        self.paused_at: float | None = None
        self.trained_seconds = 0.0
        self.trained_steps = 0
        self.tokens_per_second = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step
        self.window_start = time.monotonic()
        self.paused_at = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.paused_at = time.monotonic()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self.paused_at is not None:  # exclude the validation, its samples and its checkpoint
            self.window_start += time.monotonic() - self.paused_at
            self.paused_at = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.tokens += batch.num_tokens
        self.supervised_tokens += batch.supervised_tokens
        if trainer.global_step == self.step:
            return  # inside an accumulation window
        now = time.monotonic()
        seconds = now - self.window_start
        tokens, supervised_tokens = self.tokens, self.supervised_tokens
        if trainer.world_size > 1:  # one process need not wait for its GPU to tell it its own numbers
            sums = torch.tensor([tokens, supervised_tokens], device=pl_module.device)
            tokens, supervised_tokens = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        self.tokens_per_second = tokens / seconds
        self.trained_seconds += seconds
        self.trained_steps += trainer.global_step - self.step
        self.tokens = self.supervised_tokens = 0
        self.step = trainer.global_step
        self.window_start = now
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_scalars(
                {
                    "train/tokens_per_second": self.tokens_per_second,
                    "train/supervised_tokens_per_second": supervised_tokens / seconds,
                    "train/memory_gib": memory_gib(pl_module.device),
                }
            )

    def seconds_left(self, total_steps: int) -> float:
        """Until the last step, at the mean speed so far; validations are excluded."""
        return (total_steps - self.step) * self.trained_seconds / max(1, self.trained_steps)


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on a CUDA or MPS device, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    return peak_resident_bytes() / 2**30


def peak_resident_bytes() -> int:
    """Peak memory of this process; where the system does not tell, its memory now."""
    if resource is not None:
        peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kibibytes
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))  # Windows has peak_wset
