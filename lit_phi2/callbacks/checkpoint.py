"""Checkpoints: last.ckpt and the best by val/loss, written at the end of an optimizer step's window and nowhere else.

    checkpoints/last.ckpt    after every validation, every epoch, and when the run is asked to stop
    checkpoints/best.ckpt    the one with the lowest val/loss, measured on just these weights
    adapter/                 the best, in PEFT form, at the end of fit

Inside a window the gradients gathered so far would be lost, so whatever asks for a checkpoint or for a stop there (a
validation, max_time, early stopping, a signal) waits for the window's end.
"""

import logging
import math
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from lit_phi2.errors import Stopped
from lit_phi2.files import replace_file
from lit_phi2.model.lora import read_adapter, save_adapter

log = logging.getLogger(__name__)


class AdapterCheckpoint(Checkpoint):
    """Keeps the last and the best state of a run, and stops it cleanly.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last = folder / "checkpoints" / "last.ckpt"
        self.best = folder / "checkpoints" / "best.ckpt"
        self.best_loss = math.inf
        self._step = 0
        self._is_best = False
        self._write_at_window_end = False
        self._stop_at_window_end = False
        self._signal = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss = state_dict["best_loss"]

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_signals()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self._take_signals()
        if self._signal:
            raise Stopped("stopped before the first step; there is nothing to save.", self._signal)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        window_ended = trainer.global_step > self._step
        self._step = trainer.global_step
        if not window_ended:
            self._postpone_stop(trainer)
            return
        if self._stop_at_window_end:
            trainer.should_stop = True
        if _epoch_ended(trainer):
            return  # written in on_train_epoch_end, once the loops have counted the epoch
        # The module stops a run at max_steps, but its hook comes after this one.
        stopping = trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step
        if self._write_at_window_end or self._signal or stopping:
            self._write(trainer)
        self._stop_if_asked()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if _inside_window(trainer):  # what is written at its end has other weights, so it cannot be the best
            self._write_at_window_end = True
            self._postpone_stop(trainer)
            return
        loss = float(trainer.callback_metrics.get("val/loss", math.nan))
        if loss < self.best_loss:
            self.best_loss = loss
            self._is_best = True
        if not _epoch_ended(trainer):
            self._write(trainer)
            self._stop_if_asked()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _epoch_ended(trainer):  # else it was stopped inside the epoch, and written then
            self._write(trainer)
            self._stop_if_asked()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_handlers()
        if not trainer.is_global_zero:
            return
        source = self.best if self.best.is_file() else self.last
        adapter = read_adapter(source) if source.is_file() else pl_module.trained_adapter()
        save_adapter(adapter, self.folder / "adapter")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _write(self, trainer: pl.Trainer) -> None:
        self._write_at_window_end = False
        if trainer.is_global_zero:
            replace_file(self.last, lambda path: trainer.save_checkpoint(path, weights_only=False))
        else:
            trainer.save_checkpoint(self.last)  # writes nothing, but waits for rank 0 as all ranks must
        if self._is_best and trainer.is_global_zero:
            replace_file(self.best, lambda path: shutil.copyfile(self.last, path))
        self._is_best = False

    def _postpone_stop(self, trainer: pl.Trainer) -> None:
        if trainer.should_stop:
            trainer.should_stop = False
            self._stop_at_window_end = True

    def _take_signals(self) -> None:
        """From Lightning, which set its own by now: those act inside a window, and exit with other codes."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if number not in self._handlers:
                self._handlers[number] = signal.signal(number, self._note_signal)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the run at once; the last checkpoint stays
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log.info("stopping after this optimizer step; once more to stop at once")

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _stop_if_asked(self) -> None:
        if self._signal:
            raise Stopped(
                f"stopped and saved. To continue: python -m lit_phi2 fit --config {self.folder / 'config.yaml'} "
                f"--ckpt_path {self.last}",
                self._signal,
            )


def _epoch_ended(trainer: pl.Trainer) -> bool:
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or (
        trainer.fit_loop.epoch_loop.batch_progress.current.ready >= trainer.num_training_batches
    )


def _inside_window(trainer: pl.Trainer) -> bool:
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return ready % trainer.accumulate_grad_batches != 0 and not _epoch_ended(trainer)
