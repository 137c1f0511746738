"""Checkpoints: last.ckpt, and the best by val/loss, written only at the end of an optimizer step.

    checkpoints/last.ckpt    after every validation and epoch, every n steps or minutes, and before a requested stop
    checkpoints/best.ckpt    the one with the lowest val/loss, measured on exactly these weights
    adapter/                 the best in PEFT form, at the end of fit

Inside an accumulation window a checkpoint would lose the gradients so far. So a checkpoint or a stop that is requested
there (max_time, early stopping, a signal, the clock) waits for the end of the window. A run resumed from a checkpoint
written right before a validation would skip that validation, so such a checkpoint waits until the validation is over.
"""

import io
import logging
import math
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.errors import RunInterrupted
from lit_phi2.utils.files import atomic_write

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint completely or not at all, and only into its folder: Lightning's goes through /tmp."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        atomic_write(Path(path), buffer.getvalue())


class AdapterCheckpoint(Checkpoint):
    """Writes the last and the best checkpoint of a run, and stops the run cleanly on a signal.

    Args:
        folder: of the run.
        every_n_steps: the most optimizer steps between two checkpoints; None for no limit.
        every_minutes: the most minutes between two checkpoints; None for no limit.
    """

    def __init__(self, folder: Path, *, every_n_steps: int | None = None, every_minutes: float | None = None) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.last = folder / "checkpoints" / "last.ckpt"
        self.best = folder / "checkpoints" / "best.ckpt"
        self.best_loss = math.inf
        self._step = 0
        self._last_write_step = 0
        self._last_write_time = time.monotonic()
        self._is_best = False
        self._stop_requested = False
        self._signal = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss = state_dict["best_loss"]

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._install_handlers()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = self._last_write_step = trainer.global_step
        self._last_write_time = time.monotonic()
        self._install_handlers()
        if self._signal:
            raise RunInterrupted("stopped before the first step; there is nothing to save.", self._signal)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        window_ended = trainer.global_step > self._step
        self._step = trainer.global_step
        if not window_ended:
            if trainer.should_stop:
                trainer.should_stop, self._stop_requested = False, True
            return
        if self._stop_requested:
            trainer.should_stop = True
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # as the module does, in its hook after this one
        if _epoch_ended(trainer) or _validation_follows(trainer):
            return  # on_train_epoch_end writes after the loops have counted the epoch, or on_validation_end does
        if self._any_rank(trainer, self._is_due()) or self._signal or trainer.should_stop:
            self._write(trainer)
        self._raise_if_interrupted(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = float(trainer.callback_metrics.get("val/loss", math.nan))
        if loss < self.best_loss:
            self.best_loss = loss
            self._is_best = True
        if not _epoch_ended(trainer):
            self._write(trainer)
            self._raise_if_interrupted(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _epoch_ended(trainer):  # otherwise the run stopped inside the epoch, and was written there
            self._write(trainer)
            self._raise_if_interrupted(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_handlers()

    def export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the best adapter in PEFT form; fit calls this last.

        Not a hook: a run killed in here resumes with all steps taken, and Lightning then calls no training hook.
        """
        if not trainer.is_global_zero:
            return
        source = self.best if self.best.is_file() else self.last
        adapter = read_adapter(source) if source.is_file() else pl_module.trained_adapter()
        save_adapter(adapter, self.folder / "adapter")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _any_rank(self, trainer: pl.Trainer, due: bool) -> bool:
        """Whether a checkpoint is due on any rank; also shares a signal that reached one rank with all."""
        if trainer.world_size == 1:
            return due
        requests = torch.tensor([self._signal, int(due)], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(requests, torch.distributed.ReduceOp.MAX)
        self._signal, any_due = requests.tolist()
        return bool(any_due)

    def _is_due(self) -> bool:
        steps, minutes = self._step - self._last_write_step, (time.monotonic() - self._last_write_time) / 60
        return (self.every_n_steps is not None and steps >= self.every_n_steps) or (
            self.every_minutes is not None and minutes >= self.every_minutes
        )

    def _write(self, trainer: pl.Trainer) -> None:
        """Write best.ckpt before last.ckpt: after a kill between them, the older last.ckpt finds the best again."""
        for logger in trainer.loggers:
            logger.save()  # a resumed run does not write the scalars up to this step again
        first, second = (self.best, self.last) if self._is_best else (self.last, None)
        trainer.save_checkpoint(first, weights_only=False)  # rank 0 writes, the other ranks wait
        if second is not None and trainer.is_global_zero:
            atomic_write(second, first.read_bytes())
        self._is_best = False
        self._last_write_step, self._last_write_time = self._step, time.monotonic()

    def _install_handlers(self) -> None:
        """Replace Lightning's handlers: those act inside an accumulation window, and exit with other codes."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if number not in self._handlers:
                self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second signal ends the run at once
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log.info("stopping after this optimizer step; a second signal stops at once")

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _raise_if_interrupted(self, trainer: pl.Trainer) -> None:
        self._any_rank(trainer, False)
        if self._signal:
            raise RunInterrupted(
                f"stopped and saved. To continue: python -m lit_phi2 fit --config {self.folder / 'config.yaml'} "
                f"--ckpt_path {self.last}",
                self._signal,
            )


def _epoch_ended(trainer: pl.Trainer) -> bool:
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or (
        trainer.fit_loop.epoch_loop.batch_progress.current.ready >= trainer.num_training_batches
    )


def _validation_follows(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates right after this micro-batch; Lightning has no public method for this."""
    loop = trainer.fit_loop
    return bool(trainer.enable_validation and loop.epoch_loop._should_check_val_fx(loop._data_fetcher))
