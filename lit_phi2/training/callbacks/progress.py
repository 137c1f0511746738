"""Progress: a bar on a terminal, and a line every few seconds in a log file.

    terminal    Epoch 0:  41%|####      | 196/480 [..., loss=0.3, tokens/s=2,140, left=0:04:11]
    log file    step 196/1440  loss 0.3012  2,140 tokens/s  0:04:11 left

Speed comes from Throughput, which excludes validation and samples, so the time left excludes them too.
"""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar as ProgressBarBase
from lightning.pytorch.callbacks import TQDMProgressBar

from lit_phi2.training.callbacks.throughput import Throughput
from lit_phi2.utils.console import format_seconds


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with loss, tokens/s and the time left of the whole run.

    Args:
        throughput: measures the speed.
    """

    def __init__(self, throughput: Throughput) -> None:
        super().__init__()
        self.throughput = throughput

    @property
    def sanity_check_description(self) -> str:
        return "Base"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if trainer.state.fn == "fit" and self.throughput.trained_steps:
            metrics["tokens/s"] = f"{self.throughput.tokens_per_second:,.0f}"
            metrics["left"] = format_seconds(self.throughput.seconds_left(pl_module.total_steps()))
        return metrics


class ProgressLogger(ProgressBarBase):
    """Lines for a log file, instead of a bar that redraws itself.

    Args:
        throughput: measures the speed.
        every_seconds: the least time between two lines.
    """

    def __init__(self, throughput: Throughput, every_seconds: float = 10.0) -> None:
        super().__init__()
        self.throughput = throughput
        self.every_seconds = every_seconds
        self.last_print = -every_seconds
        self.disabled = False

    def disable(self) -> None:
        """Lightning calls this on ranks other than 0."""
        self.disabled = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = trainer.progress_bar_metrics.get("loss")
        if loss is None:
            return
        total = pl_module.total_steps()
        self._print(
            f"step {trainer.global_step}/{total}  loss {loss:.4f}  {self.throughput.tokens_per_second:,.0f} tokens/s  "
            f"{format_seconds(self.throughput.seconds_left(total))} left",
            force=trainer.global_step == total,
        )

    def _print(self, line: str, *, force: bool = False) -> None:
        now = time.monotonic()
        if self.disabled:
            return
        if force or now - self.last_print >= self.every_seconds:
            self.last_print = now
            print(line, file=sys.stderr, flush=True)
