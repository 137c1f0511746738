"""training/callbacks/progress.py."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar as ProgressBarBase
from lightning.pytorch.callbacks import TQDMProgressBar

from lit_phi2.training.callbacks.throughput import Throughput


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with loss, tokens/s and the time left of the whole run.

    Args:
        throughput: where the speed comes from.
    """

    def __init__(self, throughput: Throughput) -> None:
        super().__init__()
        self.throughput = throughput

    @property
    def sanity_check_description(self) -> str:
        return "The base"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if trainer.state.fn == "fit" and self.throughput.trained_steps:
            metrics["tokens/s"] = f"{self.throughput.tokens_per_second:,.0f}"
            metrics["left"] = _clock(self.throughput.seconds_left(pl_module.total_steps()))
        return metrics


class ProgressLogger(ProgressBarBase):
    """For a log file: a line now and then instead of a bar that redraws itself.

    Args:
        throughput: where the speed comes from.
        every_seconds: at least so long from one line to the next.
    """

    def __init__(self, throughput: Throughput, every_seconds: float = 10.0) -> None:
        super().__init__()
        self.throughput = throughput
        self.every_seconds = every_seconds
        self.printed = -every_seconds
        self.disabled = False

    def disable(self) -> None:
        """Lightning calls this on ranks other than 0."""
        self.disabled = True

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._print(f"batch {batch_idx + 1}/{trainer.num_predict_batches[0]} answered")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = trainer.progress_bar_metrics.get("loss")
        if loss is None:
            return
        total = pl_module.total_steps()
        self._print(
            f"step {trainer.global_step}/{total}  loss {loss:.4f}  {self.throughput.tokens_per_second:,.0f} tokens/s  "
            f"{_clock(self.throughput.seconds_left(total))} left",
            always=trainer.global_step == total,
        )

    def _print(self, line: str, *, always: bool = False) -> None:
        now = time.monotonic()
        if self.disabled:
            return
        if always or now - self.printed >= self.every_seconds:
            self.printed = now
            print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> _clock(3725.4)
    '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
